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
WEIGHT_BITS = {"fp4": 4, "fp8": 8}


def compile_to(output: Path, weights: str, csrc: Path = jit.SOURCE_DIR, *options: str) -> str:
    """Builds the benchmark with the loops of `csrc`; returns what the compiler said. Raises RuntimeError with its words if it
    fails. Needs nvcc, no GPU."""
    flags = (*jit.FLAGS, f"-I{csrc}", *jit.include_flags(), f"-DHM_WEIGHT_BITS={WEIGHT_BITS[weights]}", *options)
    done = subprocess.run([str(jit.find_nvcc()), *flags, "-o", str(output), str(SOURCE)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc could not compile {SOURCE.name}:\n{done.stderr[-4000:]}")
    return done.stderr


@click.command()
@click.option("--weights", type=click.Choice(list(WEIGHT_BITS)), default="fp4", show_default=True, help="Which loop.")
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
        click.echo(f"{parts:>12} {product} {cycles:>17} {share:>26} {float(clock):5.2f}")


if __name__ == "__main__":
    main()
