"""Baseline `flashinfer_mxfp4_fp8`: FlashInfer with FP8 activations, `--flashinfer-mxfp4-moe-precision fp8`."""

from __future__ import annotations

from hopper_moe.eval.layer_bench.baselines.flashinfer_mxfp4 import FlashInferMxfp4Runner


def create(sizes: tuple[int, ...] | None = None) -> FlashInferMxfp4Runner:
    """A runner for one layer. `sizes`: see the class."""
    return FlashInferMxfp4Runner("fp8", sizes)
