"""Where a decode step of a running server goes, kernel by kernel, from SGLang's own profiler endpoint.

\b
    python -m hopper_moe.eval.serving_bench.breakdown http://127.0.0.1:30000 --concurrency 64 --out step.json

Keeps the server busy with `--concurrency` requests, records a few steps on the GPU and adds up kernel times by what they do.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
import re
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from hopper_moe.eval.serving_bench.http_calls import post
from hopper_moe.kernels.benchmarks.options import RefusingCommand
from hopper_moe.quantization.errors import Refusal

# First match wins. Kernel names of SGLang 0.5.23, FlashInfer 0.7 and ours.
_EXPERTS = (
    "hopper_moe", "mega_moe", "pre_dispatch", "marlin_moe", "moe_wna16", r"Marlin<", "moe_align", "fused_moe", "MoeGemm", "moe::",
    "GroupedGemm", "GroupProblemShape", "tensorrt_llm", "cutlass_extensions", "moe_sum", "count_and_sort", "expand_?input",
)  # fmt: skip
GROUPS = (
    ("routed experts", "|".join(_EXPERTS)),
    ("routing", r"topk|router|\bgate"),
    ("attention", r"flash|mla|attn|indexer|compress|rope|mqa|paged|hadamard|kv_cache|set_k"),
    ("hyper-connections and norms", r"mhc|hc_|norm|sinkhorn"),
    ("dense linears", r"gemm|cublas|nvjet|cutlass|gemv|quant"),
    ("activation, shared and routed", r"silu|swiglu"),
    ("sampling and logits", r"argmax|softmax|sampl|vocab|logits"),
)


_IDLE = "no kernel"


def group_of(kernel: str) -> str:
    """What a kernel does, by its name; "other" for names without a rule."""
    return next((group for group, pattern in GROUPS if re.search(pattern, kernel, re.IGNORECASE)), "other")


def summarize(events: Iterable[dict[str, Any]], num_steps: int) -> dict[str, Any]:
    """Microseconds a step of each group and of the largest kernels, from the events of a Chrome trace.

    Kernels of parallel streams overlap, so `groups_us` may add up to more than `busy_us`, the time in which any kernel ran. In
    `shares_us` kernels that run at once share the time equally, and "no kernel" is the rest: they add up to `step_us`.
    """
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    names: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        names[event["name"]].append(event["dur"])
    groups: dict[str, float] = defaultdict(float)
    for name, durations in names.items():
        groups[group_of(name)] += sum(durations) / num_steps
    shares = _shares(kernels, num_steps)
    span = sum(shares.values())
    largest = sorted(names.items(), key=lambda item: -sum(item[1]))[:60]
    return {
        "steps": num_steps,
        "step_us": round(span, 1),
        "busy_us": round(span - shares.get(_IDLE, 0.0), 1),
        "shares_us": _largest_first(shares),
        "groups_us": _largest_first(groups),
        "kernels": [
            {"us_a_step": round(sum(d) / num_steps, 1), "calls_a_step": round(len(d) / num_steps, 2), "name": name[:160]}
            for name, d in largest
        ],
    }


def _largest_first(parts: dict[str, float]) -> dict[str, float]:
    return {name: round(us, 1) for name, us in sorted(parts.items(), key=lambda item: -item[1])}


def _shares(kernels: list[dict[str, Any]], num_steps: int) -> dict[str, float]:
    """us a step of each group from the first kernel's start to the last one's end, an instant divided among what runs in it."""
    edges = sorted((at, end, group_of(e["name"])) for e in kernels for at, end in ((e["ts"], 1), (e["ts"] + e["dur"], -1)))
    shares: dict[str, float] = defaultdict(float)
    running: Counter[str] = Counter()
    for (at, change, group), (then, *_) in pairwise(edges):
        running[group] += change
        total = running.total()
        for name, count in (running if total else {_IDLE: 1}).items():
            shares[name] += (then - at) * count / max(total, 1) / num_steps
    return {name: us for name, us in shares.items() if us}


def record(url: str, concurrency: int, num_steps: int, context: int, seconds: float = 60) -> list[dict[str, Any]]:
    """Events of `num_steps` decode steps with that many requests running. The server must see this machine's temporary folder."""
    rng = random.Random(time.time_ns())
    input_ids = [[rng.randrange(256, 100_000) for _ in range(context)] for _ in range(concurrency)]
    body = {"input_ids": input_ids, "sampling_params": {"temperature": 0, "max_new_tokens": 2000, "ignore_eos": True}}

    def generate() -> None:
        with contextlib.suppress(Refusal):  # it fails with the profile's request, which says so, or ends with the profile
            post(f"{url}/generate", body, seconds + 60)

    running = threading.Thread(target=generate, daemon=True)
    with tempfile.TemporaryDirectory() as folder:
        running.start()
        time.sleep(1.0 + concurrency * context / 50_000)  # prefill
        request = {"output_dir": folder, "num_steps": num_steps, "activities": ["GPU"]}
        post(f"{url}/start_profile", request, seconds)
        deadline = time.monotonic() + seconds
        while not (found := list(Path(folder).rglob("*.trace.json.gz"))) and time.monotonic() < deadline:
            time.sleep(0.2)
        post(f"{url}/abort_request", {"rid": "", "abort_all": True}, seconds)
        running.join(seconds)
        if not found:
            raise Refusal(f"{url} wrote no trace within {seconds:.0f} s.")
        with gzip.open(found[0]) as file:
            return json.load(file)["traceEvents"]


@click.command(cls=RefusingCommand, help=__doc__)
@click.argument("url")
@click.option("--concurrency", default=64, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--context", default=1024, show_default=True, help="Tokens of each prompt.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(url: str, concurrency: int, steps: int, context: int, out: Path) -> None:
    found = {"concurrency": concurrency, "context": context, **summarize(record(url, concurrency, steps, context), steps)}
    out.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(f"step {found['step_us']} us, busy {found['busy_us']} us: {found['shares_us']}")


if __name__ == "__main__":
    main()
