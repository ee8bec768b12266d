"""How many experts the fused kernel's Python face admits. Refusals come before the device is looked at, so this needs no GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hopper_moe.kernels.benchmarks.workload import ModelShape
from hopper_moe.kernels.mega_moe import MegaMoE
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.quantization.errors import Refusal


def shard_of(num_experts: int, num_local_experts: int) -> ExpertShard:
    shape = ModelShape(256, 128, num_experts, 2, num_local_experts)
    return ExpertShard.of(shape, max_tokens_per_rank=8, num_local_experts=num_local_experts)


@pytest.mark.parametrize(
    "num_experts, num_local_experts, words",
    [
        (1025, 5, "^num_experts 1025 is above 1024, the limit of the fused kernel: .*redundant experts"),
        (448, 448, "^448 experts on one rank are above 400, the limit of the fused kernel: use --ep-size 2 or more"),
        (1024, 401, "^401 experts on one rank are above 400, the limit of the fused kernel: use --ep-size 4 or more"),
    ],
)
def test_too_many_experts(num_experts, num_local_experts, words):
    with pytest.raises(Refusal, match=words):
        MegaMoE(shard_of(num_experts, num_local_experts), device="cpu")


@pytest.mark.parametrize("num_experts, num_local_experts", [(400, 400), (1024, 400), (448, 224)])
def test_as_many_as_the_tables_hold(num_experts, num_local_experts):
    """What is refused is the device."""
    with pytest.raises(Refusal, match="no SM90 GPU"):
        MegaMoE(shard_of(num_experts, num_local_experts), device="cpu")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_size": 200}, "hidden_size 200"),
        ({"intermediate_size": 64}, "intermediate_size 64"),
        ({"top_k": 17, "num_experts": 32}, "top_k 17"),
        ({"first_expert": 1}, r"experts 1\.\.4 are not inside 0\.\.3"),
        ({"num_local_experts": 0}, r"experts 0\.\.-1"),
        ({"max_tokens_per_rank": 0}, "0 tokens per rank are outside 1..8388608"),
        ({"max_tokens_per_rank": 1 << 24}, "16777216 tokens per rank are outside"),
    ],
)
def test_bad_sizes(change, words):
    with pytest.raises(ValueError, match=words):
        MegaMoE(replace(shard_of(4, 4), **change), device="cpu")


@pytest.mark.parametrize("wave_rows", [0, 100, -128])
def test_bad_pools(wave_rows):
    with pytest.raises(ValueError, match=f"wave_rows {wave_rows} is not a positive multiple of 128"):
        MegaMoE(shard_of(4, 4), device="cpu", wave_rows=wave_rows)
