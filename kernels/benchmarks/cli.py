"""`hopper-moe bench`: the benchmark commands, each imported when it runs."""

from __future__ import annotations

import importlib

import click

COMMANDS = {
    "backends": "hopper_moe.kernels.benchmarks.backends:main",
    "accuracy": "hopper_moe.kernels.benchmarks.accuracy:main",
    "layer": "hopper_moe.kernels.benchmarks.mega_moe:main",
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name].split(":")
        return getattr(importlib.import_module(module), attribute)


@click.group(cls=_Lazy)
def main() -> None:
    """Time the kernels of one layer and measure how exact they are."""
