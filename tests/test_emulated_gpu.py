"""The CUDA sources on emulated GPUs: the arithmetic of one rank, the bits of 2, 4 and 8, and a rank that does not come. Needs no
GPU.

What needs the real one: its tensor cores' rounding, its time, and whatever the emulator takes for granted.
`test_mega_moe_gpu.py`, `test_mega_moe_bits_gpu.py` and `test_mega_moe_ranks_gpu.py` ask the same questions there.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from emulated_layer import (
    CAPACITY,
    SPREAD,
    EmulatedLayer,
    SpreadLayer,
    bits_of,
    compiled_on_first_use,
    copies_of,
    draw_batch,
    joined,
)
from layer_compare import assert_layers_agree, relative_l2
from mega_moe_ranks import OPTIONS, SCENARIOS, tokens_of
from mega_moe_rig import FACTOR, PAIRS, RANDOM_EXPERTS, Batch, read_dispatched, read_hidden, read_slots

from hopper_moe.kernels import reference
from hopper_moe.kernels.benchmarks.workload import ModelShape, random_checkpoint, random_tokens, widen_rows
from hopper_moe.kernels.expert_blocks import most_rows, run_on_blocks
from hopper_moe.kernels.failure import PeerTimeout
from hopper_moe.kernels.reference_stages import HiddenStage, combine_slots, expert_hidden
from hopper_moe.kernels.reference_weights import Mxfp4Experts
from hopper_moe.kernels.tile_table import TILES, forced_tile
from hopper_moe.quantization.packing import PackedExperts, WidePackedExperts, pack_experts
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts

# Products are exact and sums FP32, so only values of h within 1e-6 of a rounding border may differ, one in a million or so: each
# moves its token by up to 1 %. With FP8 combine a slot at a border moves by a step of E4M3.
MAX_RELATIVE_L2, MAX_WITH_FP8_COMBINE = 1.5e-2, 3e-2
MANY, MAX_OF_MANY = 64, 2.5e-3  # tokens, over which it evens out
MAX_OTHER_BYTES = 3, 2e-4  # of h: so many, and this share, where the scale is the same
# h is BF16 before it is quantised. Where a group's largest value crosses a border of BF16 (a sum of 256 products is off by 1e-6,
# a step is 4e-3 to 8e-3), the whole group has a scale one step away, and one byte in sixteen is another.
MAX_OTHER_SCALES, BF16_STEP, FP32_ROUNDING = (3, 2e-3), 2**-7, 2**-20

SHAPES = {
    "odd": ModelShape(640, 384, 7, 3, 7, 2.0),  # five blocks of k, three of h, two column groups
    "few chunks": ModelShape(256, 128, 5, 2, 5, None),
    "one chunk": ModelShape(128, 256, 9, 8, 9),  # and more slots than the combine has in flight
    "wide": ModelShape(1152, 640, 4, 2, 4),
}
CASES = [("odd", tokens, "uniform", "bf16") for tokens in (0, 1, 2, 9, 31, 100, 129, 300)]
CASES += [("odd", tokens, "one_hot", option) for option in OPTIONS for tokens in (7, 300)]
CASES += [
    (name, tokens, "zipf", option)
    for name in ("few chunks", "one chunk", "wide")
    for tokens in (5, 150)
    for option in ("bf16", "fp8_weights", "wide_weights", "pairs")
]
# Number of ranks -> scenarios that a run draws of those that the GPU test goes through (--scenarios: so many): 64 SMs of 384
# threads take their time.
NUM_SCENARIOS = {2: 5, 4: 2, 8: 1}
CAPACITY_OF_EIGHT = 160  # still two blocks of 128 rows an expert
BLOCK_ROWS = 36  # of each of seven experts
BLOCKS = {
    "no row": [0, 0, 0, 0, 0, 0, 0],
    "one row": [0, 0, 0, 1, 0, 0, 0],
    "ragged": [36, 0, 1, 7, 35, 0, 8],
    "one expert": [0, 0, 0, 0, 0, 0, 36],
    "full blocks": [36, 0, 36, 0, 0, 36, 0],  # 36 tokens chose the same three experts
    "full list": [16, 15, 15, 16, 15, 16, 15],
}
BLOCK_CASES = [(name, "bf16") for name in BLOCKS] + [("full list", "fp8_weights"), ("ragged", "wide_weights")]
MANY_EXPERTS = [(384 + 64, 384, 2), (384 + 64, 384, 8), (1024, 256, 4), (1024, 256, 8), (400, 100, 1)]
SPREADS = [(num_ranks, option) for num_ranks in (2, 4) for option in OPTIONS] + [(8, name) for name in ("bf16", "waves", "pairs")]


@pytest.fixture(scope="session")
def gpus(tmp_path_factory):
    return compiled_on_first_use(tmp_path_factory.mktemp)


@pytest.fixture
def generator(seed) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_experts(shape: ModelShape, options: dict, generator: torch.Generator) -> PackedExperts | PackedFp8Experts:
    """Of the type that the options name, which is taken out of them."""
    return RANDOM_EXPERTS[options.pop("weights", PackedExperts)](shape, shape.num_experts, generator, "cpu")


def assert_hidden_agrees(got: HiddenStage, want: HiddenStage) -> None:
    off = (got.h_scale - want.h_scale).abs()
    moved = off > FP32_ROUNDING * want.h_scale
    assert moved.sum() <= MAX_OTHER_SCALES[0] + MAX_OTHER_SCALES[1] * moved.numel()
    assert (off <= BF16_STEP * want.h_scale).all()
    others = got.hq.view(torch.uint8) != want.hq.view(torch.uint8)
    others = others.unflatten(-1, (moved.shape[-1], -1))[~moved]
    assert others.sum() <= MAX_OTHER_BYTES[0] + MAX_OTHER_BYTES[1] * others.numel()


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("name, num_tokens, routing, option", CASES)
def test_layer(gpus, generator, seed, name, num_tokens, routing, option):
    shape, options = SHAPES[name], dict(OPTIONS[option])
    experts = random_experts(shape, options, generator)
    layer = EmulatedLayer(gpus(type(experts)), shape, experts, 300, **options)
    batch, (rank,) = draw_batch(shape, num_tokens, routing, generator), layer.ranks
    (y,) = layer.run([batch], seed)
    want = reference.moe_layer(
        batch.x, batch.topk_ids, batch.topk_weights, experts,
        swiglu_limit=shape.swiglu_limit, routed_scaling_factor=FACTOR,
        fp8_combine=option == "fp8_combine", fp4=option == "fp4_dispatch",
    )  # fmt: skip
    bound = MAX_WITH_FP8_COMBINE if option == "fp8_combine" else MAX_RELATIVE_L2
    assert_layers_agree(y, want, bound, 1 - bound**2)
    if num_tokens >= MANY and option != "fp8_combine":
        assert relative_l2(y, want) <= MAX_OF_MANY
    if num_tokens > 4:
        assert not y[2].any(), "a token without a valid slot is not zero"
    if num_tokens and option in ("bf16", "pairs", "fp8_weights", "wide_weights"):
        tokens = read_dispatched(rank, num_tokens)
        (h,) = expert_hidden([tokens], [experts], num_experts=shape.num_experts, swiglu_limit=shape.swiglu_limit)
        assert_hidden_agrees(read_hidden(rank, batch.topk_ids), h)
        assert torch.equal(y, combine_slots(read_slots(rank, batch.topk_ids), batch.topk_ids))


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("name, option", BLOCK_CASES)
def test_blocks_of_rows(gpus, generator, seed, name, option):
    """As DeepEP's low-latency mode brings them: what a block holds behind its rows is NaN, and shows nowhere."""
    shape, options, counts = SHAPES["odd"], dict(OPTIONS[option]), torch.tensor(BLOCKS[name], dtype=torch.int32)
    experts, is_row = random_experts(shape, options, generator), torch.arange(BLOCK_ROWS) < counts[:, None]
    layer = EmulatedLayer(gpus(type(experts)), shape, experts, most_rows(7, BLOCK_ROWS, shape.top_k), **options)
    blocks = random_tokens(shape, 7 * BLOCK_ROWS, generator, "cpu").view(7, BLOCK_ROWS, -1)
    blocks[~is_row] = float("nan")
    calls = []

    def run(*rows: torch.Tensor) -> torch.Tensor:
        (y,) = layer.run([Batch(*rows)], seed)
        calls.append((Batch(*rows), y))
        return y

    y = run_on_blocks(blocks, counts, shape.top_k, run)[is_row]
    [(listed, of_list)], num_rows = calls, int(counts.sum())
    given = listed.rows(slice(num_rows))
    assert torch.equal(given.x, blocks[is_row]) and torch.equal(given.topk_ids[:, 0].long(), is_row.nonzero()[:, 0])
    assert not bits_of(of_list[num_rows:]).any(), "a row of nobody is not zero"
    want = reference.moe_layer(
        given.x, given.topk_ids, given.topk_weights, experts, swiglu_limit=shape.swiglu_limit, routed_scaling_factor=FACTOR
    )
    assert_layers_agree(y, want, MAX_RELATIVE_L2, 1 - MAX_RELATIVE_L2**2)
    (alone,) = layer.run([given], seed)
    assert torch.equal(bits_of(y), bits_of(alone)), "the bits depend on what else lies in the blocks"


