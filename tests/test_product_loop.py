"""The benchmark of the product loop alone compiles, and ptxas says of its loops what it says of the kernel's."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from hopper_moe.kernels.benchmarks import product_loop
from hopper_moe.quantization.errors import Refusal

NUM_KERNELS = {"fp4": 9, "fp4_wide": 9, "fp8": 6}  # loop, loop and copies, copies; of L1, of pairs (FP4) and of L2
SPILLED = re.compile(r"(\d+) bytes spill stores")


@pytest.mark.parametrize("weights", product_loop.LIBRARY_OF)
def test_its_loops_neither_spill_nor_serialise(weights, tmp_path):
    said = product_loop.compile_to(tmp_path / "loop.cubin", weights, product_loop.jit.SOURCE_DIR, "-cubin", "-Xptxas", "-v")
    spilled = [int(bytes_) for bytes_ in SPILLED.findall(said)]
    assert len(spilled) == NUM_KERNELS[weights], "a kernel for each of the parts and products"
    assert not any(spilled)
    assert "C75" not in said, "ptxas serialises WGMMAs"


def test_sources_that_do_not_compile_are_named(tmp_path):
    with pytest.raises(Refusal, match="could not compile product_loop.cu"):
        product_loop.compile_to(tmp_path / "loop", "fp4", tmp_path, "-DHM_UNIT_ROWS=63")


@pytest.mark.gpu
def test_it_runs(tmp_path):
    done = CliRunner().invoke(product_loop.main, ["--weights", "fp4"])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines()[1:]]
    assert len(rows) == NUM_KERNELS["fp4"]
    assert all(500 < float(cycles) < 5000 for parts, _, cycles, *_ in rows if parts != "copies"), "512 are the tensor cores'"
