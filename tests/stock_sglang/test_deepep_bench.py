"""`bench deepep` as far as it needs no GPU: its two ways over this repository's stand-in for DeepEP's transport, its tables."""

from __future__ import annotations

import gloo_deepep
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from kept_results import kept_rows

from hopper_moe.eval.layer_bench import deepep
from hopper_moe.eval.layer_bench.deepep import Check, LowLatency, Normal, Result, groups_of, of_all_ranks, table
from hopper_moe.kernels.benchmarks.workload import ModelShape, random_routing, random_tokens
from hopper_moe.kernels.device import Device

SHAPE = ModelShape(64, 64, 8, 3, 8)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def scaled_sum(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """A layer whose expert e multiplies a row by its factor."""
    used = torch.nn.functional.pad(factors, (0, 1))[ids.long()]  # id -1: 0
    return (x.float().nan_to_num() * (used * weights).sum(1, keepdim=True)).bfloat16()


def test_both_ways_are_the_layer(one_rank, seed):
    rng = torch.Generator().manual_seed(seed)
    factors = torch.randn(SHAPE.num_experts, generator=rng)
    given = (
        random_tokens(SHAPE, 5, rng, "cpu"),
        *random_routing(5, SHAPE.num_experts, SHAPE.top_k, "uniform", rng, "cpu"),
        factors,
    )
    wanted = scaled_sum(*given).float()
    for mode in (Normal, LowLatency):
        rdma = 1 if mode is LowLatency else 0
        buffer = gloo_deepep.Buffer(one_rank, 0, rdma, low_latency_mode=bool(rdma))
        way = mode(buffer, SHAPE.num_experts, scaled_sum, *([8] if rdma else []))
        for rows in (5, 1, 0):
            got = way(*(tensor[:rows] for tensor in given[:3]), factors).float()
            # Low latency rounds each expert's row to BF16: at most 2^-9 of each of them.
            bound = (given[0].float().abs() * (factors[given[1].long()].abs() * given[2]).sum(1, keepdim=True))[:rows] * 2**-7
            assert ((got - wanted[:rows]).abs() <= bound).all()


def test_what_is_timed_beside_what():
    assert groups_of(["normal", "low_latency"], 8, 128) == [
        (("exchange", "normal"), False),
        (("exchange", "low_latency"), True),
    ]
    assert groups_of(["low_latency"], 129, 128) == []


def test_the_worst_rank_counts():
    ranks = [
        ([("normal", 0.03, 0)], [("normal", False, 8, (9.0, 8.0, 10.0))]),
        ([("normal", 0.04, 2)], [("normal", False, 8, (7.0, 6.0, 12.0))]),
    ]
    checks, results = of_all_ranks(ranks)
    assert checks == [Check("normal", 0.04, 2)] and results == [Result("normal", False, 8, 9.0, 8.0, 10.0)]
    lines = table(checks, results).splitlines()
    assert lines[2] == "| normal | 4.000% | 2 |" and lines[-1] == "| 8 | normal, eager | 9.0 (8.0-10.0) |"


def test_an_unknown_mode_is_one_sentence(monkeypatch):
    monkeypatch.setattr(deepep, "check_run", lambda *_: Device("NVIDIA H200", 132))
    result = CliRunner().invoke(deepep.main, ["--modes", "normal,fast"])
    assert result.exit_code == 2
    assert result.output == "--modes 'fast': DeepEP has normal and low_latency, write one or both with a comma.\n"


def test_kept_results_can_be_read():
    """Every committed line is a check or a time of these fields, with possible numbers."""
    for row in kept_rows(deepep, "*_deepep_*.jsonl"):
        assert all(row.pop(key) for key in ("budget", "commit", "gpu", "ranks", "shape")), row
        if "error" in row:
            assert 0 < Check(**row).error < 0.06, row
        else:
            found = Result(**row)
            assert 0 < found.us_p10 <= found.us <= found.us_p90, row
