"""The benchmark commands of `hopper-moe eval`, and the function behind them."""

from __future__ import annotations

import math
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import click

BENCHMARKS = {
    "gsm8k": "GSM8K, grade-school maths (1,319 questions; fetched, or --data FILE).",
    "gpqa": "GPQA Diamond, graduate-level multiple choice (fetched from the hub, or --data FILE).",
    "aime25": "AIME 2025 (30 questions, part of sgl-eval).",
    "word_problems": "Our own synthetic one- and two-step problems, held out from the tiny model's training.",
}
ERRORS = 3


class FiniteRange(click.FloatRange):
    """NaN is in no range, but click's comparisons let it pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def run_options(command):
    """The options that say how to ask; shared with `compare --serve`."""
    for option in reversed(
        (
            click.option(
                "--data", type=click.Path(path_type=Path), help="Local questions (JSON Lines: problem, expected_answer, id)."
            ),
            click.option("--num-examples", type=click.IntRange(1), help="Only the first N questions."),
            click.option("--n-repeats", type=click.IntRange(1), help="Answers per question [default: the benchmark's own]."),
            click.option("--temperature", type=FiniteRange(0), default=0.0, show_default=True),
            click.option("--top-p", type=FiniteRange(0, 1, min_open=True), default=0.95, show_default=True),
            click.option(
                "--max-tokens", type=click.IntRange(1), help="Longest answer [default: the server's limit; 64 for word_problems]."
            ),
            click.option(
                "--thinking/--no-thinking", default=None, help="Thinking mode of the chat template [default: the benchmark's]."
            ),
            click.option(
                "--seed", type=int, default=0, show_default=True, help="Every request gets its own seed derived from this."
            ),
            click.option("--no-seed", is_flag=True, help="Send no seeds."),
            click.option("--concurrency", type=click.IntRange(1), default=32, show_default=True, help="Requests in flight."),
            click.option(
                "--tries", type=click.IntRange(1), default=4, show_default=True, help="Tries per question before it is an error."
            ),
        )
    ):
        command = option(command)
    return command


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
        base_url: str, model: str | None, api_key: str, out: Path | None, fresh: bool, allow_errors: float, **how: Any
    ) -> None:
        status, _ = run_benchmark(
            name, base_url, model=model, api_key=api_key, out=out, fresh=fresh, allow_errors=allow_errors, **how
        )
        sys.exit(status)

    return command


def run_benchmark(
    name: str,
    base_url: str,
    *,
    model: str | None = None,
    api_key: str = "EMPTY",
    out: Path | None = None,
    fresh: bool = False,
    allow_errors: float = 0.0,
    data: Path | None = None,
    num_examples: int | None = None,
    n_repeats: int | None = None,
    temperature: float = 0.0,
    top_p: float = 0.95,
    max_tokens: int | None = None,
    thinking: bool | None = None,
    seed: int = 0,
    no_seed: bool = False,
    concurrency: int = 32,
    tries: int = 4,
    recorded_url: str | None = None,
    checkpoint: str | None = None,
) -> tuple[int, Path]:
    """One run, printed: (exit code, run folder). Call from the main thread. Raises `Refusal` before the first question is asked.

    `recorded_url` stands for `base_url` in the settings when the address is no part of the run's identity (a server of our
    own); `checkpoint` says then what was served (`serving.fingerprint`).
    """
    from hopper_moe.eval import benchmarks, run
    from hopper_moe.eval.sampler import Sampler
    from hopper_moe.eval.summary import format_summary

    benchmark = benchmarks.load(name, data, num_examples)
    options = run.Options(
        n_repeats=n_repeats or benchmark.default_n_repeats,
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens or benchmark.default_max_tokens,
        thinking=benchmark.default_thinking if thinking is None else thinking,
        seed=None if no_seed else seed,
    )
    if options.n_repeats > 1 and temperature == 0:
        click.echo(
            f"note: temperature 0 makes all {options.n_repeats} repeats of a question the same; --temperature 1 varies them",
            err=True,
        )
    sampler = Sampler(base_url, model, api_key, tries)
    settings = run.run_settings(benchmark, options, base_url, sampler, recorded_url, checkpoint)
    out = out or run.default_directory(settings)
    with closing(run.claim_directory(out)):
        run.open_directory(out, settings, fresh)
        status, metrics = run.evaluate(benchmark, sampler, options, settings, out, concurrency)
    if metrics is None:
        return status, out
    click.echo(format_summary(name, metrics))
    click.echo(f"records: {out}/records.jsonl   metrics: {out}/metrics.json")
    if metrics["error_rate"] > allow_errors:
        click.echo(f"{metrics['errors']} requests got no answer, the last because of {sampler.last_error}", err=True)
        click.echo("run the same command again to ask only these", err=True)
        return ERRORS, out
    return 0, out
