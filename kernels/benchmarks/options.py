"""What the benchmark commands share on their command lines."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import click

from hopper_moe.quantization.errors import Refusal

T = TypeVar("T")


def current_commit() -> str:
    """Short hash of the checkout this file is in; "unknown" outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


commit_option = click.option(
    "--commit",
    callback=lambda context, option, value: current_commit() if value is None else value,
    help="What to note as the commit.  [default: of this checkout]",
)
"""What was measured, beside the numbers; a command gets it as `commit: str`."""


class RefusingCommand(click.Command):
    """A `Refusal` becomes one line on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except Refusal as refusal:
            click.echo(refusal, err=True)
            ctx.exit(2)


class ListCommand(RefusingCommand):
    """Takes `--tokens 1 8 64` and `--kernels a b` as well as the options repeated."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for option in ("--tokens", "--kernels"):
            args = take_lists(args, option)
        return super().parse_args(ctx, args)


def take_lists(arguments: Sequence[str], option: str) -> list[str]:
    """`--tokens 1 8 64` as click's `--tokens 1 --tokens 8 --tokens 64`."""
    spread: list[str] = []
    inside = False
    for argument in arguments:
        if argument == option:
            inside = True
        elif inside and not argument.startswith("-"):
            spread += [option, argument]
        else:
            inside = False
            spread.append(argument)
    return spread


def numbers(option: str, text: str) -> list[int]:
    """The positive numbers of a text such as 8,64."""
    return _listed(option, text, lambda part: part.isdecimal() and int(part) > 0, int, "positive numbers", "8,64")


def counts(option: str, text: str) -> list[int]:
    """The numbers of a text such as 0,16,64."""
    return _listed(option, text, str.isdecimal, int, "whole numbers from 0", "0,16,64")


def decimals(option: str, text: str) -> list[float]:
    """The positive numbers of a text such as 1.0,1.2."""
    return _listed(option, text, lambda part: 0 < float(part) < math.inf, float, "positive numbers", "1.0,1.2")


def _listed(option: str, text: str, accepts: Callable[[str], bool], read: Callable[[str], T], what: str, example: str) -> list[T]:
    """Raises Refusal for a part that `accepts` does not take, or cannot read (ValueError)."""
    parts = text.split(",")
    try:
        is_good = all(map(accepts, parts))
    except ValueError:
        is_good = False
    if not is_good:
        raise Refusal(f"{option} {text!r} is not a list of {what}: write it as {example}.")
    return [read(part) for part in parts]
