"""Mistakes in the CUDA sources that the tests on emulated GPUs must not let through. Each is compiled on its own."""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from emulated_layer import (
    CAPACITY,
    SPREAD,
    EmulatedLayer,
    EmulationError,
    Gpus,
    SpreadLayer,
    compile_emulated,
    draw_batch,
)
from layer_compare import relative_l2
from mega_moe_rig import FACTOR

from hopper_moe.kernels import jit, reference
from hopper_moe.kernels.benchmarks.workload import random_experts, random_wide_experts

MAX_STEPS = 20_000_000  # four times what the layer takes without a mistake


@dataclass(frozen=True)
class Mistake:
    file: str
    right: str
    wrong: str
    words: str = "^(NaN from one rank alone|other bits than one rank alone|a CTA ended with copies in flight)"
    options: tuple[tuple[str, int], ...] = ()
    wide: bool = False  # of the library for wide scales, whose values are compared with the reference
    races: bool = False  # what it leaves unordered has to be looked for


def race(file: str, right: str, wrong: str) -> Mistake:
    return Mistake(file, right, wrong, "^race: ", races=True)


MISTAKES = {
    "results are read before their rank has announced them": Mistake(
        "combine.cuh",
        "  if (s.num_ranks > 1)\n    return has_reached(",
        "  if (s.num_ranks > 1)\n    return true || has_reached(",
    ),
    "rows are announced before the copy engine has written them": Mistake("epilogue.cuh", "    ptx::bulk_wait<0>();\n", ""),
    "a wave overwrites the pools of the one before": Mistake(
        "dispatch.cuh", "if (!products_done(", "if (false && !products_done(", options=(("wave_rows", 256),)
    ),
    "sums are read before their products are done": Mistake(
        "mainloop_fp4.cuh",
        "    ptx::wgmma_wait<0>();\n    promote<N, kFirst>(sum, d, stage.data + stage_scales(N), me_.lane);\n",
        "    promote<N, kFirst>(sum, d, stage.data + stage_scales(N), me_.lane);\n    ptx::wgmma_wait<0>();\n",
    ),
    "a stage is given back before its products are done": Mistake(
        "mainloop_fp4.cuh", "        ptx::wgmma_wait<1>();\n        this->release(before);", "        this->release(before);"
    ),
    "subnormal weights are decoded as normal ones": Mistake(
        "decode.cuh", "normal > subnormal ? normal : subnormal", "normal", "^other values than the reference", wide=True
    ),
    "the row factor is that of E4M3 weights": Mistake(
        "layout.cuh", "kWideScales ? HM_WIDE_BASE_SHIFT : HM_BASE_SHIFT", "HM_BASE_SHIFT", "^other values than the ref", wide=True
    ),
    "the wide kernel decodes to E4M3": Mistake(
        "decode.cuh", "magnitudes<kWideScales>(delta[r])", "magnitudes<false>(delta[r])", "^other values than the ref", wide=True
    ),
    "counters of the last launch are left": Mistake("mega_moe.cuh", "  clear(p.ws.x_ready, p.shape.max_blocks());\n", ""),
    "products wait for a row that there is not": Mistake(
        "pipeline.cuh",
        "task.is_l1 ? task.block.num_rows :",
        "task.is_l1 ? task.block.num_rows + 1 :",
        "^no end .* in wait_at_least",
    ),
    "another GPU's flag is acquired for this GPU only": race(
        "peers.cuh", "ptx::load_acquire_system(flag)", "ptx::load_acquire_gpu(flag)"
    ),
    "a tile goes to the copy engine without a proxy fence": race(
        "epilogue.cuh", "    ptx::fence_async_shared();  // covers what the math warps stored and this lane has acquired\n", ""
    ),
    "one lane speaks for the others' rows without a __syncwarp": race(
        "dispatch.cuh",
        "  __syncwarp();\n  if (lane == 0) ptx::red_add_release_gpu(p.x_ready",
        "  if (lane == 0) ptx::red_add_release_gpu(p.x_ready",
    ),
    "single lanes see the results of other ranks, and a vote speaks for them": race(
        "combine.cuh", "    ptx::sync_warp(kFirstWarpBarrier + threadIdx.x / 32);\n", ""
    ),
    "one lane sees the last task of a column group, and a vote speaks for it": race(
        "epilogue.cuh", "    __syncwarp();  // makes what lane 0 has acquired", "    // makes what lane 0 has acquired"
    ),
    "single lanes see the end of a wave, and a vote speaks for them": replace(
        race("dispatch.cuh", "    __syncwarp();  // makes what single lanes", "    // makes what single lanes"),
        options=(("wave_rows", 256),),
    ),
    "a tile is given back while the copy engine reads it": race("epilogue.cuh", "    ptx::bulk_wait_read<0>();\n", ""),
}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Callable[[str], Path]:
    """A function from a mistake's name to the library that has it, compiled on first use."""

    @functools.cache
    def get(name: str) -> Path:
        folder, mistake = tmp_path_factory.mktemp("mistake"), MISTAKES[name]
        copy = shutil.copytree(jit.SOURCE_DIR, folder / "csrc")
        text = (copy / mistake.file).read_text()
        assert text.count(mistake.right) == 1, f"{mistake.file} has changed: write this mistake anew"
        (copy / mistake.file).write_text(text.replace(mistake.right, mistake.wrong))
        library = "mxfp4_wide" if mistake.wide else "mxfp4_mega"
        return compile_emulated(library, folder, copy, races=mistake.races)

    return get


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if mistake.wide])
def test_a_mistake_with_wide_scales_shows(compiled, seed, name):
    generator = torch.Generator().manual_seed(seed)
    gpus = Gpus(compiled(name), MAX_STEPS)
    experts = random_wide_experts(SPREAD, 16, generator, "cpu")
    batch = draw_batch(SPREAD, 40, "uniform", generator)
    (y,) = EmulatedLayer(gpus, SPREAD, experts, 40).run([batch], seed)
    want = reference.moe_layer(
        batch.x, batch.topk_ids, batch.topk_weights, experts, swiglu_limit=SPREAD.swiglu_limit, routed_scaling_factor=FACTOR
    )

    def compare() -> None:
        error = relative_l2(y, want)
        assert error <= 1.5e-2, f"other values than the reference: {error}"

    with pytest.raises(AssertionError, match=MISTAKES[name].words):
        compare()


@pytest.mark.one_seed_in(4)
@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if not mistake.wide])
def test_a_mistake_shows(compiled, seed, name):
    mistake, draw, generator = MISTAKES[name], random.Random(seed), torch.Generator().manual_seed(seed)
    gpus = Gpus(compiled(name), MAX_STEPS)
    layer = SpreadLayer.make(gpus, random_experts(SPREAD, 16, generator, "cpu"), 2, **dict(mistake.options))
    if mistake.races:
        layer.spread.look_for_races()

    def calls() -> None:  # what shows least, rows that are announced too early, does in one of three or four
        for size in (CAPACITY, 9, 1, *(draw.randint(1, CAPACITY) for _ in range(40))):
            batches = [draw_batch(SPREAD, size, "uniform", generator) for _ in range(2)]
            layer.assert_same_bits(batches, layer.spread.run(batches, draw.randrange(2**31)), seed, f"{size} tokens")

    with pytest.raises((AssertionError, EmulationError), match=mistake.words):
        calls()
