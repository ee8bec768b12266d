"""How a benchmark's questions are asked: the settings and their options, of `hopper-moe eval` and of `compare --serve`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True)
class Asking:
    """One field per option of `run_options`, which documents it. None: the default of the benchmark or of the server."""

    data: Path | None = None
    num_examples: int | None = None
    n_repeats: int | None = None
    temperature: float = 0.0
    top_p: float = 0.95
    max_tokens: int | None = None
    thinking: bool | None = None
    seed: int = 0
    no_seed: bool = False
    min_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    timeout: float = 14400.0
    concurrency: int = 32
    tries: int = 4

    @property
    def beyond_openai(self) -> dict[str, float] | None:
        """Request fields that OpenAI's protocol does not have; None when none was given."""
        fields = {"min_p": self.min_p, "top_k": self.top_k, "repetition_penalty": self.repetition_penalty}
        return {name: value for name, value in fields.items() if value is not None} or None


class FiniteRange(click.FloatRange):
    """NaN is in no range, but click's comparisons let it pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


_OPTIONS = (
    click.option("--data", type=click.Path(path_type=Path), help="Local questions (JSON Lines: problem, expected_answer, id)."),
    click.option("--num-examples", type=click.IntRange(1), help="Only the first N questions."),
    click.option("--n-repeats", type=click.IntRange(1), help="Answers per question [default: the benchmark's own]."),
    click.option("--temperature", type=FiniteRange(0), default=Asking.temperature, show_default=True),
    click.option("--top-p", type=FiniteRange(0, 1, min_open=True), default=Asking.top_p, show_default=True),
    click.option(
        "--max-tokens", type=click.IntRange(1), help="Longest answer [default: the server's limit; 64 for word_problems]."
    ),
    click.option(
        "--thinking/--no-thinking",
        default=None,
        help="Thinking mode of the chat template, a field beyond OpenAI's protocol [default: not sent].",
    ),
    click.option(
        "--seed",
        type=int,
        default=Asking.seed,
        show_default=True,
        help="Every request gets its own seed derived from this.",
    ),
    click.option("--no-seed", is_flag=True, help="Send no seeds."),
    click.option("--min-p", type=FiniteRange(0, 1), help="Beyond OpenAI's protocol: sent only when given."),
    click.option("--top-k", type=int, help="Beyond OpenAI's protocol: sent only when given."),
    click.option("--repetition-penalty", type=FiniteRange(0), help="Beyond OpenAI's protocol: sent only when given."),
    click.option(
        "--timeout",
        type=FiniteRange(0, min_open=True),
        default=Asking.timeout,
        show_default=True,
        help="Seconds for one answer, from asking to its last byte.",
    ),
    click.option(
        "--concurrency", type=click.IntRange(1), default=Asking.concurrency, show_default=True, help="Requests in flight."
    ),
    click.option(
        "--tries",
        type=click.IntRange(1),
        default=Asking.tries,
        show_default=True,
        help="Tries per question before it is an error.",
    ),
)


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `Asking` to a command, which takes them as keywords."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
