"""Command `hopper-moe`. Sub-commands are imported only when they run, so that help costs no torch import."""

from __future__ import annotations

import importlib

import click

from hopper_moe.moe_backends.errors import Refusal

# name -> (module:attribute of a click command, one line for the help page)
COMMANDS = {
    "serve": ("hopper_moe.launch.serve:serve", "Serve a model: stock SGLang on Hopper, an embedded host on a CPU machine."),
    "demo": (
        "hopper_moe.launch.demo:demo",
        "Serve a small FP4 checkpoint of this package (or yours), ask it, evaluate it, print the table.",
    ),
    "doctor": ("hopper_moe.launch.doctor:doctor", "Say what works on this machine, and for MODEL, line by line."),
    "env": ("hopper_moe.launch.env_report:env", "Print every environment variable, its value, and where that came from."),
    "eval": ("hopper_moe.eval.cli:main", "Evaluate a served model over its OpenAI endpoints."),
    "checkpoint": ("hopper_moe.quantization.cli:main", "Look into a checkpoint without loading it."),
    "kernels": ("hopper_moe.kernels.build:main", "Build, list and tabulate the compiled kernels."),
    "bench": ("hopper_moe.kernels.benchmarks.cli:main", "Time every kernel on one layer, and measure how exact each is."),
}


class LazyGroup(click.Group):
    """A group whose commands live in other modules; `Refusal` and `OSError` become one line on stderr and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click ends quietly: the reader of a pipe has seen enough
            raise
        except (Refusal, OSError) as refusal:
            click.echo(f"hopper-moe: {refusal}", err=True)
            ctx.exit(2)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sglang-hopper-moe", prog_name="hopper-moe")
def main() -> None:
    """DeepSeek-V4 FP4 experts on NVIDIA Hopper, inside stock SGLang."""
