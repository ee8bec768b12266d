"""Change the weights of a running server in every way that SGLang's HTTP API has, and compare its answers bit for bit.

\b
    R="python -m hopper_moe.eval.serving_bench.refresh"
    $R record http://127.0.0.1:30002 other.json             # of a fresh server with the other checkpoint
    $R measure http://127.0.0.1:30001 /tmp/ckpt --other /tmp/ckpt1 --other-answers other.json \\
        --log server.log --out refresh.json

It runs on the server's host and holds both checkpoints in the memory of the first visible GPU, as a trainer would. Steps: `same`
weights, `other` ones, `many` refreshes in a row, under `load`, `bad` updates; only if they are named: `sleep` (needs
--enable-memory-saver), `distributed` (by broadcast in a process group with the server), `whole` (experts of all --layers of a
model of which the checkpoint holds a few layers) and `torn`, which ends the server.
OUT is written after each step; the exit code is 1 if anything was wrong.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import click

from hopper_moe.eval.serving_bench.refresh_steps import SCORED, STEPS, USUAL, Lost, Run, bits
from hopper_moe.eval.serving_bench.trainer_calls import WeightCalls
from hopper_moe.kernels.benchmarks.options import RefusingCommand, commit_option
from hopper_moe.quantization.errors import Refusal

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


main = click.Group(help=__doc__)


@main.command(cls=RefusingCommand)
@click.argument("url")
@click.argument("out", type=click.Path(path_type=Path))
def record(url: str, out: Path) -> None:
    """Write what the server at URL answers to OUT."""
    out.write_text(json.dumps(bits(url)) + "\n")
    click.echo(f"{SCORED} log probabilities and a greedy answer in {out}")


def chosen(text: str) -> list[str]:
    """The steps of a text such as same,other."""
    names = text.split(",")
    if unknown := [name for name in names if name not in STEPS]:
        raise Refusal(f"--steps has {unknown[0]!r}, which is no step: choose from {', '.join(STEPS)}.")
    return names


def run_steps(run: Run, names: list[str], facts: dict[str, Any], out: Path) -> list[str]:
    """One line for each step, and `out` written after it. Returns all problems; a step that cannot go on is one."""
    results: dict[str, Any] = {**facts, "steps": {}}
    problems: list[str] = []
    is_lost = False
    for name in names:
        started = time.monotonic()
        found: dict[str, Any] = {"problems": ["not run, the server is lost"]}
        try:
            found = found if is_lost else STEPS[name](run)
        except Refusal as refusal:
            found, is_lost = {"problems": [str(refusal)]}, isinstance(refusal, Lost)
        found["step_seconds"] = round(time.monotonic() - started, 1)
        results["steps"][name] = found
        out.write_text(json.dumps(results, indent=1) + "\n")
        problems += [f"{name}: {problem}" for problem in found["problems"]]
        click.echo(f"{name}: {'; '.join(found['problems']) or 'nothing wrong'} ({found['step_seconds']} s)")
    return problems


@main.command(cls=RefusingCommand)
@click.argument("url")
@click.argument("same", type=_FOLDER)
@click.option("--other", type=_FOLDER, help="A checkpoint of the same shapes with other weights.")
@click.option("--other-answers", type=_FILE, help="What `record` wrote of a server started with it.")
@click.option("--steps", default=",".join(USUAL), show_default=True)
@click.option("--times", default=20, show_default=True, type=click.IntRange(1), help="Refreshes of the step `many`.")
@click.option("--layer", default=2, show_default=True, help="Whose experts are sent alone.")
@click.option("--layers", type=click.IntRange(1), help="Of the server's model, for the step `whole`.")
@click.option("--bucket-mib", default=512, show_default=True, type=click.IntRange(1))
@click.option("--concurrency", default=8, show_default=True, type=click.IntRange(1), help="Of the step `load`.")
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(1), help="The server's --tp-size.")
@click.option(
    "--group-backend",
    type=click.Choice(["nccl", "gloo"]),
    default="nccl",
    show_default=True,
    help="Of the step `distributed`. nccl needs a GPU for this process that the server does not use (CUDA_VISIBLE_DEVICES), "
    "gloo does not.",
)
@click.option("--log", type=_FILE, help="The server's log, to see that no graph is captured again.")
@commit_option
@click.option("--out", required=True, type=click.Path(path_type=Path))
def measure(
    url: str,
    same: Path,
    other: Path | None,
    other_answers: Path | None,
    steps: str,
    times: int,
    layer: int,
    layers: int | None,
    bucket_mib: int,
    concurrency: int,
    ranks: int,
    group_backend: str,
    log: Path | None,
    commit: str,
    out: Path,
) -> None:
    """Refresh the server at URL, which was started with the checkpoint SAME."""
    names = chosen(steps)
    run = Run(
        WeightCalls(url, ranks),
        same.resolve(),
        other.resolve() if other else None,
        json.loads(other_answers.read_text()) if other_answers else None,
        log,
        times,
        layer,
        layers,
        bucket_mib << 20,
        concurrency,
        group_backend,
    )
    _ = run.before  # a server that does not answer is a refusal, not a result
    facts = {"commit": commit, "url": url, "same": str(same), "other": str(other), "bucket_mib": bucket_mib, "ranks": ranks}
    sys.exit(bool(run_steps(run, names, facts, out)))


if __name__ == "__main__":
    main()
