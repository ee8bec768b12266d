"""Baseline `flashinfer_mxfp4_fp8`: FlashInfer with FP8 activations, `--flashinfer-mxfp4-moe-precision fp8`."""

from __future__ import annotations

from hopper_moe.eval.layer_bench.baselines.flashinfer_mxfp4 import FlashInferMxfp4Runner


def create() -> FlashInferMxfp4Runner:
    """A runner for one layer."""
    return FlashInferMxfp4Runner(precision="fp8")
