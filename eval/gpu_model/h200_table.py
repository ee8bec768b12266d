"""The table of truth of the real kernels: the GPU model in stock SGLang on one Hopper GPU, every kernel against `reference`.

\b
    python -m hopper_moe.eval.gpu_model.h200_table --out DIR [-- SGLANG_ARGUMENTS]

Serves `eval/data/gpu_dsv4` once per kernel and once per sabotaged checkpoint, asks the 1,200 held-out questions, and writes
table and plot into eval/README.md. The servers start together (the model is small, and starting is host time), the
questions are asked one server after the other. Run again with the same DIR, it asks only what is missing.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from hopper_moe.eval.benchmark_cli import run_benchmark
from hopper_moe.eval.benchmarks import DATA
from hopper_moe.eval.compare_cli import compare_folders
from hopper_moe.eval.sabotage import sabotaged_checkpoint, sabotages
from hopper_moe.eval.serving import free_port
from hopper_moe.eval.table_of_truth import MARGIN, markdown, plot, write_table
from hopper_moe.launch.h200.server import Server, serving

MODEL, QUESTIONS = DATA / "gpu_dsv4", DATA / "word_problems_hard.jsonl"
README = DATA.parent / "README.md"
# Small enough for a handful of servers on one GPU; the questions are shorter than 128 tokens.
SGLANG_ARGUMENTS = (
    "--context-length 4096 --mem-fraction-static 0.1 --max-total-tokens 65536 --max-running-requests 64 "
    "--chunked-prefill-size 2048 --mm-feature-transport cpu --watchdog-timeout 3600"
).split()


def start(stack: ExitStack, jobs: dict[str, tuple[Path, str]], out: Path, timeout: float, **how: Any) -> dict[str, Server]:
    """A server for each (name -> checkpoint, kernel), all starting at once; `stack` stops them."""

    def one(name: str) -> Server:
        model, kernel = jobs[name]
        log = out / "servers" / f"{name.replace(' ', '-')}.log"
        context = serving(str(model), kernel=kernel, port=free_port(), log=log, ready_timeout=timeout, **how)
        return stack.enter_context(context)

    with ThreadPoolExecutor(len(jobs)) as pool:
        return dict(zip(jobs, pool.map(one, jobs), strict=True))


def score(server: Server, name: str, sabotage: bool, out: Path, num_examples: int | None, data: Path) -> dict[str, Any]:
    """One row of the table; every row but `reference` is compared with it."""
    folder = out / name.replace(" ", "-")
    status, _ = run_benchmark(
        "word_problems", f"{server.url}/v1", out=folder, num_examples=num_examples, data=data, recorded_url="own", concurrency=64
    )
    if status:
        sys.exit(status)
    metrics = json.loads((folder / "metrics.json").read_text())
    row = {"name": name, "sabotage": sabotage, "accuracy": metrics["pass@1"], "interval95": metrics["interval95"]}
    if name != "reference":
        compare_folders(out / "reference", folder, MARGIN, folder / "compare")
        row |= json.loads((folder / "compare" / "compare.json").read_text())
    return row


@click.command(help=__doc__)
@click.option("--kernels", default="reference,mxfp4_mega,w4a16", show_default=True, help="Comma-separated, reference first.")
@click.option("--model", default=MODEL, type=click.Path(path_type=Path))
@click.option("--data", default=QUESTIONS, type=click.Path(path_type=Path))
@click.option("--sabotage-with", help="Kernel that serves the sabotaged checkpoints  [default: the second of --kernels].")
@click.option("--sabotages/--no-sabotages", "with_sabotages", default=True, show_default=True)
@click.option("--num-examples", type=click.IntRange(1), help="Only the first N questions.")
@click.option("--ready-timeout", default=900.0, show_default=True, help="Seconds until every server must answer.")
@click.option("--readme", default=README, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run folders and server logs.")
@click.argument("sglang_arguments", nargs=-1, type=click.UNPROCESSED)
def main(
    kernels: str,
    model: Path,
    data: Path,
    sabotage_with: str | None,
    with_sabotages: bool,
    num_examples: int | None,
    ready_timeout: float,
    readme: Path,
    out: Path,
    sglang_arguments: tuple[str, ...],
) -> None:
    names = kernels.split(",")
    jobs = {name: (model, name) for name in names}
    wrong = list(sabotages(1.0)) if with_sabotages else []
    for name in wrong:
        folder = out / "checkpoints" / name.replace(" ", "-")
        jobs[name] = (folder if folder.exists() else sabotaged_checkpoint(model, folder, name), sabotage_with or names[1])
    with ExitStack() as stack:
        servers = start(stack, jobs, out, ready_timeout, arguments=(*SGLANG_ARGUMENTS, *sglang_arguments))
        rows = [score(server, name, name in wrong, out, num_examples, data) for name, server in servers.items()]
    table = markdown(rows)
    click.echo(table)
    write_table(readme, "table of truth, H200", table)
    plot(rows, readme.parent / "table_of_truth_h200.png", "GPU model in stock SGLang, one H200")
    bad = [row["name"] for row in rows if "verdict" in row and (row["verdict"] == "worse") != row["sabotage"]]
    if bad:
        raise SystemExit(f"not as it should be: {', '.join(bad)}")


if __name__ == "__main__":
    main()
