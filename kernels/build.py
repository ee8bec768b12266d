"""`hopper-moe kernels`: compile ahead of serving, see what the cache holds, see which tiles run where."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from tqdm import tqdm

from hopper_moe.kernels import jit
from hopper_moe.kernels.tile_table import TABLES

FLASHINFER = "flashinfer"
"""The library of kernel w4a16, which FlashInfer compiles and keeps in its own cache."""


@dataclass(frozen=True)
class Buildable:
    """Where a library is, or would be, and how to make it so; both return the path."""

    path: Callable[[], Path]
    build: Callable[[], Path]


def buildable() -> dict[str, Buildable]:
    """Every library that can be compiled here: our own, and FlashInfer's where it is installed."""
    found = {
        name: Buildable(lambda library=library: jit.library_path(library), lambda name=name: jit.build(name))
        for name, library in jit.LIBRARIES.items()
    }
    if importlib.util.find_spec(FLASHINFER):
        from hopper_moe.kernels import w4a16

        found[FLASHINFER] = Buildable(w4a16.library_path, w4a16.build)
    return found


@click.group()
def main() -> None:
    """Build, list and tabulate the compiled kernels."""


@main.command()
@click.argument("names", nargs=-1, type=click.Choice([*jit.LIBRARIES, FLASHINFER]))
def build(names: tuple[str, ...]) -> None:
    """Compile the libraries NAMES, or all that can be compiled here, ahead of serving. Needs nvcc, no GPU.

    Ours go to HOPPER_MOE_CACHE_DIR and take a minute or two. `flashinfer` is the library of kernel w4a16: FlashInfer keeps it in
    its own cache, and compiling takes it about an hour of one core.
    """
    libraries = buildable()
    with tqdm(names or libraries, unit="library") as progress:
        for name in progress:
            if name not in libraries:
                raise click.UsageError(f"{name} is not installed here: pip install 'sglang-hopper-moe[sglang]'.")
            progress.set_description(f"compiling {name}")
            started, cached = time.monotonic(), libraries[name].path().exists()
            path = libraries[name].build()
            progress.write(f"{name}: {path} ({'was there' if cached else f'compiled in {time.monotonic() - started:.0f} s'})")


@main.command("list")
def list_libraries() -> None:
    """Show where each kernel library is, or would be, for exactly these sources, flags and compiler."""
    for name, library in buildable().items():
        path = library.path()
        click.echo(f"{name}: {path} ({f'{path.stat().st_size / 1024:.0f} KiB' if path.exists() else 'not compiled'})")


@main.command()
def table() -> None:
    """Print the token tiles of every known GPU."""
    for sku, tiles in TABLES.items():
        click.echo(f"{sku}: {tiles}")
