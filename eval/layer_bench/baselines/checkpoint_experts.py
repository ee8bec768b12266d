"""Experts as the checkpoint has them, for kernels whose project converts a whole layer at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import as_bytes
from hopper_moe.quantization.errors import Refusal

if TYPE_CHECKING:
    from hopper_moe.kernels.shard import ExpertShard


@dataclass(frozen=True)
class CheckpointExperts:
    """`ExpertTensors`, all uint8; rows of w13 are `[w1; w3]` (gate, then up)."""

    holds_every_row: ClassVar[bool] = True

    w13: torch.Tensor  # [E, 2I, H/2]
    w13_scale: torch.Tensor  # [E, 2I, H/32]
    w2: torch.Tensor  # [E, H, I/2]
    w2_scale: torch.Tensor  # [E, H, I/32]

    @classmethod
    def empty(cls, num_experts: int, hidden_size: int, intermediate_size: int, device: torch.device | str) -> CheckpointExperts:
        """Uninitialised tensors, to be filled with `store`."""
        layout.check_dims(hidden_size, intermediate_size)

        def matrix(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
            sizes = (columns // 2, columns // layout.MXFP4_GROUP)
            weight, scale = (torch.empty(num_experts, rows, size, dtype=torch.uint8, device=device) for size in sizes)
            return weight, scale

        return cls(*matrix(2 * intermediate_size, hidden_size), *matrix(hidden_size, intermediate_size))

    def store(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> None:
        """Copies one expert's checkpoint tensors into slot `expert`."""
        for name, tensor in (("w13", w13), ("w13_scale", w13_scale), ("w2", w2), ("w2_scale", w2_scale)):
            getattr(self, name)[expert].copy_(as_bytes(tensor))


def require_one_rank(name: str, shard: ExpertShard) -> None:
    """Raises `Refusal` unless the rank holds the whole layer: baselines are compared on one rank."""
    if shard.num_local_experts != shard.num_experts:
        raise Refusal(f"{name} is compared on one rank, which holds all {shard.num_experts} experts: give it the whole layer.")
