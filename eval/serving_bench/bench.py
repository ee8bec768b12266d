"""Measure MoE backends against each other on one GPU: the same model, the same loads, the servers in turn.

\b
    python -m hopper_moe.eval.serving_bench.bench MODEL --out DIR
    python -m hopper_moe.eval.serving_bench.report DIR        # table and plot

All servers live on the GPU at once and one is loaded at a time, round after round, so that a drift of the machine meets all; with
--in-turn each is started when the one before it is gone, for models of which only one fits. First the prompts and the largest
batches run unmeasured, with short answers. Everything after `--` goes to every server.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from hopper_moe.eval.serving_bench.load import Load, measure
from hopper_moe.eval.serving_bench.server import log_facts, start
from hopper_moe.kernels.benchmarks.options import RefusingCommand, commit_option, numbers
from hopper_moe.launch.server_process import ServerProcess, Servers, servers
from hopper_moe.moe_backends.sglang.plan import BACKEND
from hopper_moe.quantization.errors import Refusal

ROUNDS = 3
OWN_FACTS = ("kv_tokens", "workspace_gib", "packed_gib")  # of a log, whatever else runs on the GPU
PREFILL = Load(concurrency=1, num_prompts=6, input_len=8192, output_len=1)
FIRST_OUTPUT_LEN = 32  # of the round that is not kept


def loads(concurrencies: dict[int, Sequence[int]], output_len: int, batches: int | None = None) -> list[Load]:
    """Prompts alone, then for each length of prompts `batches` of requests at each of its concurrencies (None: two, four at 1 and
    8), in the order given."""
    return [
        PREFILL,
        *(Load(c, c * (batches or (4 if c < 32 else 2)), length, output_len) for length, at in concurrencies.items() for c in at),
    ]


def lengths(input_len: str, concurrency: str, also: Sequence[str]) -> dict[int, Sequence[int]]:
    """Concurrencies of each length of prompts; `also` has entries such as 8192:1,64."""
    found: dict[int, Sequence[int]] = dict.fromkeys(numbers("--input-len", input_len), numbers("--concurrency", concurrency))
    for entry in also:
        length, _, at = entry.partition(":")
        found[numbers("--also", length)[0]] = numbers("--also", at)
    return found


def first_round(planned: Sequence[Load]) -> list[Load]:
    """What makes the servers compile all that the loads need: decoding was compiled with the graphs, prefill sees the most kinds
    of batches where most prompts come at once."""
    largest = max(planned, key=lambda load: (load.concurrency, load.input_len))
    return [load for load in planned if load.output_len == 1] + [replace(largest, output_len=FIRST_OUTPUT_LEN)]


def start_all(
    group: Servers,
    pool: ThreadPoolExecutor,
    model: str,
    backends: Sequence[str],
    out: Path,
    first_port: int,
    stagger: float | None,
    arguments: Sequence[str],
) -> tuple[dict[str, ServerProcess], list[str]]:
    """(servers by backend, one line for each that did not start). `pool` has a thread for each.

    `stagger`: seconds between starts; None: each when the last is up.
    """
    starts: dict[str, Future[ServerProcess]] = {}
    for number, backend in enumerate(backends):
        if number and stagger:
            time.sleep(stagger)
        port, log = first_port + 100 * number, out / f"server-{backend}.log"
        starts[backend] = pool.submit(start, group, model, arguments=arguments, backend=backend, port=port, log=log)
        if stagger is None:
            wait([starts[backend]])
    started, problems = {}, []
    for backend, future in starts.items():
        try:
            started[backend] = future.result()
        except Refusal as refusal:
            problems.append(f"{backend}: {refusal}")
    return started, problems


def gpus_held(server: ServerProcess) -> dict[str, float]:
    """`gpus` that the server's processes are on, and `gpu_gib` of memory that they hold there, by the driver's count; empty where
    it does not say."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        running = [pynvml.nvmlDeviceGetComputeRunningProcesses(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    family = {process.pid for process in server.family()}
    held = [[e.usedGpuMemory for e in entries if e.pid in family and e.usedGpuMemory is not None] for entries in running]
    return {"gpus": sum(map(bool, held)), "gpu_gib": sum(map(sum, held)) / 2**30} if any(held) else {}


def describe(server: ServerProcess, together: bool) -> dict[str, Any]:
    """What a server takes. SGLang reads its figures off the free memory of the GPU: with servers that start together they are
    left out, and only what the driver counts for the processes is kept."""
    facts = {name: value for name, value in log_facts(server.said()).items() if not together or name in OWN_FACTS}
    return {"command": server.command, "seconds_to_ready": server.seconds_to_ready, **gpus_held(server), **facts}


