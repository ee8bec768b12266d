"""Where experts lie on the ranks, by SGLang's own EPLB, and how many rows each rank gets."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Placement:
    """Attributes:

    logical_of: int64 [num_physical], the expert that lies at each place; rank r holds an equal share of the places, in order.
    place_for: int32 [num_ranks, num_experts], the place that tokens of a rank are sent to.
    """

    logical_of: torch.Tensor
    place_for: torch.Tensor

    @property
    def places_per_rank(self) -> int:
        return len(self.logical_of) // len(self.place_for)


def in_order(num_experts: int, num_ranks: int) -> Placement:
    """Without EPLB: expert e at place e."""
    places = torch.arange(num_experts)
    return Placement(places, places.int().expand(num_ranks, -1).contiguous())


def balanced(counts: torch.Tensor, num_ranks: int, num_redundant: int) -> Placement:
    """By `rebalance_experts` of the installed SGLang, one host, no expert groups, from how often each expert was chosen.

    A rank sends to its own copy of an expert where it has one, as SGLang's static dispatch does; ranks without one take turns.
    """
    from sglang.srt.eplb.eplb_algorithms import EplbAlgorithm, rebalance_experts

    num_physical = len(counts) + num_redundant
    logical_of, places_of, _ = rebalance_experts(
        counts.cpu().view(1, 1, -1), num_physical, num_physical // num_ranks, None, 1, EplbAlgorithm.deepseek
    )
    per_rank = num_physical // num_ranks
    place_for = torch.empty(num_ranks, len(counts), dtype=torch.int32)
    for expert, row in enumerate(places_of[0].tolist()):
        places = [place for place in row if place >= 0]
        for rank in range(num_ranks):
            own = [place for place in places if place // per_rank == rank]
            place_for[rank, expert] = (own or places)[rank % len(own or places)]
    return Placement(logical_of[0].long().cpu(), place_for)