@pytest.mark.one_seed_in(4)
@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("weights", [PackedExperts, WidePackedExperts, PackedFp8Experts])
def test_bits_do_not_depend_on_tiles_waves_or_the_batch(gpus, generator, seed, weights):
    shape = SHAPES["odd"]
    experts, batch = RANDOM_EXPERTS[weights](shape, 7, generator, "cpu"), draw_batch(shape, 300, "one_hot", generator)

    def run(batch=batch, **options) -> torch.Tensor:
        return bits_of(EmulatedLayer(gpus(weights), shape, experts, 300, **options).run([batch], seed)[0])

    want = run()
    for tiles in (*map(forced_tile, TILES), PAIRS):
        assert torch.equal(run(tiles=tiles), want), f"other bits with {tiles}"
    assert torch.equal(run(wave_rows=256), want)
    for rows in (slice(0, 1), slice(3, 11), slice(100, 164)):
        assert torch.equal(run(batch.rows(rows)), want[rows]), f"rows {rows} alone have other bits"


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("num_tokens", [3, 100])
def test_a_layer_gives_the_same_bits_in_either_fp4_format(gpus, generator, seed, num_tokens):
    """Where the tensor cores' sums do not depend on a common power of two, as here."""
    shape = SHAPES["odd"]
    checkpoint = random_checkpoint(shape, shape.num_experts, generator, "cpu", scale_bytes=(114, 122))
    batch = draw_batch(shape, num_tokens, "uniform", generator)
    normal, wide = (
        EmulatedLayer(gpus(weights), shape, pack_experts(*checkpoint, weights), 100).run([batch], seed)[0]
        for weights in (PackedExperts, WidePackedExperts)
    )
    assert torch.equal(bits_of(normal), bits_of(wide))


