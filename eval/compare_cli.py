"""`hopper-moe eval compare`: two finished runs, or one model served with several kernels by this command itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from hopper_moe.eval.asking import Asking, FiniteRange, run_options
from hopper_moe.eval.benchmark_cli import BENCHMARKS, run_benchmark
from hopper_moe.quantization.errors import Refusal

EXIT_CODES = {"same": 0, "better": 0, "worse": 5, "undecided": 6}


@click.command("compare", short_help="Paired comparison of two runs, or of kernels serving one model.")
@click.argument("runs", nargs=-1, type=click.Path(path_type=Path), metavar="[A B]")
@click.option("--margin", type=FiniteRange(0, 100), default=1.0, show_default=True, help="Percentage points that do not matter.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Report folder [default: B/compare, with --serve eval-runs/compare]."
)
@click.option("--allow-errors", type=FiniteRange(0, 1), default=0.0, show_default=True, help="Largest error rate of a run.")
@click.option("--serve", "model", help="Serve this model once per kernel and run both sides here.")
@click.option("--kernels", help="Comma-separated; every other one is compared with the first.")
@click.option(
    "--benchmark", type=click.Choice(list(BENCHMARKS)), default="word_problems", show_default=True, help="With --serve."
)
@click.option("--fresh", is_flag=True, help="With --serve: ask everything again.")
@run_options
def compare(
    runs: tuple[Path, ...],
    margin: float,
    out: Path | None,
    allow_errors: float,
    model: str | None,
    kernels: str | None,
    benchmark: str,
    fresh: bool,
    **asking: Any,
) -> None:
    """Is run B as good as run A? Same questions, paired: difference with 95 % interval, p-value, flipped questions, verdict.

    \b
    hopper-moe eval compare eval-runs/A eval-runs/B --margin 1
    hopper-moe eval compare --serve MODEL --kernels reference,w4a16

    Exit code 0: same within the margin, or better; 5: worse; 6: undecided (more questions are needed); 3: requests failed.
    """
    if model is None:
        if len(runs) != 2 or kernels:
            raise Refusal(f"{len(runs)} run folders given: compare takes two, A and B, or --serve MODEL with --kernels.")
        verdicts = [compare_folders(runs[0], runs[1], margin / 100, out or runs[1] / "compare", allow_errors)]
    else:
        names = [name.strip() for name in (kernels or "").split(",") if name.strip()]
        if len(names) < 2 or len(set(names)) != len(names) or runs:
            raise Refusal(
                f"--serve with kernels {kernels!r} and {len(runs)} folders: give no folder and two different --kernels or more."
            )
        verdicts = _serve_and_compare(
            model, names, benchmark, margin / 100, out or Path("eval-runs/compare"), allow_errors, fresh, Asking(**asking)
        )
    sys.exit(max(EXIT_CODES[verdict] for verdict in verdicts))


def compare_folders(a: Path, b: Path, margin: float, out: Path, allow_errors: float = 0.0) -> str:
    """Compare two run folders, write the report into `out`, print one line, return the verdict."""
    from hopper_moe.eval import paired, report

    run_a, run_b = paired.load_run(a), paired.load_run(b)
    for run in (run_a, run_b):
        if run.metrics["error_rate"] > allow_errors:
            raise Refusal(
                f"{run.folder}: {run.metrics['error_rate']:.2%} of its answers are missing, above --allow-errors {allow_errors}: "
                "repeat its command to ask only these."
            )
    result = paired.compare(run_a, run_b, margin)
    report.write_report(result, run_a, run_b, out)
    click.echo(report.one_line(result))
    click.echo(f"report: {out}/report.md and report.png")
    return result["verdict"]


def _serve_and_compare(
    model: str,
    kernels: list[str],
    benchmark: str,
    margin: float,
    out: Path,
    allow_errors: float,
    fresh: bool,
    how: Asking,
) -> list[str]:
    from hopper_moe.eval.serving import fingerprint, served, server_command

    for kernel in kernels:
        server_command(model, kernel, 0)  # refuses a kernel of the wrong machine before the first one is served
    folders = {kernel: out / kernel for kernel in kernels}
    for kernel, folder in folders.items():
        with served(model, kernel, out / f"server-{kernel}.log") as base_url:
            status, _ = run_benchmark(
                benchmark,
                base_url,
                how,
                out=folder,
                fresh=fresh,
                allow_errors=allow_errors,
                recorded_url="own",
                checkpoint=fingerprint(model),
            )
        if status:
            sys.exit(status)
    first = kernels[0]
    return [compare_folders(folders[first], folders[k], margin, out / f"{k}-against-{first}", allow_errors) for k in kernels[1:]]