@click.command(cls=RefusingCommand, help=__doc__)
@click.argument("model")
@click.option("--backends", default=f"{BACKEND},marlin,flashinfer_mxfp4,flashinfer_mxfp4_fp8", show_default=True)
@click.option("--concurrency", default="1,8,32,64,128", show_default=True)
@click.option("--input-len", default="1024", show_default=True, help="Tokens of a prompt; several lengths with commas.")
@click.option("--also", multiple=True, metavar="LENGTH:CONCURRENCY", help="Another length at other concurrencies: 8192:1,64.")
@click.option("--output-len", default=1024, show_default=True)
@click.option("--batches", type=click.IntRange(1), help="Batches of requests at each concurrency  [default: 2, 4 below 32]")
@click.option("--rounds", default=ROUNDS, show_default=True)
@click.option("--port", default=30000, show_default=True, help="Of the first server; each one more has a port 100 higher.")
@click.option("--stagger", type=float, help="Seconds between starts  [default: start the next when the last answers]")
@click.option("--in-turn", is_flag=True, help="One server at a time, all its rounds: for models that fill the GPUs.")
@click.option("--seconds", default=3600.0, show_default=True, help="Begin no load after this many.")
@commit_option
@click.option("--then", help="Shell command to run afterwards; it sees the servers as URL_MARLIN and so on, and OUT.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.argument("sglang_arguments", nargs=-1, type=click.UNPROCESSED)
def main(
    model: str,
    backends: str,
    concurrency: str,
    input_len: str,
    also: tuple[str, ...],
    output_len: int,
    batches: int | None,
    rounds: int,
    port: int,
    stagger: float | None,
    in_turn: bool,
    seconds: float,
    commit: str,
    then: str | None,
    out: Path,
    sglang_arguments: tuple[str, ...],
) -> None:
    planned, names = loads(lengths(input_len, concurrency, also), output_len, batches), backends.split(",")
    if in_turn and then:
        raise Refusal("--then sees all servers at once, and --in-turn runs one at a time: give one of them.")
    out.mkdir(parents=True, exist_ok=True)
    described: dict[str, Any] = {}
    problems: list[str] = []
    for some in [[name] for name in names] if in_turn else [names]:
        with ThreadPoolExecutor(len(some)) as pool, servers() as group:  # in this order: stopped servers end every wait
            started, failed = start_all(group, pool, model, some, out, port, stagger, sglang_arguments)
            described |= {backend: describe(server, together=stagger is not None) for backend, server in started.items()}
            (out / "servers.json").write_text(json.dumps(described, indent=1) + "\n")
            problems += failed + measure_all(started, model, planned, rounds, seconds, commit, out)
            if then:
                urls = {f"URL_{backend.upper()}": server.url for backend, server in started.items()}
                subprocess.run(then, shell=True, env={**os.environ, **urls, "OUT": str(out)})
    if problems:
        raise click.ClickException("\n".join(problems))


_DECODE_LINE = re.compile(r"Decode batch, #running-req: (\d+),.*?gen throughput \(token/s\): ([\d.]+)")


def decode_pace(log: str, concurrency: int) -> float | None:
    """Output tokens/s while all requests decode, the median of what SGLang logs every 40 steps: the server's own pace, whatever
    its streams' reader can take. None: no such line."""
    paces = [float(pace) for running, pace in _DECODE_LINE.findall(log) if int(running) == concurrency]
    return statistics.median(paces) if paces else None


def measure_all(
    servers: dict[str, ServerProcess], model: str, planned: list[Load], rounds: int, seconds: float, commit: str, out: Path
) -> list[str]:
    """Append one JSON line for each round, load and backend to `out/serving.jsonl`; round 0 is not kept. Returns what failed."""
    started, seed = time.monotonic(), time.time_ns() % (1 << 30)
    failed: list[str] = []
    for number in range(rounds + 1):
        for load in planned if number else first_round(planned):
            for backend, server in servers.items():
                if time.monotonic() - started > seconds:
                    click.echo(f"stopped after {seconds:.0f} s in round {number}")
                    return failed
                seed += 1
                said = server.log.stat().st_size
                try:
                    row = {"backend": backend, "commit": commit, "round": number, **measure(server.url, model, load, seed)}
                except Refusal as refusal:
                    failed.append(str(refusal))
                    click.echo(failed[-1])
                    continue
                row["decode_pace"] = decode_pace(server.log.read_bytes()[said:].decode(errors="replace"), load.concurrency)
                click.echo(f"[{time.monotonic() - started:.0f} s] {_line(row)}")
                if number:
                    with (out / "serving.jsonl").open("a") as file:
                        file.write(json.dumps(row) + "\n")
    return failed


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['backend']:<18} round {row['round']} c {row['concurrency']:<4} in {row['input_len']} out {row['output_len']}: "
        f"tpot {row['median_tpot_ms']:.2f} itl {row['median_itl_ms']:.2f} ttft {row['median_ttft_ms']:.1f} ms, "
        f"{row['total_throughput']:.0f} tok/s, decoding {row['decode_pace'] or float('nan'):.0f} tok/s"
    )


if __name__ == "__main__":
    main()
