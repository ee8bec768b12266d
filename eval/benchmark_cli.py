"""The benchmark commands of `hopper-moe eval`, and the function behind them."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hopper_moe.eval.asking import Asking, FiniteRange, run_options
from hopper_moe.quantization.errors import Refusal

if TYPE_CHECKING:
    from hopper_moe.eval.benchmarks import Benchmark
    from hopper_moe.eval.run import Options

BENCHMARKS = {
    "gsm8k": "GSM8K, grade-school maths (1,319 questions; fetched, or --data FILE).",
    "gpqa": "GPQA Diamond, graduate-level multiple choice (fetched from the hub, or --data FILE).",
    "aime25": "AIME 2025 (30 questions, part of sgl-eval).",
    "word_problems": "Our own synthetic one- and two-step problems, held out from the tiny model's training.",
}
ERRORS = 3


def benchmark_command(name: str) -> click.Command:
    """The click command of one benchmark."""

    @click.command(name, help=BENCHMARKS[name], short_help=BENCHMARKS[name])
    @click.option("--base-url", default="http://127.0.0.1:30000/v1", show_default=True)
    @click.option("--model", help="Served model name [default: the first the server lists].")
    @click.option("--api-key", default="EMPTY", envvar="OPENAI_API_KEY")
    @click.option(
        "--out", type=click.Path(path_type=Path), help="Run folder [default: eval-runs/NAME, the same for the same settings]."
    )
    @click.option("--fresh", is_flag=True, help="Throw away what the run folder holds and ask everything again.")
    @click.option(
        "--allow-errors", type=FiniteRange(0, 1), default=0.0, show_default=True, help="Largest error rate with exit code 0."
    )
    @run_options
    def command(
        base_url: str, model: str | None, api_key: str, out: Path | None, fresh: bool, allow_errors: float, **asking: Any
    ) -> None:
        status, _ = run_benchmark(
            name, base_url, Asking(**asking), model=model, api_key=api_key, out=out, fresh=fresh, allow_errors=allow_errors
        )
        sys.exit(status)

    return command


def run_benchmark(
    name: str,
    base_url: str,
    how: Asking,
    *,
    model: str | None = None,
    api_key: str = "EMPTY",
    out: Path | None = None,
    fresh: bool = False,
    allow_errors: float = 0.0,
    recorded_url: str | None = None,
    checkpoint: str | None = None,
) -> tuple[int, Path]:
    """One run, printed: (exit code, run folder). Call from the main thread. Raises `Refusal` before the first question is asked.

    `recorded_url` stands for `base_url` in the settings when the address is no part of the run's identity (a server of our
    own); `checkpoint` says then what was served (`serving.fingerprint`).
    """
    from hopper_moe.eval import benchmarks, run
    from hopper_moe.eval.sampler import Sampler

    benchmark = benchmarks.load(name, how.data, how.num_examples)
    options = _options(benchmark, how)
    sampler = Sampler(base_url, model, api_key, how.tries, how.timeout)
    settings = run.run_settings(benchmark, options, base_url, sampler, recorded_url, checkpoint)
    out = out or run.default_directory(settings)
    with closing(run.claim_directory(out)):
        try:
            run.open_directory(out, settings, fresh)
            status, metrics = run.evaluate(benchmark, sampler, options, settings, out, how.concurrency)
        except OSError as error:
            raise Refusal(
                f"{error.filename or out} cannot be used ({error.strerror}): free some space or give another --out; the same "
                "command carries on."
            ) from error
    if metrics is None:
        return status, out
    _print_summary(name, metrics, out)
    if metrics["error_rate"] > allow_errors:
        click.echo(f"{metrics['errors']} requests got no answer, the last because {sampler.last_error}", err=True)
        click.echo("run the same command again to ask only these", err=True)
        return ERRORS, out
    return 0, out


def _options(benchmark: Benchmark, how: Asking) -> Options:
    """What was asked for, with the benchmark's own defaults filled in; notes what cannot have the effect it is meant for."""
    from hopper_moe.eval.run import Options

    options = Options(
        n_repeats=how.n_repeats or benchmark.default_n_repeats,
        temperature=how.temperature,
        top_p=how.top_p,
        max_tokens=how.max_tokens or benchmark.default_max_tokens,
        thinking=bool(how.thinking),
        seed=None if how.no_seed else how.seed,
        extra_body=how.beyond_openai,
    )
    if options.n_repeats > 1 and options.temperature == 0:
        click.echo(
            f"note: temperature 0 makes all {options.n_repeats} repeats of a question the same; --temperature 1 varies them",
            err=True,
        )
    if how.thinking is None and benchmark.default_thinking:
        click.echo(
            f"note: {benchmark.name} is meant for thinking mode; --thinking asks for it, where the server knows that field",
            err=True,
        )
    return options


def _print_summary(name: str, metrics: dict[str, Any], out: Path) -> None:
    from hopper_moe.eval.summary import format_summary, reasoning_hint

    click.echo(format_summary(name, metrics))
    if hint := reasoning_hint(metrics):
        click.echo(hint, err=True)
    click.echo(f"records: {out}/records.jsonl   metrics: {out}/metrics.json")
