"""Command `hopper-moe`. Sub-commands are imported only when they run, so that help costs no torch import."""

from __future__ import annotations

import io
import sys

import click

from hopper_moe.kernels.home import ensure_home
from hopper_moe.launch.lazy_group import Command, LazyGroup
from hopper_moe.quantization.errors import Refusal

COMMANDS = {
    "serve": Command(
        "hopper_moe.launch.serve:serve", "Serve a model: stock SGLang on Hopper, an embedded host on a CPU machine."
    ),
    "demo": Command(
        "hopper_moe.eval.demo:demo",
        "Serve a small FP4 checkpoint of this package (or yours), ask it, evaluate it, print the table.",
    ),
    "doctor": Command("hopper_moe.launch.doctor:doctor", "Say what works on this machine, and for MODEL, line by line."),
    "env": Command("hopper_moe.launch.env_report:env", "Print every environment variable, its value, and where that came from."),
    "eval": Command("hopper_moe.eval.cli:main", "Evaluate a served model over its OpenAI endpoints."),
    "checkpoint": Command("hopper_moe.launch.checkpoint_cli:main", "Look into a checkpoint without loading it."),
    "kernels": Command("hopper_moe.launch.kernels_cli:main", "Build, list and tabulate the compiled kernels."),
    "bench": Command("hopper_moe.eval.layer_bench.cli:main", "Time every kernel on one layer, and measure how exact each is."),
}


class RefusingGroup(LazyGroup):
    """`Refusal` and `OSError` become one line on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> object:
        _print_anything()
        ensure_home()
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click ends quietly: the reader of a pipe has seen enough
            raise
        except (Refusal, OSError) as refusal:
            click.echo(f"hopper-moe: {refusal}", err=True)
            ctx.exit(2)


def _print_anything() -> None:
    """Names of files and a model's words may hold what the terminal's encoding cannot: shown as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@click.group(cls=RefusingGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sglang-hopper-moe", prog_name="hopper-moe")
def main() -> None:
    """DeepSeek-V4 FP4 experts on NVIDIA Hopper, inside stock SGLang."""
