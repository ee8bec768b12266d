"""The CUDA sources on emulated GPUs: the arithmetic of one rank, the bits of 2, 4 and 8, and mistakes that must show. Needs no
GPU.

What needs the real one: its tensor cores' rounding, fences and scopes, time. `test_mega_moe_gpu.py`, `test_mega_moe_bits_gpu.py`
and `test_mega_moe_ranks_gpu.py` ask the same questions there.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from emulated_layer import EmulatedLayer, EmulationError, Gpus, compile_emulated
from layer_compare import assert_layers_agree
from mega_moe_ranks import SCENARIOS, tokens_of
from mega_moe_rig import FACTOR, PAIRS, RANDOM_EXPERTS, Batch, random_batch, read_dispatched, read_hidden, read_slots

from hopper_moe.kernels import jit, reference
from hopper_moe.kernels.benchmarks.workload import ModelShape
from hopper_moe.kernels.failure import PeerTimeout
from hopper_moe.kernels.reference_stages import combine_slots, expert_hidden
from hopper_moe.kernels.tile_table import TILES, forced_tile
from hopper_moe.quantization.packing import PackedExperts
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts

# Sums are exact but for FP32, so only values within 1e-6 of a rounding border of h may differ: one such is up to 1 % of a token.
MAX_RELATIVE_L2 = 2.5e-3
MIN_EQUAL_BYTES = 0.9995
NUM_SCENARIOS = 5  # of those that the GPU test runs all of, drawn anew in every run

SHAPES = {
    "odd": ModelShape(640, 384, 7, 3, 7, 2.0),  # five blocks of k, three of h, two column groups
    "few chunks": ModelShape(256, 128, 5, 2, 5, None),
    "one chunk": ModelShape(128, 256, 9, 8, 9),  # and more slots than the combine has in flight
    "wide": ModelShape(1152, 640, 4, 2, 4),
}
SPREAD = ModelShape(640, 256, 16, 3, 16)
CAPACITY = 260  # above kMinTokensToCombineEarly; of 8 ranks more than two blocks of 128 rows an expert

OPTIONS = {
    "bf16": {},
    "fp8_combine": {"fp8_combine": True},
    "fp4_dispatch": {"fp4_dispatch": True},
    "waves": {"wave_rows": 256},
    "fp8_weights": {"weights": PackedFp8Experts},
    "pairs": {"tiles": PAIRS},
}


@pytest.fixture(scope="module")
def gpus(tmp_path_factory):
    """Library name -> emulated GPUs, compiled on first use."""
    made: dict[str, Gpus] = {}

    def get(weights: type = PackedExperts) -> Gpus:
        if weights.library not in made:
            made[weights.library] = Gpus(compile_emulated(weights.library, tmp_path_factory.mktemp("emulated")))
        return made[weights.library]

    return get


@pytest.fixture
def generator(seed) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_layer(gpus, shape: ModelShape, generator: torch.Generator, capacity: int, num_ranks: int = 1, **options) -> EmulatedLayer:
    weights = options.pop("weights", PackedExperts)
    experts = RANDOM_EXPERTS[weights](shape, shape.num_experts, generator, "cpu")
    return EmulatedLayer(gpus(weights), shape, experts, capacity, num_ranks, **options)


def whole(layer: EmulatedLayer, experts, capacity: int, **options) -> EmulatedLayer:
    """The same layer on one rank that holds all experts."""
    return EmulatedLayer(layer.gpus, layer.shape, experts, capacity, **options)


def draw_batch(shape: ModelShape, num_tokens: int, routing: str, generator: torch.Generator, num_ranks: int = 1) -> Batch:
    return random_batch(shape, shape.num_experts, num_tokens, routing, generator, num_ranks, device="cpu")


def bits_of(y: torch.Tensor) -> torch.Tensor:
    return y.view(torch.int16)


ONE_RANK = [("odd", tokens, "uniform", "bf16") for tokens in (0, 1, 2, 9, 31, 100, 129, 300)]
ONE_RANK += [("odd", tokens, "one_hot", option) for option in OPTIONS for tokens in (7, 300)]
ONE_RANK += [(name, tokens, "zipf", option) for name in ("few chunks", "one chunk", "wide") for tokens in (5, 150) for option in ("bf16", "fp8_weights", "pairs")]


@pytest.mark.parametrize("name, num_tokens, routing, option", ONE_RANK)
def test_layer(gpus, generator, seed, name, num_tokens, routing, option):
    shape, options = SHAPES[name], OPTIONS[option]
    layer = make_layer(gpus, shape, generator, 300, **options)
    batch, (rank,) = draw_batch(shape, num_tokens, routing, generator), layer.ranks
    (y,) = layer.run([batch], seed)
    of_reference = {"fp8_combine": "fp8_combine" in options, "fp4": "fp4_dispatch" in options}
    want = reference.moe_layer(
        batch.x, batch.topk_ids, batch.topk_weights, rank.packed,
        swiglu_limit=shape.swiglu_limit, routed_scaling_factor=FACTOR, **of_reference,
    )  # fmt: skip
    bound = 3e-2 if "fp8_combine" in options else MAX_RELATIVE_L2  # a slot at a rounding border of E4M3 moves by a step
    assert_layers_agree(y, want, bound, 1 - bound**2)
    if num_tokens > 4:
        assert not y[2].any(), "a token without a valid slot is not zero"
    if option in ("bf16", "pairs", "fp8_weights") and num_tokens:
        tokens = read_dispatched(rank, num_tokens)
        (h,) = expert_hidden([tokens], [rank.packed], num_experts=shape.num_experts, swiglu_limit=shape.swiglu_limit)
        equal = read_hidden(rank, batch.topk_ids).hq.view(torch.uint8) == h.hq.view(torch.uint8)
        assert equal.double().mean() >= MIN_EQUAL_BYTES
        assert torch.equal(y, combine_slots(read_slots(rank, batch.topk_ids), batch.topk_ids))


@pytest.mark.parametrize("weights", [PackedExperts, PackedFp8Experts])
def test_bits_do_not_depend_on_tiles_waves_or_the_batch(gpus, generator, seed, weights):
    shape, experts = SHAPES["odd"], RANDOM_EXPERTS[weights](SHAPES["odd"], 7, generator, "cpu")
    batch = draw_batch(shape, 300, "one_hot", generator)

    def run(batch: Batch, **options) -> torch.Tensor:
        return bits_of(EmulatedLayer(gpus(weights), shape, experts, 300, **options).run([batch], seed)[0])

    want = run(batch)
    for tiles in (*map(forced_tile, TILES), PAIRS):
        assert torch.equal(run(batch, tiles=tiles), want), f"other bits with {tiles}"
    assert torch.equal(run(batch, wave_rows=256), want)
    for rows in (slice(0, 1), slice(3, 11), slice(100, 164)):
        assert torch.equal(run(batch.rows(rows)), want[rows]), f"rows {rows} alone have other bits"


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_bits_of_one_rank(gpus, generator, seed, num_ranks, option):
    """Whatever the routing, and whoever has how many tokens; and the experts' load is what the ids say."""
    draw, options = random.Random(seed + num_ranks), OPTIONS[option]
    layer = make_layer(gpus, SPREAD, generator, CAPACITY, num_ranks, **options)
    experts = type(layer.ranks[0].packed)(*(torch.cat(t) for t in zip(*(rank.packed.tensors for rank in layer.ranks), strict=True)))
    alone = whole(layer, experts, num_ranks * CAPACITY, **{k: v for k, v in options.items() if k in ("fp8_combine", "fp4_dispatch")})
    load = torch.zeros(SPREAD.num_experts, dtype=torch.int64)
    for case, routing in draw.sample(SCENARIOS, NUM_SCENARIOS):
        sizes = [tokens_of(case, rank, num_ranks, CAPACITY, draw) for rank in range(num_ranks)]
        batches = [draw_batch(SPREAD, size, routing, generator, num_ranks) for size in sizes]
        together = Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in ("x", "topk_ids", "topk_weights")))
        (want,) = alone.run([together], draw.randrange(2**31))
        got = layer.run(batches, draw.randrange(2**31))
        assert not want.isnan().any()
        assert torch.equal(bits_of(torch.cat(got)), bits_of(want)), f"other bits than one rank alone: {case} {routing}"
        load += torch.bincount(together.topk_ids[together.topk_ids >= 0].long(), minlength=SPREAD.num_experts)
    counted = [rank.workspace[rank.offsets["expert_load"] :][: 8 * rank.num_local_experts].view(torch.int64) for rank in layer.ranks]
    assert torch.equal(torch.cat(counted), load)
