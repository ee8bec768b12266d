"""The kernels and everything that other modules look up by kernel name, best first. Plain data: imports no torch, no SGLang."""

from __future__ import annotations

from dataclasses import dataclass

from hopper_moe.kernels.device import SM90
from hopper_moe.quantization.layout import DIM_MULTIPLE, MAX_TOP_K

EXCHANGE_OPTIONS = frozenset({"fp8_combine", "fp4_dispatch"})


@dataclass(frozen=True)
class KernelSpec:
    """One kernel and its requirements. `factory` is "module:callable", called without arguments."""

    name: str
    label: str  # for tables
    summary: str
    factory: str
    expert_dtype: str  # "fp4" or "fp8": the checkpoint's expert weights
    definition: str  # the function of kernels/reference.py that it computes, which the self-check compares it with
    capability: tuple[int, int] | None = None  # exact compute capability; None: any device, CPU included
    size_multiple: int = DIM_MULTIPLE  # of hidden_size and intermediate_size
    max_top_k: int = MAX_TOP_K
    capturable: bool = True  # can run inside a CUDA graph
    batch_invariant: bool = True  # a token's result has the same bits in every batch
    multi_rank: bool = False  # its runner is an `ExchangingRunner`: it moves tokens between ranks itself; else SGLang does
    package: str | None = None  # a package that is not among our own requirements
    library: str | None = None  # of kernels/jit.py: the fused kernel's, which takes a workspace (an exchange buffer across ranks)
    options: frozenset[str] = frozenset()  # optional settings it implements: fp8_combine, fp4_dispatch


SPECS = (
    KernelSpec(
        "mxfp4_mega",
        "mxfp4_mega (fused kernel)",
        "FP4 experts, one fused kernel: dispatch, both GEMMs, SwiGLU and combine, across the ranks of a host",
        "hopper_moe.moe_backends.runners.mxfp4_mega:create",
        "fp4",
        "moe_layer",
        SM90,
        multi_rank=True,
        library="mxfp4_mega",
        options=EXCHANGE_OPTIONS,
    ),
    KernelSpec(
        "fp8_mega",
        "fp8_mega (fused kernel)",
        "FP8 experts, the same fused kernel",
        "hopper_moe.moe_backends.runners.fp8_mega:create",
        "fp8",
        "moe_layer",
        SM90,
        multi_rank=True,
        library="fp8_mega",
        options=EXCHANGE_OPTIONS,
    ),
    KernelSpec(
        "w4a16",
        "w4a16 (no activation quantisation)",
        "FP4 experts, BF16 activations: FlashInfer's mixed-input kernel",
        "hopper_moe.moe_backends.runners.w4a16:create",
        "fp4",
        "w4a16",
        SM90,
        batch_invariant=False,
        package="flashinfer",
    ),
    KernelSpec(
        "reference",
        "reference (W4A8)",
        "FP4 experts in plain torch, FP64 sums: any device, slow, what the kernels are checked against",
        "hopper_moe.moe_backends.runners.reference:create",
        "fp4",
        "moe_layer",
        multi_rank=True,
        capturable=False,
        options=EXCHANGE_OPTIONS,
    ),
)
REGISTRY: dict[str, KernelSpec] = {spec.name: spec for spec in SPECS}
KERNELS = tuple(REGISTRY)
"""Names, best first: the order in which `auto` tries them."""
REFERENCE = "reference"
