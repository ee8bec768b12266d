"""Kernel `w4a16`: FlashInfer's mixed-input kernel on this rank's experts, activations in BF16."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

from hopper_moe.quantization.packing_w4a16 import InterleavedExperts

if TYPE_CHECKING:
    from hopper_moe.kernels.shard import ExpertShard
    from hopper_moe.kernels.w4a16 import W4A16


@functools.cache
def _kernel(shard: ExpertShard, device: torch.device) -> W4A16:
    """One kernel object for all layers of the same shape."""
    from hopper_moe.kernels.w4a16 import W4A16

    return W4A16(shard, device)


class W4A16Runner:
    """`ExpertRunner` over `hopper_moe.kernels.w4a16`."""

    experts_type = InterleavedExperts

    launch_counter = None

    kept_tensors: tuple[torch.Tensor, ...] = ()

    def prepare(self, experts: InterleavedExperts, shard: ExpertShard) -> None:
        """See `ExpertRunner.prepare`. The first layer of a shape lets FlashInfer measure its tiles (20 to 30 s)."""
        self._experts = experts
        self._kernel = _kernel(shard, experts.device)
        self._kernel.tune(experts)
        self.kept_tensors = self._kernel.kept_tensors

    def run(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `ExpertRunner.run`."""
        return self._kernel(hidden_states.contiguous(), topk_ids.contiguous(), topk_weights.contiguous(), self._experts, out=out)


def create() -> W4A16Runner:
    """A runner for one layer."""
    return W4A16Runner()
