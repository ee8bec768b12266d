"""Kernel `fp8_mega`: the fused CUDA kernel on this rank's experts, weights block-scaled E4M3."""

from __future__ import annotations

from hopper_moe.moe_backends.runners.mxfp4_mega import Mxfp4MegaRunner
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts


class Fp8MegaRunner(Mxfp4MegaRunner):
    """`ExpertRunner` over `hopper_moe.kernels.mega_moe` with FP8 weights: of the checkpoint, or its FP4 ones expanded at load."""

    name = "fp8_mega"
    experts_type = PackedFp8Experts


def create() -> Fp8MegaRunner:
    """A runner for one layer."""
    return Fp8MegaRunner()