def test_a_layer_with_a_few_wide_rows_is_the_reference_of_its_checkpoint(gpus, generator, seed):
    """One row in a hundred spans 12 to 28 octaves and has a group of zeros under any scale."""
    shape = SHAPES["odd"]
    clean = random_checkpoint(shape, shape.num_experts, generator, "cpu")
    checkpoint = widen_rows(clean, 0.01, generator)
    packed, batch = pack_experts(*checkpoint), draw_batch(shape, MANY, "uniform", generator)
    assert type(packed) is WidePackedExperts
    (y,) = EmulatedLayer(gpus(WidePackedExperts), shape, packed, MANY).run([batch], seed)
    given = {"swiglu_limit": shape.swiglu_limit, "routed_scaling_factor": FACTOR}
    want, other = (
        reference.moe_layer(batch.x, batch.topk_ids, batch.topk_weights, Mxfp4Experts(*tensors), **given)
        for tensors in (checkpoint, clean)
    )
    assert_layers_agree(y, want, MAX_OF_MANY, 1 - MAX_OF_MANY**2)
    assert relative_l2(other, want) > 2 * MAX_OF_MANY, "the wide rows do not show in this layer's result"


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("num_ranks, option", SPREADS)
def test_bits_of_one_rank(gpus, generator, seed, pytestconfig, num_ranks, option):
    """Whatever the routing, whoever has how many tokens, in any order of events."""
    draw, options = random.Random(seed), dict(OPTIONS[option])
    experts = random_experts(SPREAD, options, generator)
    capacity = CAPACITY if num_ranks < 8 else CAPACITY_OF_EIGHT
    layer = SpreadLayer.make(gpus(type(experts)), experts, num_ranks, capacity=capacity, **options)
    for case, routing in draw.sample(SCENARIOS, pytestconfig.getoption("scenarios") or NUM_SCENARIOS[num_ranks]):
        sizes = [tokens_of(case, rank, num_ranks, capacity, draw) for rank in range(num_ranks)]
        batches = [draw_batch(SPREAD, size, routing, generator, num_ranks) for size in sizes]
        got = layer.spread.run(batches, draw.randrange(2**31))
        layer.assert_same_bits(batches, got, seed, f"{case} {routing}, {sizes} tokens")


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("num_experts, num_logical, num_ranks", MANY_EXPERTS)
def test_more_experts_than_one_rank_holds(gpus, generator, seed, num_experts, num_logical, num_ranks):
    """Redundant experts are copies: the bits are those of one rank that holds each expert once, up to the last id."""
    few, num_tokens = ModelShape(256, 128, num_logical, 3, num_logical), 12
    experts = random_experts(few, {}, generator)
    many = replace(few, num_experts=num_experts, local_experts=num_experts // num_ranks)
    batches = [draw_batch(many, num_tokens, "uniform", generator, num_ranks) for _ in range(num_ranks)]
    for rank, batch in enumerate(batches):
        last = (rank + 1) * (num_experts // num_ranks) - 1  # of the rank's own experts
        batch.topk_ids[:2] = torch.tensor([[num_experts - 1, num_experts, 0], [last, last - 1, 2**31 - 1]])
    got = EmulatedLayer(gpus(), many, copies_of(experts, num_experts), num_tokens, num_ranks).run(batches, seed)
    logical = joined(batches)
    ids = logical.topk_ids
    logical = replace(logical, topk_ids=torch.where(ids < num_experts, ids.remainder(num_logical), -1).where(ids >= 0, -1))
    (want,) = EmulatedLayer(gpus(), few, experts, num_ranks * num_tokens).run([logical], seed)
    assert want[0].any() and torch.equal(bits_of(torch.cat(got)), bits_of(want))


@pytest.mark.one_seed_in(2)
@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("num_ranks, num_calls", [(2, 12), (4, 6)])
def test_ranks_that_run_ahead_and_late(gpus, generator, seed, num_ranks, num_calls):
    """Calls queued without looking, as graph replays are: the number of tokens changes, and whoever is ready goes on."""
    draw = random.Random(seed)
    experts = random_experts(SPREAD, {}, generator)
    layer = SpreadLayer.make(gpus(), experts, num_ranks, capacity=40)
    calls = []
    for _ in range(num_calls):
        batches = [
            draw_batch(
                SPREAD,
                draw.choice((0, 1, draw.randint(2, 40))),
                draw.choice(("uniform", "zipf", "to_rank_0")),
                generator,
                num_ranks,
            )
            for _ in range(num_ranks)
        ]
        for rank in range(num_ranks):
            layer.spread.delay(rank, draw.choice((0, 0, 1_000, 300_000)))
        calls.append((batches, [layer.spread.enqueue(rank, batch) for rank, batch in enumerate(batches)]))
    layer.spread.gpus.run(seed)
    for number, (batches, got) in enumerate(calls):
        layer.assert_same_bits(batches, got, seed, f"call {number} of {num_calls}")


def test_a_rank_that_never_comes_is_named(gpus, generator, seed):
    layer = EmulatedLayer(gpus(), SPREAD, random_experts(SPREAD, {}, generator), 8, 4, timeouts_s=[1e-3] * 4)
    for rank in (0, 1, 3):
        layer.enqueue(rank, draw_batch(SPREAD, 5, "uniform", generator), layer=7)
    gpus().run(seed)
    for rank in (0, 1, 3):
        with pytest.raises(
            PeerTimeout, match=rf"rank {rank} waited 0.001 s for rank 2 in layer 7 \(launch 1\): its token counts"
        ):
            layer.ranks[rank].failure.check()
    assert layer.ranks[2].failure.message() is None


@pytest.mark.one_seed_in(4)
def test_a_rank_that_ends_within_a_layer_is_named(gpus, generator, seed):
    """Rank 3 gives its counts but has no patience with rank 2, which is late; the others miss what rank 3's experts owe them."""
    layer = EmulatedLayer(gpus(), SPREAD, random_experts(SPREAD, {}, generator), 8, 4, timeouts_s=[1e-2, 1e-2, 1e-2, 1e-4])
    layer.delay(2, 2_000_000)
    for rank in range(4):
        layer.enqueue(rank, draw_batch(SPREAD, 5, "uniform", generator), layer=7)
    gpus().run(seed)
    assert "rank 3 waited 0.0001 s for rank 2 in layer 7 (launch 1): its token counts" in layer.ranks[3].failure.message()
    for rank in (0, 1, 2):
        words = f"rank {rank} waited 0.01 s for rank 3 in layer 7 (launch 1): the expert outputs it owes this rank"
        assert words in layer.ranks[rank].failure.message()
