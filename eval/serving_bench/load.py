"""One measurement of a running server by SGLang's own `bench_serving`, called in this process: importing it costs ten seconds."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hopper_moe.quantization.errors import Refusal

_KEPT = (
    "duration", "completed", "total_input_tokens", "total_output_tokens", "input_throughput", "output_throughput",
    "total_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "mean_tpot_ms", "p99_tpot_ms", "median_itl_ms",
    "p99_itl_ms",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """Random prompts of `input_len` tokens, `output_len` tokens generated for each (EOS ignored), `concurrency` at a time."""

    concurrency: int
    num_prompts: int
    input_len: int
    output_len: int


def measure(url: str, model: str, load: Load, seed: int) -> dict[str, Any]:
    """Run `load` against the server at `url`; times in ms, throughput in tokens/s. A seed used before is answered by the cache.

    Raises `Refusal` with the end of its output when it did not complete every request.
    """
    from sglang.benchmark import serving

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.jsonl"
        arguments = {
            "--backend": "sglang", "--base-url": url, "--model": model, "--tokenizer": model, "--dataset-name": "random-ids",
            "--random-input-len": load.input_len, "--random-output-len": load.output_len, "--random-range-ratio": 1,
            "--num-prompts": load.num_prompts, "--max-concurrency": load.concurrency, "--seed": seed, "--output-file": out,
        }  # fmt: skip
        before, said = sys.argv, io.StringIO()
        sys.argv = ["bench_serving", "--tokenize-prompt", "--disable-tqdm", *(str(a) for pair in arguments.items() for a in pair)]
        try:
            with contextlib.redirect_stdout(said):
                serving.cli_main()
        finally:
            sys.argv = before
        found = json.loads(out.read_text().splitlines()[-1]) if out.exists() else {}
    if found.get("completed") != load.num_prompts:
        raise Refusal(f"{url}: {found.get('completed', 0)} of {load.num_prompts} requests completed: {said.getvalue()[-1500:]}")
    return {**asdict(load), "seed": seed, **{name: found[name] for name in _KEPT}}
