"""The layer over several GPUs of one host gives the bits of one GPU that holds all experts, whoever is late, empty or gone."""

from __future__ import annotations

import functools
import signal

import mega_moe_ranks as ranks
import pytest
import torch

from hopper_moe.kernels.benchmarks.ranks import run_on_ranks, start_on_ranks
from hopper_moe.quantization.layout import MAX_LOCAL_EXPERTS

pytestmark = pytest.mark.gpu
NUM_RANKS = [n for n in (2, 4, 8) if n <= torch.cuda.device_count()] or [2]


@pytest.fixture(autouse=True, scope="module")
def several_gpus():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two Hopper GPUs of one host or more")


@functools.cache
def bits(num_ranks: int, name: str, seed: int) -> list[dict[str, bool]]:
    return run_on_ranks(num_ranks, ranks.same_bits, seed, ranks.OPTIONS[name])


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("name", ranks.OPTIONS)
def test_bits_of_one_rank(num_ranks, name, seed):
    found = bits(num_ranks, name, seed)
    assert len(found[0]) == len(ranks.SCENARIOS)
    wrong = [f"rank {rank}: {case}" for rank, cases in enumerate(found) for case, good in cases.items() if not good]
    assert not wrong, f"other bits than one rank alone: {wrong}"


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
@pytest.mark.parametrize("num_experts, num_logical", [(384 + 64, 384), (1024, 256)])
def test_more_experts_than_one_rank_holds(num_ranks, num_experts, num_logical, seed):
    if num_experts // num_ranks > MAX_LOCAL_EXPERTS:
        pytest.skip(f"{num_experts} experts need more than {num_ranks} ranks")
    assert run_on_ranks(num_ranks, ranks.same_bits_of_copies, seed, num_experts, num_logical) == [[True] * 3] * num_ranks


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_delays_change_nothing(num_ranks, seed):
    assert run_on_ranks(num_ranks, ranks.with_delays, seed, 100) == [0] * num_ranks


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_graph_replays(num_ranks, seed, pytestconfig):
    found = run_on_ranks(num_ranks, ranks.replayed, seed, pytestconfig.getoption("replays"))
    assert found == [dict.fromkeys(found[0], 0)] * num_ranks, "replays with other bits, by size of the graph"


@pytest.mark.parametrize("num_ranks", NUM_RANKS)
def test_a_killed_rank_is_named(num_ranks, seed, tmp_path):
    timeout_s = 3
    started = start_on_ranks(num_ranks, str(tmp_path), ranks.lose_a_rank, seed, timeout_s, str(tmp_path))
    for process in started.processes:
        process.join(120)
    assert [process.exitcode for process in started.processes] == [0] * (num_ranks - 1) + [-signal.SIGKILL]
    for rank in range(num_ranks - 1):
        seconds, cuda_error, message = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert timeout_s <= float(seconds) < timeout_s + 5
        assert cuda_error, "synchronize must fail too"
        for part in (
            f"rank {rank} waited {timeout_s} s for rank {num_ranks - 1}",
            "layer 7",
            "token counts",
            "HOPPER_MOE_TIMEOUT_S",
        ):
            assert part in message
        assert message in (tmp_path / f"{rank}.log").read_text(), "whoever only sees the CUDA error needs the log"
