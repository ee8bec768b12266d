"""Mixed load on a running server for some minutes, and what must still hold afterwards.

\b
    python -m hopper_moe.eval.serving_bench.soak http://127.0.0.1:30000 --minutes 20 --log server.log --out soak.json

Cycles of bursts, aborted requests, long prompts, streams and idle time. It fails (exit code 1) when a request fails or hangs, a
fixed greedy answer changes, memory grows after the first cycles, requests stay in the queue, or the server's log has a traceback.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import httpx

from hopper_moe.eval.serving_bench.compare import greedy
from hopper_moe.eval.serving_bench.http_calls import get
from hopper_moe.kernels.benchmarks.options import RefusingCommand

HANG = 120.0  # seconds without an answer
GROWTH_MIB = 512  # more GPU memory than after the second cycle: a leak
_METRICS = (
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
    "hopper_moe:kernel_launches_total",
    "hopper_moe:eager_tokens_total",
)
_BAD = re.compile(r"Traceback|memory leak|CUDA error|Scheduler hit an exception", re.IGNORECASE)


class Load:
    """Sends requests and counts what became of them."""

    def __init__(self, url: str, seed: int) -> None:
        self._url, self._rng = url, random.Random(seed)
        # The server closes a connection that was idle for 5 s, and a request sent just then fails without having reached it (2 of
        # 9,488 failed, of which its log knows nothing): idle connections are not used again after 2 s.
        limits = httpx.Limits(max_connections=512, keepalive_expiry=2)
        self._client = httpx.AsyncClient(timeout=HANG, limits=limits, trust_env=False)
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    async def close(self) -> None:
        await self._client.aclose()

    def _body(self, input_len: int, output_len: int, **more: Any) -> dict[str, Any]:
        ids = [self._rng.randrange(256, 100_000) for _ in range(input_len)]
        sampling = {"temperature": self._rng.choice((0, 0.7)), "max_new_tokens": output_len, "ignore_eos": True}
        return {"input_ids": ids, "sampling_params": sampling, **more}

    async def one(self, kind: str, input_len: int, output_len: int) -> None:
        """A request that must give exactly `output_len` tokens."""
        try:
            reply = await self._client.post(f"{self._url}/generate", json=self._body(input_len, output_len))
            got = reply.json()["meta_info"]["completion_tokens"] if reply.status_code == 200 else reply.text[:200]
            if got != output_len:
                self.failures.append(f"{kind} {input_len}+{output_len}: {got}")
        except (httpx.HTTPError, KeyError, ValueError) as error:
            self.failures.append(f"{kind} {input_len}+{output_len}: {type(error).__name__} {error}")
        self.counts[kind] += 1

    async def aborted(self) -> None:
        """A stream whose reader goes away after a few chunks: the server has to free its tokens."""
        body = self._body(self._rng.randrange(16, 2000), 400, stream=True)
        chunks = self._rng.randrange(1, 20)
        try:
            async with self._client.stream("POST", f"{self._url}/generate", json=body) as reply:
                async for _ in reply.aiter_lines():
                    chunks -= 1
                    if chunks <= 0:
                        break
        except httpx.HTTPError as error:
            self.failures.append(f"abort: {type(error).__name__} {error}")
        self.counts["aborted"] += 1

    async def cycle(self) -> None:
        """One of everything, some at the same time."""
        pick = self._rng.randrange
        await asyncio.gather(*(self.one("burst", pick(1, 400), pick(1, 80)) for _ in range(pick(64, 192))))
        await asyncio.gather(
            *(self.aborted() for _ in range(24)), *(self.one("beside aborts", pick(1, 200), 40) for _ in range(24))
        )
        await asyncio.gather(
            *(self.one("long", pick(8_000, 30_000), 8) for _ in range(3)), *(self.one("short", 5, 120) for _ in range(16))
        )
        for _ in range(4):
            await self.one("alone", pick(1, 4000), 16)
        await asyncio.sleep(2 + pick(3))  # idle: SGLang checks its pools for leaks then


def metric(text: str, name: str) -> float | None:
    """Sum of a metric over its labels in Prometheus text; None: not there."""
    values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([0-9.eE+-]+)$", text, re.MULTILINE)
    return sum(map(float, values)) if values else None


def observe(url: str) -> dict[str, float | None]:
    """Memory of the GPUs that this process sees, and counters now. Metrics are there when the server was started with
    --enable-metrics."""
    import pynvml

    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    used = sum(pynvml.nvmlDeviceGetMemoryInfo(handles[index]).used for index in visible(len(handles))) / 2**20
    pynvml.nvmlShutdown()
    text = get(f"{url}/metrics", timeout=30).text
    return {"gpu_mib": used, **{name: metric(text, name) for name in _METRICS}}


def visible(num_gpus: int) -> list[int]:
    """Indices that CUDA_VISIBLE_DEVICES names; all GPUs if it is unset or names them otherwise."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [int(index) for index in given] if all(index.isdecimal() for index in given) else list(range(num_gpus))


