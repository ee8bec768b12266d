"""Runs the routed experts of a transformers DeepSeek-V4 model through this project's packed weights and reference kernels."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hopper_moe.kernels import reference
from hopper_moe.kernels.reference_weights import PackedSource
from hopper_moe.quantization.checkpoint import Checkpoint
from hopper_moe.quantization.packing import PackedExperts, pack_experts


class DecodedExperts:
    """One layer's packed experts as the `ExpertSource` of the reference kernels, each matrix unpacked and decoded only once.

    Decoding takes longer than the products of a small model; FP64 copies are affordable at sizes that a CPU can serve.
    """

    def __init__(self, packed: PackedExperts) -> None:
        self.packed = packed
        source = PackedSource(packed)
        self.num_experts = packed.num_experts
        self.hidden_size = packed.hidden_size
        self.intermediate_size = packed.intermediate_size
        self.w13 = lru_cache(maxsize=None)(source.w13)
        self.w2 = lru_cache(maxsize=None)(source.w2)


class ExpertsKernel(Protocol):
    """(x [M, H], ids int32 [M, K], weights float32 [M, K], experts, swiglu_limit=...) -> [M, H]."""

    def __call__(
        self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, experts: DecodedExperts, *, swiglu_limit: float
    ) -> torch.Tensor: ...


def reference_kernel(x, topk_ids, topk_weights, experts, *, swiglu_limit) -> torch.Tensor:
    """The fused kernel's definition (W4A8): BF16 tokens quantised to E4M3, BF16 result."""
    return reference.moe_layer(x.to(torch.bfloat16), topk_ids, topk_weights, experts, swiglu_limit=swiglu_limit)


def w4a16_kernel(x, topk_ids, topk_weights, experts, *, swiglu_limit) -> torch.Tensor:
    """FP4 weights, activations kept in the model's own type (FP32 on this host): no activation quantisation."""
    return reference.w4a16(x, topk_ids, topk_weights, experts, swiglu_limit=swiglu_limit)


_FUNCTIONS: dict[str, ExpertsKernel] = {"reference": reference_kernel, "w4a16": w4a16_kernel}


def attach_packed_experts(model, folder: Path) -> None:
    """Pack every layer's experts from the checkpoint's bytes and free the dequantised copies that transformers loaded."""
    checkpoint = Checkpoint.open(folder)
    for index, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        experts.hopper_experts = DecodedExperts(pack_experts(*checkpoint.layer_experts(f"layers.{index}")))
        for name in ("gate_up_proj", "down_proj"):
            getattr(experts, name).data = torch.empty(0)


def use_kernel(model, name: str, kernel: ExpertsKernel | None = None) -> None:
    """Run every expert layer of `model` (packed experts attached) through kernel `name`, or through `kernel` under that name."""
    function = kernel or _FUNCTIONS[name]

    def experts_function(self, hidden_states, top_k_index, top_k_weights):
        y = function(
            hidden_states, top_k_index.to(torch.int32), top_k_weights.float(), self.hopper_experts, swiglu_limit=self.limit
        )
        return y.to(hidden_states.dtype)

    implementation = f"hopper_moe_{name}"
    ALL_EXPERTS_FUNCTIONS[implementation] = experts_function
    model.set_experts_implementation(implementation)
