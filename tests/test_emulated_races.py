"""No two accesses of the fused kernel to memory race: waits, fences and scopes order them all, on emulated GPUs.

`emulator/races.hpp` says what is looked for: the orderings that PTX and CUDA guarantee, and no others.
That mistakes of this kind are found is asked by `test_emulated_sabotage.py`.
"""

from __future__ import annotations

import random

import pytest
import torch
from emulated_layer import SPREAD, EmulatedLayer, compiled_on_first_use, draw_batch
from mega_moe_ranks import OPTIONS
from mega_moe_rig import RANDOM_EXPERTS, Batch, block_counts

from hopper_moe.kernels.benchmarks.workload import random_tokens
from hopper_moe.kernels.expert_blocks import most_rows, run_on_blocks
from hopper_moe.quantization.packing import PackedExperts

CASES = [("bf16", 1, 1), ("bf16", 1, 300), ("waves", 2, 150), ("pairs", 2, 150)]
CASES += [(option, 2, 40) for option in OPTIONS]


@pytest.fixture(scope="session")
def gpus(tmp_path_factory):
    return compiled_on_first_use(tmp_path_factory.mktemp, races=True)


@pytest.mark.one_seed_in(4)
@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("option, num_ranks, num_tokens", CASES)
def test_one_call(gpus, seed, option, num_ranks, num_tokens):
    draw, generator, options = random.Random(seed), torch.Generator().manual_seed(seed), dict(OPTIONS[option])
    weights = options.pop("weights", PackedExperts)
    experts = RANDOM_EXPERTS[weights](SPREAD, SPREAD.num_experts, generator, "cpu")
    layer = EmulatedLayer(gpus(weights), SPREAD, experts, num_tokens, num_ranks, **options)
    layer.look_for_races()
    batches = [draw_batch(SPREAD, num_tokens, draw.choice(("uniform", "zipf")), generator, num_ranks) for _ in range(num_ranks)]
    assert not any(y.isnan().any() for y in layer.run(batches, seed))


@pytest.mark.one_seed_in(4)
def test_blocks_of_rows(gpus, seed):
    """The list of rows that lie in a block per expert, and nobody's rows behind it (`test_emulated_gpu.test_blocks_of_rows`)."""
    generator = torch.Generator().manual_seed(seed)
    experts = RANDOM_EXPERTS[PackedExperts](SPREAD, 16, generator, "cpu")
    layer = EmulatedLayer(gpus(), SPREAD, experts, most_rows(16, 9, SPREAD.top_k))
    layer.look_for_races()
    counts = block_counts(random.Random(seed).randint(0, 9), 16, SPREAD.top_k, generator, "cpu")
    blocks = random_tokens(SPREAD, 16 * 9, generator, "cpu").view(16, 9, -1)
    is_row = torch.arange(9) < counts[:, None]
    blocks[~is_row] = float("nan")
    y = run_on_blocks(blocks, counts, SPREAD.top_k, lambda *rows: layer.run([Batch(*rows)], seed)[0])
    assert not y[is_row].isnan().any()


@pytest.mark.one_seed_in(4)
def test_calls_that_run_ahead(gpus, seed):
    """One call's counters, tokens and slots are the next one's."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    layer = EmulatedLayer(gpus(), SPREAD, RANDOM_EXPERTS[PackedExperts](SPREAD, 16, generator, "cpu"), 40, 2)
    layer.look_for_races()
    for _ in range(5):
        for rank in range(2):
            layer.delay(rank, draw.choice((0, 0, 100_000)))
            layer.enqueue(rank, draw_batch(SPREAD, draw.choice((0, 1, draw.randint(2, 40))), "uniform", generator, 2))
    gpus().run(seed)
