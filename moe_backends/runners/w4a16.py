"""Kernel `w4a16`: FlashInfer's mixed-input kernel on this rank's experts, activations in BF16."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from hopper_moe.quantization.packing_w4a16 import InterleavedExperts

if TYPE_CHECKING:
    from hopper_moe.kernels.w4a16 import W4A16
    from hopper_moe.moe_backends.base import ExpertShard


@functools.cache
def _kernel(shard: ExpertShard, fused_finalize: bool, device: torch.device) -> W4A16:
    """One kernel object for all layers of the same shape."""
    from hopper_moe.kernels.w4a16 import W4A16

    return W4A16(
        num_tokens_capacity=shard.max_tokens_per_rank,
        hidden_size=shard.hidden_size,
        intermediate_size=shard.intermediate_size,
        num_experts=shard.num_experts,
        top_k=shard.top_k,
        num_local_experts=shard.num_local_experts,
        first_expert=shard.first_expert,
        swiglu_limit=shard.swiglu_limit,
        fused_finalize=fused_finalize,
        device=device,
    )


class W4A16Runner:
    """`ExpertRunner` over `hopper_moe.kernels.w4a16`, whose `fused_finalize` is for comparison."""

    experts_type = InterleavedExperts

    def __init__(self, fused_finalize: bool = False) -> None:
        self._fused_finalize = fused_finalize

    def prepare(self, experts: InterleavedExperts, shard: ExpertShard) -> None:
        """See `ExpertRunner.prepare`. The first layer of a shape lets FlashInfer measure its tiles (20 to 30 s)."""
        self._experts = experts
        self._kernel = _kernel(shard, self._fused_finalize, experts.device)
        self._kernel.tune(experts)

    def run(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """See `ExpertRunner.run`."""
        return self._kernel(hidden_states.contiguous(), topk_ids.contiguous(), topk_weights.contiguous(), self._experts)


def create() -> W4A16Runner:
    """A runner for one layer."""
    return W4A16Runner()
