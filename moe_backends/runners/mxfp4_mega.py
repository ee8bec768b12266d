"""Kernel `mxfp4_mega`: the fused CUDA kernel on this rank's experts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

import torch

from hopper_moe.quantization.packing import PackedExperts

if TYPE_CHECKING:
    from hopper_moe.kernels.mega_moe import MegaMoE
    from hopper_moe.moe_backends.base import ExpertShard
    from hopper_moe.quantization.packing_fp8 import PackedFp8Experts


@functools.cache
def _kernel(
    capacity: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    first_expert: int,
    num_local_experts: int,
    top_k: int,
    device: torch.device,
    weights: type[PackedExperts] | type[PackedFp8Experts],
) -> MegaMoE:
    """One kernel object, and so one workspace, for all layers of the same shape."""
    from hopper_moe.kernels.mega_moe import MegaMoE

    return MegaMoE(
        num_tokens_capacity=capacity,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        first_expert=first_expert,
        num_local_experts=num_local_experts,
        top_k=top_k,
        device=device,
        weights=weights,
    )


class Mxfp4MegaRunner:
    """`ExpertRunner` over `hopper_moe.kernels.mega_moe`."""

    experts_type: ClassVar[type[PackedExperts] | type[PackedFp8Experts]] = PackedExperts

    def prepare(self, experts: PackedExperts | PackedFp8Experts, shard: ExpertShard) -> None:
        """See `ExpertRunner.prepare`. The first layer of a shape compiles the kernel (if it was not before) and takes the
        workspace."""
        self._packed, self._swiglu_limit = experts, shard.swiglu_limit
        self._kernel = _kernel(
            shard.max_tokens_per_rank,
            shard.hidden_size,
            shard.intermediate_size,
            shard.num_experts,
            shard.first_expert,
            shard.num_local_experts,
            shard.top_k,
            experts.device,
            type(experts),
        )

    def run(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """See `ExpertRunner.run`."""
        return self._kernel(
            hidden_states.contiguous(),
            topk_ids.contiguous(),
            topk_weights.contiguous(),
            self._packed,
            swiglu_limit=self._swiglu_limit,
        )

    @property
    def launch_counter(self) -> torch.Tensor:
        """uint8 [4]: little-endian number of launches of this rank's kernel, all layers together, kept by the kernel itself."""
        kernel = self._kernel
        return kernel.workspace[kernel.offsets["epoch"] : kernel.offsets["epoch"] + 4]


def create() -> Mxfp4MegaRunner:
    """A runner for one layer."""
    return Mxfp4MegaRunner()
