"""`hopper-moe kernels`: compile ahead of serving, see what the cache holds, see which tiles run where."""

from __future__ import annotations

import time

import click
from tqdm import tqdm

from hopper_moe.kernels import jit
from hopper_moe.kernels.tile_table import TABLES


@click.group()
def main() -> None:
    """Build, list and tabulate the compiled kernels."""


@main.command()
def build() -> None:
    """Compile every kernel library into the cache (HOPPER_MOE_CACHE_DIR). Needs nvcc, no GPU."""
    with tqdm(jit.LIBRARIES.items(), unit="library") as progress:
        for name, library in progress:
            progress.set_description(f"compiling {name}")
            started, cached = time.monotonic(), jit.library_path(library).exists()
            path = jit.build(name)
            progress.write(f"{name}: {path} ({'was there' if cached else f'compiled in {time.monotonic() - started:.0f} s'})")


@main.command("list")
def list_libraries() -> None:
    """Show where each kernel library is, or would be, for exactly these sources, flags and compiler."""
    for name, library in jit.LIBRARIES.items():
        path = jit.library_path(library)
        click.echo(f"{name}: {path} ({f'{path.stat().st_size / 1024:.0f} KiB' if path.exists() else 'not compiled'})")


@main.command()
def table() -> None:
    """Print the token tiles of every known GPU."""
    for sku, tiles in TABLES.items():
        click.echo(f"{sku}: {tiles}")
