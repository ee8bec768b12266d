"""The same bits: again and again, whatever else is in the batch, with every tile, and when a CUDA graph replays it."""

from __future__ import annotations

import random

import pytest
import torch
from mega_moe_rig import FACTOR, PAIRS, Batch, Rig, block_counts, make_rig
from tqdm import tqdm

from hopper_moe.kernels.benchmarks.workload import ROUTINGS, SHAPES, random_routing, random_tokens
from hopper_moe.kernels.expert_blocks import most_rows, run_on_blocks
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
    draw, num_experts, top_k = random.Random(seed), rig.mm.shard.num_local_experts, rig.shape.top_k
    block_rows = rig.mm.shard.max_tokens_per_rank // num_experts
    counts = torch.zeros(num_experts, dtype=torch.int32, device="cuda")
    blocks = torch.zeros(num_experts, block_rows, rig.shape.hidden_size, dtype=torch.bfloat16, device="cuda")
    listed = most_rows(num_experts, block_rows, top_k)
    y, options = blocks.new_empty(listed, rig.shape.hidden_size), {"swiglu_limit": rig.shape.swiglu_limit}

    def call():
        return run_on_blocks(blocks, counts, top_k, lambda *rows: rig.mm(*rows, rig.packed, out=y, **options))

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for num_tokens in (0, block_rows, *(draw.randint(1, block_rows) for _ in range(30))):
        counts.copy_(block_counts(num_tokens, num_experts, top_k, rig.generator))
        is_row = torch.arange(block_rows, device="cuda") < counts[:, None]
        rows = random_tokens(rig.shape, int(counts.sum()), rig.generator)
        blocks.fill_(float("nan"))
        blocks[is_row] = rows
        y.fill_(float("nan"))
        graph.replay()
        ids = torch.full((len(rows), top_k), -1, dtype=torch.int32, device="cuda")
        ids[:, 0] = is_row.nonzero()[:, 0]
        alone = rig.run(Batch(rows, ids, torch.ones_like(ids, dtype=torch.float32)), poison=False, routed_scaling_factor=1.0)
        assert torch.equal(found[is_row], alone) and not y[len(rows) :].any()
