"""The workspace of one fused kernel in bytes. Which field lies where is the library's own answer (`csrc/layout.cuh`)."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from hopper_moe.kernels import jit
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.quantization import layout

# Order of the byte offsets that the library's workspace_layout returns (struct Workspace in csrc/layout.cuh).
WORKSPACE_FIELDS = (
    "epoch", "exit_count", "gave_up", "arrived", "results_sent", "received_count", "expert_count",
    "x_ready", "h_ready",
    "group_done", "group_claimed", "next_task", "control_bytes", "slot_list", "x", "x_exponent", "x_scale", "topk_ids",
    "topk_weights", "combine", "combine_scale",
    "pool_x", "pool_x_scale", "pool_weight", "pool_slot", "pool_h", "pool_h_scale", "num_bytes",
)  # fmt: skip


class LaunchShape(NamedTuple):
    """struct Shape of csrc/layout.cuh, in its order."""

    hidden_size: int
    intermediate_size: int
    top_k: int
    num_experts: int
    num_local_experts: int
    first_expert: int
    num_ranks: int
    rank: int
    capacity: int
    wave_rows: int
    fp8_combine: bool
    fp4_dispatch: bool

    @classmethod
    def of(cls, shard: ExpertShard, num_ranks: int, wave_rows: int | None = None) -> Self:
        """One of `num_ranks` that exchange tokens. `wave_rows`: of the pools; None: `default_wave_rows`."""
        if wave_rows is None:
            wave_rows = default_wave_rows(num_ranks, shard.max_tokens_per_rank, shard.top_k, shard.num_local_experts)
        return cls(
            hidden_size=shard.hidden_size,
            intermediate_size=shard.intermediate_size,
            top_k=shard.top_k,
            num_experts=shard.num_experts,
            num_local_experts=shard.num_local_experts,
            first_expert=shard.first_expert,
            num_ranks=num_ranks,
            rank=shard.first_expert // shard.num_local_experts if num_ranks > 1 else 0,
            capacity=shard.max_tokens_per_rank,
            wave_rows=wave_rows,
            fp8_combine=shard.fp8_combine,
            fp4_dispatch=shard.fp4_dispatch,
        )

    def integers(self) -> list[int]:
        """As the library takes it."""
        return [int(value) for value in self]


def default_wave_rows(num_ranks: int, capacity: int, top_k: int, num_local_experts: int) -> int:
    """Pool rows of one wave: everything one rank can bring, or with several ranks 1.5 times a balanced share of a full batch,
    so that the pools do not grow with the number of ranks; a launch that sends more rows here runs in several waves."""
    slots = capacity * top_k
    most = slots if num_ranks == 1 else min(num_ranks * slots, slots + slots // 2)
    return -(-most // layout.ROW_BLOCK) * layout.ROW_BLOCK + num_local_experts * layout.ROW_BLOCK


def workspace_offsets(shape: LaunchShape, functions: Any) -> dict[str, int]:
    """Byte offset of every workspace field, by name; `functions`: a loaded library's, by name. Needs no GPU."""
    return dict(zip(WORKSPACE_FIELDS, map(int, functions["workspace_layout"](shape.integers())), strict=True))


def workspace_bytes(shard: ExpertShard, library: str, *, num_ranks: int | None = None) -> int:
    """Bytes of device memory that a `MegaMoE` takes besides the weights. Compiles the library if need be; needs no GPU.

    Args:
        num_ranks: that exchange tokens; None: the ranks of the shard's group.
    """
    shape = LaunchShape.of(shard, shard.num_exchanging_ranks if num_ranks is None else num_ranks)
    return workspace_offsets(shape, jit.load(library))["num_bytes"]
