"""What the benchmark commands share on their command lines."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import click

from hopper_moe.quantization.errors import Refusal


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
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise Refusal(f"{option} {text!r} is not a list of positive numbers: write it as 8,64.")
    return [int(part) for part in text.split(",")]
