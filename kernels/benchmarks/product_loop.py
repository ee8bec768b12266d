"""How fast the math warps' product loop is alone: `python -m hopper_moe.kernels.benchmarks.product_loop [--csrc OTHER/csrc]`.

What a change to `mainloop_fp4.cuh` or `mainloop_fp8.cuh` gives can be seen here in a second, without the kernel around it; in
the kernel, dispatch, epilogue and combine cost the loop another tenth.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import click

from hopper_moe.kernels import jit

SOURCE = Path(__file__).with_suffix(".cu")
TENSOR_CYCLES = 512  # of a chunk: 2 * 128**3 operations, 8192 a clock and SM
LIBRARY_OF = {"fp4": "mxfp4_mega", "fp4_wide": "mxfp4_wide", "fp8": "fp8_mega"}  # whose loop it is


def compile_to(output: Path, weights: str, csrc: Path = jit.SOURCE_DIR, *options: str) -> str:
    """Builds the benchmark with the loops of `csrc`; see `jit.compile_source`. Needs nvcc, no GPU."""
    return jit.compile_source(SOURCE, output, *jit.LIBRARIES[LIBRARY_OF[weights]].defines, *options, csrc=csrc)


@click.command()
@click.option("--weights", type=click.Choice(list(LIBRARY_OF)), default="fp4", show_default=True, help="Which loop.")
@click.option(
    "--csrc", type=click.Path(exists=True, file_okay=False, path_type=Path), default=jit.SOURCE_DIR, help="Other sources."
)
def main(weights: str, csrc: Path) -> None:
    """Cycles per chunk of 128 x 128 x 128, with and without copies, and the copies alone."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "product_loop"
        compile_to(program, weights, csrc.resolve())
        done = subprocess.run([program], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"the benchmark failed: {done.stderr.strip()}")
    click.echo(f"{'':>12}      cycles a chunk   of the tensor cores' peak   GHz")
    for line in done.stdout.splitlines():
        parts, product, cycles, clock = line.split()
        share = "" if parts == "copies" else f"{TENSOR_CYCLES / float(cycles):.0%}"
        click.echo(f"{parts:>12} {product:<8} {cycles:>11} {share:>26} {float(clock):5.2f}")


if __name__ == "__main__":
    main()
