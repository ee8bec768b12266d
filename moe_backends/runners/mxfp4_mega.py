"""Kernel `mxfp4_mega`: the fused CUDA kernel on this rank's experts, or across the ranks of a group."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch

from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import PackedExperts, WidePackedExperts

if TYPE_CHECKING:
    import torch.distributed as dist

    from hopper_moe.kernels.mega_moe import MegaMoE
    from hopper_moe.kernels.shard import ExpertShard
    from hopper_moe.quantization.packing_fp8 import PackedFp8Experts


@functools.cache
def _kernel(shard: ExpertShard, device: torch.device, weights: type[PackedExperts] | type[PackedFp8Experts]) -> MegaMoE:
    """One kernel object for all layers of the same shape and format (their limit and number do not matter). The FP4 formats
    share a workspace."""
    if weights is WidePackedExperts:
        return _kernel(shard, device, PackedExperts).with_weights(weights)
    from hopper_moe.kernels.mega_moe import MegaMoE

    return MegaMoE(shard, device=device, weights=weights)


class Mxfp4MegaRunner:
    """`ExpertRunner` over `hopper_moe.kernels.mega_moe`."""

    name: ClassVar[str] = "mxfp4_mega"  # as in HOPPER_MOE_KERNEL
    experts_type: ClassVar[type[PackedExperts] | type[PackedFp8Experts]] = PackedExperts

    kept_tensors: tuple[torch.Tensor, ...] = ()

    def prepare(self, experts: PackedExperts | PackedFp8Experts, shard: ExpertShard) -> None:
        """See `ExpertRunner.prepare`. The first layer of a shape compiles the kernel (if it was not before) and takes the
        workspace; with a group, that is collective."""
        self._packed, self._swiglu_limit, self._layer, self._group = experts, shard.swiglu_limit, shard.layer, shard.group
        # mypy takes the instances' `__hash__` for that of the class
        self._kernel = _kernel(replace(shard, swiglu_limit=None), experts.device, type(experts))  # type: ignore[arg-type]
        self.kept_tensors = self._kernel.kept_tensors

    def run_across_ranks(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        """`run`, but complete: tokens visit the experts of every rank of `group`, which must be the shard's. Ranks without
        tokens must call it too. Returns bf16 [num_tokens, hidden_size] of this rank's rows."""
        if group is not self._group:
            raise Refusal(f"{self.name} was prepared for another group of ranks than it is called with: prepare the layer again.")
        return self.run(hidden_states, topk_ids, topk_weights)

    def run(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `ExpertRunner.run`."""
        return self._kernel(
            hidden_states.contiguous(),
            topk_ids.contiguous(),
            topk_weights.contiguous(),
            self._packed,
            swiglu_limit=self._swiglu_limit,
            out=out,
            layer=self._layer,
        )

    @property
    def launch_counter(self) -> torch.Tensor:
        """uint8 [4]: little-endian number of launches of this rank's kernel, all layers together, kept by the kernel itself."""
        kernel = self._kernel
        return kernel.workspace[kernel.offsets["epoch"] : kernel.offsets["epoch"] + 4]


def create() -> Mxfp4MegaRunner:
    """A runner for one layer."""
    return Mxfp4MegaRunner()
