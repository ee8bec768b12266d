"""Kernel `reference`: the executable definition of the layer in plain torch, on any device. Slow; no CUDA graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hopper_moe.kernels.reference import moe_layer, pre_dispatch
from hopper_moe.kernels.reference_stages import combine_slots, expert_hidden, expert_slots
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import PackedExperts

if TYPE_CHECKING:
    from hopper_moe.kernels.reference_weights import ExpertSource
    from hopper_moe.kernels.shard import ExpertShard

_EXCHANGE_ROWS = 1024  # tokens whose slots exist at once while ranks exchange: bounds FP32 [rows, top_k, H]


class ReferenceRunner:
    """`ExpertRunner` over `hopper_moe.kernels.reference`. Besides packed experts it takes them as the checkpoint has them."""

    experts_type = PackedExperts

    launch_counter = None

    kept_tensors: tuple[torch.Tensor, ...] = ()

    def prepare(self, experts: PackedExperts | ExpertSource, shard: ExpertShard) -> None:
        if (experts.num_experts, experts.hidden_size, experts.intermediate_size) != (
            shard.num_local_experts,
            shard.hidden_size,
            shard.intermediate_size,
        ):
            raise Refusal(
                f"{experts.num_experts} experts of {experts.hidden_size} x {experts.intermediate_size} were packed for a layer "
                f"of {shard.num_local_experts} of {shard.hidden_size} x {shard.intermediate_size}: pack the layer again."
            )
        self._experts, self._shard = experts, shard

    def run(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `ExpertRunner.run`."""
        y = moe_layer(
            hidden_states,
            topk_ids,
            topk_weights,
            self._experts,
            swiglu_limit=self._shard.swiglu_limit,
            first_expert=self._shard.first_expert,
            fp4=self._shard.fp4_dispatch,
            fp8_combine=self._shard.fp8_combine,
        )
        return y if out is None else out.copy_(y)

    def run_across_ranks(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        """`run`, but complete: tokens visit the experts of every rank of `group`. Ranks without tokens must call it too.

        Every rank sees all tokens and computes the slots of its own experts; a slot is non-zero on one rank only, so the FP32 sum
        over ranks is exact and the result has the bits of a single rank holding all experts. Returns bf16 [num_tokens, H] of this
        rank's rows.
        """
        counts = _all_counts(hidden_states.shape[0], group, hidden_states.device)
        if not any(counts):
            return torch.empty_like(hidden_states)
        x, ids, weights = (_all_rows(t, counts, group) for t in (hidden_states, topk_ids, topk_weights))
        first = sum(counts[: dist.get_rank(group)])
        mine = slice(first, first + hidden_states.shape[0])
        pieces = [
            self._combined(x[rows], ids[rows], weights[rows], group)
            for rows in (slice(start, start + _EXCHANGE_ROWS) for start in range(0, x.shape[0], _EXCHANGE_ROWS))
        ]
        return torch.cat(pieces)[mine].clone()

    def _combined(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        experts, shard = self._experts, self._shard
        local = ids - shard.first_expert
        local = torch.where((ids >= 0) & (local >= 0) & (local < shard.num_local_experts), local, -1)
        tokens = [pre_dispatch(x, local, weights, fp4=shard.fp4_dispatch)]
        hidden = expert_hidden(tokens, [experts], num_experts=experts.num_experts, swiglu_limit=shard.swiglu_limit)
        (slots,) = expert_slots(tokens, hidden, [experts], num_experts=experts.num_experts, fp8_combine=shard.fp8_combine)
        slots = slots.float()
        dist.all_reduce(slots, group=group)
        return combine_slots(slots, ids)


def _all_counts(count: int, group: dist.ProcessGroup, device: torch.device) -> list[int]:
    counts = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([count], dtype=torch.int64, device=device), group=group)
    return [int(c) for c in counts]


def _all_rows(rows: torch.Tensor, counts: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Rows of every rank, in rank order; ranks may have different numbers of rows."""
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


def create() -> ReferenceRunner:
    """A runner for one layer."""
    return ReferenceRunner()