def verdict(
    failures: list[str], observed: list[dict[str, Any]], answers_agree: bool, log: str, new_files: list[str]
) -> list[str]:
    """What is wrong, one sentence each; empty: nothing is."""
    found = [f"{len(failures)} requests failed, the first: {failures[0]}"] if failures else []
    if not answers_agree:
        found.append("the fixed greedy answer changed")
    settled = observed[min(2, len(observed) - 1)]["gpu_mib"]
    if (grown := observed[-1]["gpu_mib"] - settled) > GROWTH_MIB:
        found.append(f"GPU memory grew by {grown:.0f} MiB after the second cycle")
    for name in ("sglang:num_running_reqs", "sglang:num_queue_reqs"):
        if observed[-1][name]:
            found.append(f"{name} is {observed[-1][name]:.0f} after the load ended")
    found += [f"the log says: {line[:200]}" for line in log.splitlines() if _BAD.search(line)][:3]
    return found + [f"compiled after the start: {name}" for name in new_files]


async def soak(url: str, minutes: float, seed: int) -> tuple[Load, list[dict[str, Any]]]:
    """Cycles until the time is over; the observations before the first and after each."""
    load, observed, end = Load(url, seed), [observe(url)], time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        await load.cycle()
        observed.append(observe(url))
        click.echo(f"{time.strftime('%T')} {sum(load.counts.values())} requests, {len(load.failures)} failed, {observed[-1]}")
    await load.close()
    return load, observed


def _compiled() -> set[str]:
    from hopper_moe.moe_backends.env import settings

    folder = settings().cache_dir
    return {str(path) for path in folder.rglob("*.so")} if folder.exists() else set()


@click.command(cls=RefusingCommand, help=__doc__)
@click.argument("url")
@click.option("--minutes", default=20.0, show_default=True)
@click.option("--seed", type=int, help="Of the load  [default: the clock]")
@click.option("--log", type=click.Path(exists=True, path_type=Path), help="The server's log, to look for errors.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(url: str, minutes: float, seed: int | None, log: Path | None, out: Path) -> None:
    seed = seed if seed is not None else time.time_ns() % (1 << 30)
    prompt, before, started = [1000 + 7 * i for i in range(100)], _compiled(), time.monotonic()
    first = greedy(url, prompt, 32)
    load, observed = asyncio.run(soak(url, minutes, seed))
    again = greedy(url, prompt, 32)
    time.sleep(2)
    observed.append(observe(url))
    problems = verdict(
        load.failures,
        observed,
        first["tokens"] == again["tokens"],
        log.read_text(errors="replace") if log else "",
        sorted(_compiled() - before),
    )
    result = {
        "seconds": round(time.monotonic() - started, 1),
        "seed": seed,
        "requests": dict(load.counts),
        "failures": load.failures[:20],
        "same_logprobs": first["logprobs"] == again["logprobs"],
        "observed": observed,
        "problems": problems,
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(f"{sum(load.counts.values())} requests in {result['seconds']} s: {problems or 'nothing wrong'}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
