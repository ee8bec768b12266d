"""Mistakes in the CUDA sources that the tests on emulated GPUs must not let through. Each is compiled on its own."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from emulated_layer import CAPACITY, SPREAD, EmulationError, Gpus, SpreadLayer, compile_emulated, draw_batch

from hopper_moe.kernels import jit
from hopper_moe.kernels.benchmarks.workload import random_experts

MAX_STEPS = 20_000_000  # four times what the layer takes without a mistake


@dataclass(frozen=True)
class Mistake:
    file: str
    right: str
    wrong: str
    words: str = "^(NaN from one rank alone|other bits than one rank alone|a CTA ended with copies in flight)"
    options: tuple[tuple[str, int], ...] = ()
    races: bool = False  # what it leaves unordered has to be looked for


def race(file: str, right: str, wrong: str) -> Mistake:
    return Mistake(file, right, wrong, "^race: ", races=True)


MISTAKES = {
    "results are read before their rank has announced them": Mistake(
        "combine.cuh", "if (s.num_ranks > 1) return has_reached(", "if (s.num_ranks > 1) return true || has_reached("
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
        "epilogue.cuh", "    ptx::fence_async_shared();   // what math stored, and this lane has acquired\n", ""
    ),
    "one lane speaks for the others' rows without a __syncwarp": race(
        "dispatch.cuh",
        "  __syncwarp();\n  if (lane == 0) ptx::red_add_release_gpu(p.x_ready",
        "  if (lane == 0) ptx::red_add_release_gpu(p.x_ready",
    ),
    "a tile is given back while the copy engine reads it": race("epilogue.cuh", "    ptx::bulk_wait_read<0>();\n", ""),
}


@pytest.fixture
def sources(tmp_path: Path, request) -> Path:
    """The CUDA sources with the test's mistake."""
    copy, mistake = tmp_path / "csrc", MISTAKES[request.getfixturevalue("name")]
    shutil.copytree(jit.SOURCE_DIR, copy)
    text = (copy / mistake.file).read_text()
    assert text.count(mistake.right) == 1, f"{mistake.file} has changed: write this mistake anew"
    (copy / mistake.file).write_text(text.replace(mistake.right, mistake.wrong))
    return copy


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows(sources, tmp_path, seed, name):
    mistake, draw, generator = MISTAKES[name], random.Random(seed), torch.Generator().manual_seed(seed)
    gpus = Gpus(compile_emulated("mega_moe", tmp_path, sources, races=mistake.races), MAX_STEPS)
    layer = SpreadLayer.make(gpus, random_experts(SPREAD, 16, generator, "cpu"), 2, **dict(mistake.options))
    if mistake.races:
        layer.spread.look_for_races()

    def calls() -> None:  # what shows least, rows that are announced too early, does in one of three or four
        for size in (CAPACITY, 9, 1, *(draw.randint(1, CAPACITY) for _ in range(40))):
            batches = [draw_batch(SPREAD, size, "uniform", generator) for _ in range(2)]
            layer.assert_same_bits(batches, layer.spread.run(batches, draw.randrange(2**31)), seed, f"{size} tokens")

    with pytest.raises((AssertionError, EmulationError), match=mistake.words):
        calls()
