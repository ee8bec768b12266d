"""`hopper-moe checkpoint`: look into a checkpoint without loading it."""

from pathlib import Path

import click

from hopper_moe.launch.checkpoint_inspect import inspect_checkpoint, report_lines


@click.group()
def main() -> None:
    """Look into a checkpoint without loading it."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--scales/--no-scales", default=True, help="Read every expert scale (gigabytes for a large model) or headers only.")
def inspect(folder: Path, scales: bool) -> None:
    """Check FOLDER; print its architecture, expert types, shapes, scale statistics, GiB per rank and kernels that can serve it.

    Weights are never read. A damaged or unsuitable checkpoint is refused with one sentence and exit code 2.
    """
    for line in report_lines(inspect_checkpoint(folder, read_scales=scales, progress=scales)):
        click.echo(line)
