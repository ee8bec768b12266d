"""eval/layer_bench/placement: experts placed by SGLang's own EPLB, and what it does to the rows of the busiest rank."""

from __future__ import annotations

import pytest
import torch

from hopper_moe.eval.layer_bench.placement import Placement, balanced, in_order
from hopper_moe.eval.layer_bench.skew import Case, placed

EXPERTS, RANKS = 64, 4


def zipf(exponent: float) -> torch.Tensor:
    return (1e6 * torch.arange(1, EXPERTS + 1).double() ** -exponent).long()


def rows(placement: Placement, counts: torch.Tensor) -> torch.Tensor:
    """Rows of each rank, where every rank's tokens choose expert e `counts[e]` times."""
    found = torch.zeros(len(placement.place_for), dtype=torch.int64)
    for places in placement.place_for:
        found.index_add_(0, places.long() // placement.places_per_rank, counts)
    return found


@pytest.mark.parametrize("redundant", [0, 4, 16])
def test_every_expert_has_places_and_every_rank_sends_to_one_of_them(redundant):
    found = balanced(zipf(1.0), RANKS, redundant)
    assert len(found.logical_of) == EXPERTS + redundant and found.places_per_rank == (EXPERTS + redundant) // RANKS
    assert set(found.logical_of.tolist()) == set(range(EXPERTS))
    for rank, places in enumerate(found.place_for.tolist()):
        for expert, place in enumerate(places):
            assert found.logical_of[place] == expert
            of_rank = found.logical_of[rank * found.places_per_rank : (rank + 1) * found.places_per_rank]
            assert place // found.places_per_rank == rank or expert not in of_rank, "its own copy where it has one"


@pytest.mark.parametrize("exponent", [1.0, 1.2])
def test_the_busiest_of_two_ranks_has_hardly_more_than_its_share(exponent):
    """EPLB counts on copies being used alike, but a rank sends to its own ones: with few redundant experts up to 15 % more."""
    counts = zipf(exponent)
    share = counts.sum().item()  # of a rank: each of two sends so many to both together
    busiest = rows(in_order(EXPERTS, 2), counts).max().item()
    assert busiest > 1.6 * share
    for redundant, limit in ((0, 1.02), (4, 1.2), (16, 1.2)):
        assert share <= rows(balanced(counts, 2, redundant), counts).max().item() < limit * share


def test_a_case_is_placed_by_counts_of_other_tokens():
    assert torch.equal(placed(Case(8, 1.0, None), 16, 2, 2).logical_of, torch.arange(16)), "without EPLB: in order"
    first, again = placed(Case(8, 1.0, 4), 16, 2, 2), placed(Case(8, 1.0, 4), 16, 2, 2)
    assert torch.equal(first.logical_of, again.logical_of) and torch.equal(first.place_for, again.place_for), (
        "on every rank alike"
    )
    counts = torch.bincount(first.logical_of, minlength=16)
    assert counts[0] == counts.max() > 1, "the hottest expert has copies"
