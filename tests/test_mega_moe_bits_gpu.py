"""The same bits: again and again, whatever else is in the batch, with every tile, and when a CUDA graph replays it."""

from __future__ import annotations

import random

import pytest
import torch
from mega_moe_rig import FACTOR, PAIRS, Batch, Rig, make_rig
from tqdm import tqdm

from hopper_moe.kernels.benchmarks.workload import ROUTINGS, SHAPES, random_routing, random_tokens
from hopper_moe.kernels.expert_blocks import block_routing
from hopper_moe.kernels.tile_table import TILES, forced_tile

pytestmark = pytest.mark.gpu
REPETITIONS = 100


@pytest.fixture(scope="module")
def rig(seed) -> Rig:
    return make_rig(seed, SHAPES["flash"], 32, 4096)


@pytest.mark.parametrize("num_tokens, routing", [(1, "uniform"), (129, "zipf"), (2048, "one_hot")])
def test_repetitions(rig, num_tokens, routing):
    batch = rig.batch(num_tokens, routing)
    first = rig.run(batch)
    different = sum(not torch.equal(rig.run(batch, poison=False), first) for _ in range(REPETITIONS))
    assert different == 0, f"{different} of {REPETITIONS} repetitions differ"


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_row_does_not_depend_on_its_batch(rig, routing):
    batch = rig.batch(4096, routing)
    whole = rig.run(batch)
    for size in (1, 8, 64):
        for begin in (0, 64, 2000, 4096 - size):
            rows = slice(begin, begin + size)
            assert torch.equal(rig.run(batch.rows(rows)), whole[rows]), f"rows {begin}..{begin + size - 1} alone have other bits"
    order = torch.randperm(4096, device="cuda", generator=rig.generator)
    mixed = Batch(batch.x[order], batch.topk_ids[order], batch.topk_weights[order])
    assert torch.equal(rig.run(mixed), whole[order]), "the order of tokens changes bits"


@pytest.mark.parametrize("num_tokens, routing", [(1, "uniform"), (60, "uniform"), (300, "one_hot")])
def test_a_row_does_not_depend_on_the_tile(rig, num_tokens, routing):
    batch = rig.batch(num_tokens, routing)
    want = rig.run(batch)
    for tiles in (*map(forced_tile, TILES), PAIRS):
        assert torch.equal(rig.with_tiles(tiles, 300).run(batch), want), f"other bits with {tiles}"


def test_graph_replays(rig, pytestconfig, seed):
    """Routing, tokens and token counts change between replays; every replay is compared with an eager call that masks by hand."""
    replays, sizes = pytestconfig.getoption("replays"), (1, 8, 64, 300)
    draw = random.Random(seed)
    for size in sizes:
        static, valid = rig.batch(size), torch.tensor([size], dtype=torch.int32, device="cuda")
        y = torch.empty_like(static.x)

        def call(y=y, static=static, valid=valid):
            rig.mm(
                static.x, static.topk_ids, static.topk_weights, rig.packed, out=y, num_valid_tokens=valid,
                swiglu_limit=rig.shape.swiglu_limit, routed_scaling_factor=FACTOR,
            )  # fmt: skip

        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        different = []
        for replay in tqdm(range(replays // len(sizes)), desc=f"replays at {size} tokens"):
            num_valid = draw.randint(0, size)
            ids, weights = random_routing(size, 32, rig.shape.top_k, draw.choice(ROUTINGS), rig.generator)
            ids.masked_fill_(torch.rand(ids.shape, device="cuda", generator=rig.generator) < 0.1, -1)
            static.x.copy_(random_tokens(rig.shape, size, rig.generator))
            static.topk_ids.copy_(ids)
            static.topk_weights.copy_(weights)
            valid.fill_(num_valid)
            y.fill_(float("nan"))
            graph.replay()
            ids[num_valid:] = -1
            if not torch.equal(y, rig.run(Batch(static.x, ids, weights), poison=False)):
                different.append(replay)
        assert not different, f"{len(different)} replays at {size} tokens differ, first {different[:5]}"


def test_graph_replays_of_blocks_of_rows(rig, seed):
    """As DeepEP's low-latency mode brings them: how many rows a block has is known on the device only, and what lies behind them
    is NaN. The bits are those of the rows alone."""
    draw, num_experts = random.Random(seed), rig.mm.shard.num_local_experts
    rows = rig.mm.shard.max_tokens_per_rank // num_experts
    counts = torch.zeros(num_experts, dtype=torch.int32, device="cuda")
    x = torch.zeros(num_experts * rows, rig.shape.hidden_size, dtype=torch.bfloat16, device="cuda")
    y = torch.empty_like(x)

    def call():
        ids, weights = block_routing(counts, rows, rig.shape.top_k)
        options = {"swiglu_limit": rig.shape.swiglu_limit, "routed_scaling_factor": FACTOR}
        rig.mm(x, ids, weights, rig.packed, out=y, **options)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for most in (0, rows, *(draw.randint(1, rows) for _ in range(30))):
        counts.copy_(torch.tensor([draw.choice((0, most, draw.randint(0, most))) for _ in range(num_experts)]))
        ids, weights = block_routing(counts, rows, rig.shape.top_k)
        is_row = ids[:, 0] >= 0
        x.copy_(random_tokens(rig.shape, len(x), rig.generator).masked_fill(~is_row[:, None], float("nan")))
        y.fill_(float("nan"))
        graph.replay()
        alone = rig.run(Batch(x[is_row], ids[is_row], weights[is_row]), poison=False)
        assert torch.equal(y[is_row], alone) and not y[~is_row].any()
