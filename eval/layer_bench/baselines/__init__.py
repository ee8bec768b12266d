"""Kernels of other projects behind `ExpertRunner`: for benchmarks and contract tests, never chosen for serving."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hopper_moe.quantization.errors import Refusal

if TYPE_CHECKING:
    from hopper_moe.moe_backends.runner import ExpertRunner


@dataclass(frozen=True)
class Baseline:
    """One kernel: what it is, its module here (with `create()`), the package it comes from, and whether it measures its tiles
    for batches that `create` may be given."""

    name: str
    summary: str
    package: str
    is_tuned: bool = False

    @property
    def missing(self) -> str | None:
        """Why it cannot run here; None: its package is installed."""
        return None if importlib.util.find_spec(self.package) else f"{self.package} is not installed"


_ALL = (  # in brackets: the value of --moe-runner-backend
    Baseline("marlin", "SGLang's Marlin: FP4 experts, BF16 activations (`marlin`)", "sglang"),
    Baseline("flashinfer_mxfp4", "FlashInfer: FP4 experts, BF16 activations (`flashinfer_mxfp4`)", "flashinfer", is_tuned=True),
    Baseline(
        "flashinfer_mxfp4_fp8",
        "the same with FP8 activations (`--flashinfer-mxfp4-moe-precision fp8`)",
        "flashinfer",
        is_tuned=True,
    ),
    Baseline("humming", "Humming: FP4 experts, BF16 activations (`humming`)", "humming"),
    Baseline("deep_gemm_mega", "DeepGEMM's FP8 MegaMoE, FP4 experts expanded to 128 x 128 block FP8", "deep_gemm"),
)
BASELINES: dict[str, Baseline] = {baseline.name: baseline for baseline in _ALL}


def create_baseline(name: str, sizes: tuple[int, ...] | None = None) -> ExpertRunner:
    """A new runner of a baseline for one layer. Raises `Refusal` when there is none of that name or its package is missing.

    `sizes`: batches for which it shall measure its tiles, if it does; None: those it chooses.
    """
    if name not in BASELINES:
        raise Refusal(f"{name!r} is not a baseline: use one of {', '.join(BASELINES)}.")
    if reason := BASELINES[name].missing:
        raise Refusal(f"{name}: {reason}; leave it out or install it.")
    module = importlib.import_module(f"hopper_moe.eval.layer_bench.baselines.{name}")
    return module.create(sizes) if BASELINES[name].is_tuned else module.create()
