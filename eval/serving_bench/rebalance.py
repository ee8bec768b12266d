"""Load a server that moves experts between its ranks (EPLB), and compare the bits of fixed answers between the loads.

\b
    python -m hopper_moe.eval.serving_bench.rebalance http://127.0.0.1:30000 --log server.log --out rebalance.json

The server needs --enable-eplb, and --eplb-rebalance-num-iterations small enough to be reached. Fixed answers are asked while
nothing else runs, since other batches round differently. The exit code is 1 if a request failed, a bit changed, or experts moved
less often than --at-least says.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click

from hopper_moe.eval.serving_bench.refresh_load import traffic
from hopper_moe.eval.serving_bench.refresh_steps import Bits, bits, unequal
from hopper_moe.kernels.benchmarks.options import RefusingCommand, commit_option

_END = re.compile(r"^\[[\d :-]*((?:\w+ ?)*)\] \[EPLBManager\] rebalance end(?: time=([\d.]+)s)?", re.MULTILINE)


def rebalances(log: str) -> list[float | None]:
    """Seconds of every rebalance that ended, as the first rank of the log says it; None where SGLang did not time it (with
    --eplb-rebalance-layers-per-chunk)."""
    by_rank: dict[str, list[float | None]] = defaultdict(list)
    for rank, seconds in _END.findall(log):
        by_rank[rank].append(float(seconds) if seconds else None)
    return next(iter(by_rank.values()), [])


def one_round(url: str, log: Path, seconds: float, concurrency: int, seed: int, wanted: Bits) -> dict[str, Any]:
    """So many seconds of load, then the fixed answers. `problems`: one sentence each."""
    before = len(rebalances(log.read_text(errors="replace")))
    with traffic(url, concurrency, seed) as replies:
        time.sleep(seconds)
    failures = [reply.failure for reply in replies if reply.failure]
    problems = [f"{len(failures)} requests failed, the first: {failures[0]}"] if failures else []
    problems += unequal("fixed answers", bits(url), wanted)
    moved = rebalances(log.read_text(errors="replace"))[before:]
    return {"requests": len(replies), "rebalance_seconds": moved, "problems": problems}


@click.command(cls=RefusingCommand, help=__doc__)
@click.argument("url")
@click.option("--log", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="What the server says.")
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=8.0, show_default=True, help="Of load, each round.")
@click.option("--concurrency", default=32, show_default=True, type=click.IntRange(1))
@click.option("--at-least", default=5, show_default=True, type=click.IntRange(0), help="Rebalances under load.")
@commit_option
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(url: str, log: Path, rounds: int, seconds: float, concurrency: int, at_least: int, commit: str, out: Path) -> None:
    wanted, found = bits(url), []
    problems: list[str] = []
    for number in range(rounds):
        found.append(one_round(url, log, seconds, concurrency, seed=number, wanted=wanted))
        problems += found[-1]["problems"]
        click.echo(f"round {number + 1}: {json.dumps(found[-1])}")
    moved = sum(len(entry["rebalance_seconds"]) for entry in found)
    if moved < at_least:
        problems.append(f"{moved} rebalances under load, and {at_least} were asked for: lower --eplb-rebalance-num-iterations")
    facts = {"commit": commit, "url": url, "concurrency": concurrency, "rebalances": moved, "problems": problems}
    out.write_text(json.dumps({**facts, "rounds": found}, indent=1) + "\n")
    click.echo(f"{moved} rebalances: {'; '.join(problems) or 'nothing wrong'}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
