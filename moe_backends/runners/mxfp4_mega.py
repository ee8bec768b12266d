"""Kernel `mxfp4_mega`: the fused CUDA kernel on this rank's experts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hopper_moe.kernels.mega_moe import MegaMoE
    from hopper_moe.moe_backends.base import ExpertShard
    from hopper_moe.quantization.packing import PackedExperts


@functools.cache
def _kernel(capacity: int, hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, device: torch.device) -> MegaMoE:
    """One kernel object, and so one set of buffers, for all layers of the same shape."""
    from hopper_moe.kernels.mega_moe import MegaMoE

    return MegaMoE(
        num_tokens_capacity=capacity,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        top_k=top_k,
        device=device,
    )


class Mxfp4MegaRunner:
    """`ExpertRunner` over `hopper_moe.kernels.mega_moe`."""

    def prepare(self, packed: PackedExperts, shard: ExpertShard) -> None:
        self._packed, self._shard = packed, shard
        self._kernel = _kernel(
            shard.max_tokens_per_rank, shard.hidden_size, shard.intermediate_size, shard.num_local_experts, shard.top_k, packed.device
        )

    def run(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """See `ExpertRunner.run`."""
        shard = self._shard
        if shard.num_local_experts != shard.num_experts:  # the kernel counts the experts it was given from 0
            local = topk_ids - shard.first_expert
            topk_ids = torch.where((topk_ids >= 0) & (local >= 0) & (local < shard.num_local_experts), local, -1)
        return self._kernel(hidden_states, topk_ids, topk_weights, self._packed, swiglu_limit=shard.swiglu_limit, routed_scaling_factor=1.0)


def create() -> Mxfp4MegaRunner:
    """A runner for one layer."""
    return Mxfp4MegaRunner()
