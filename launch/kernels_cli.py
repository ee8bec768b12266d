"""`hopper-moe kernels`: compile ahead of serving, list the cache, print the tile tables."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
from tqdm import tqdm

from hopper_moe.kernels import jit
from hopper_moe.kernels.tile_table import tables
from hopper_moe.moe_backends.env import settings
from hopper_moe.quantization.errors import Refusal

FLASHINFER = "flashinfer"
"""The library of kernel w4a16, which FlashInfer compiles and keeps in its own cache."""


@dataclass(frozen=True)
class Buildable:
    """Path of a library, whether or not it exists, and the function that builds it and returns the path."""

    path: Callable[[], Path]
    build: Callable[[], Path]


def buildable() -> dict[str, Buildable]:
    """Every library that can be compiled here: our own, and FlashInfer's where it is installed."""
    cache = settings().cache_dir
    found = {
        name: Buildable(partial(jit.library_path, library, cache), partial(jit.build, name, cache))
        for name, library in jit.LIBRARIES.items()
    }
    if importlib.util.find_spec(FLASHINFER):
        from hopper_moe.kernels import w4a16

        found[FLASHINFER] = Buildable(w4a16.library_path, w4a16.build)
    return found


def _into(folder: Path) -> dict[str, Buildable]:
    """Our libraries, built into another folder than the cache."""
    return {
        name: Buildable(partial(jit.path_in, folder, library), partial(jit.build_into, library, folder))
        for name, library in jit.LIBRARIES.items()
    }


@click.group()
def main() -> None:
    """Build, list and tabulate the compiled kernels."""


@main.command()
@click.argument("names", nargs=-1, type=click.Choice([*jit.LIBRARIES, FLASHINFER]))
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    help="Compile ours into this folder instead, to be copied to machines without nvcc.",
)
def build(names: tuple[str, ...], into: Path | None) -> None:
    """Compile the libraries NAMES, or all that can be compiled here, ahead of serving. Needs nvcc, no GPU.

    Ours go to HOPPER_MOE_CACHE_DIR and take a minute or two. A machine without nvcc serves with a copy of that folder, which may
    be read-only. `flashinfer` is the library of kernel w4a16: FlashInfer keeps it in its own cache, and compiling takes it about
    an hour of one core.
    """
    libraries = buildable() if into is None else _into(into.absolute())
    if into is not None and FLASHINFER in names:
        raise Refusal(
            f"--into {into}: FlashInfer's library stays in FlashInfer's cache, leave {FLASHINFER} out or copy "
            f"{buildable()[FLASHINFER].path().parent.parent} as well."
        )
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
    """Show where each kernel library is, or would be, for exactly these sources and flags."""
    for name, library in buildable().items():
        path = library.path()
        click.echo(f"{name}: {path} ({f'{path.stat().st_size / 1024:.0f} KiB' if path.exists() else 'not compiled'})")


@main.command()
def table() -> None:
    """Print the token tiles of every measured GPU type. Any other GPU uses those of the nearest one."""
    for sku, tiles in tables().items():
        click.echo(f"{sku}: {tiles}")
