"""What a benchmark leaves behind (keys, floors, table, plot), what it refuses, and the tuner's arithmetic. No GPU needed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from hopper_moe.kernels import measured, tile_table
from hopper_moe.kernels.benchmarks import measure, mega_moe, report, tune_tiles
from hopper_moe.kernels.benchmarks.options import take_lists
from hopper_moe.kernels.benchmarks.workload import SHAPES
from hopper_moe.kernels.tile_table import TILES, TileTable, smallest_tiles
from hopper_moe.quantization.codecs import quantize_mxfp4
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import pack_experts

KEYS = (
    "kernel sku shape ranks local_experts tokens touched_experts routing graph us_median us_p10 us_p90 us_max weights_tbps "
    "hbm_read_tbps tflops fp8_matmul_tflops commit"
).split()  # as the issue lists them
RESULTS = Path(report.__file__).parent / "results"


def made_up_row(tokens: int, us: float, shape: str = "flash") -> report.Measurement:
    experts = min(SHAPES[shape].local_experts, tokens * SHAPES[shape].top_k)
    return report.Measurement(
        "mxfp4_mega", "H200", shape, 1, SHAPES[shape].local_experts, tokens, float(experts), "uniform", True,
        us, 0.9 * us, 1.2 * us, us, report.weight_bytes(SHAPES[shape], experts) / us / 1e6, 4.4,
        report.layer_flops(SHAPES[shape], tokens) / us / 1e6, 1463.0, "abc1234",
    )  # fmt: skip


ROWS = [made_up_row(tokens, 40.0 + tokens) for tokens in (1, 8, 64, 512, 8192)] + [made_up_row(64, 480.0, "pro")]


def test_lines_have_exactly_the_keys(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    report.save(ROWS, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(list(line) == KEYS for line in lines) and len(lines) == len(ROWS)
    assert lines[0]["kernel"] == "mxfp4_mega" and lines[0]["graph"] is True
    assert report.load(path) == ROWS
    for wrong in ({**lines[0], "extra": 1}, {key: value for key, value in lines[0].items() if key != "commit"}):
        path.write_text(json.dumps(wrong) + "\n")
        with pytest.raises(TypeError):
            report.load(path)


def test_a_line_from_what_was_measured():
    kept = ROWS[1]  # 8 tokens, 48 us, 32 of the Flash experts
    num_bytes = report.weight_bytes(SHAPES["flash"], kept.touched_experts)
    run = {
        name: getattr(kept, name)
        for name in ("kernel", "sku", "shape", "ranks", "local_experts", "tokens", "routing", "graph", "commit")
    }
    spread = (kept.us_median, kept.us_p10, kept.us_p90)
    made = report.Measurement.of(
        spread, slowest=kept.us_max, touched=kept.touched_experts, num_bytes=num_bytes, ceilings=(4.4, 1463.0), **run
    )
    assert made.__dict__.keys() == kept.__dict__.keys()
    for name, value in kept.__dict__.items():
        if name not in ("weights_tbps", "tflops"):
            assert getattr(made, name) == (pytest.approx(value) if isinstance(value, float) else value), name
    assert made.weights_tbps == pytest.approx(kept.weights_tbps, abs=5e-4) and made.tflops == pytest.approx(kept.tflops, abs=5e-3)


def test_kept_results_can_be_read():
    """Every committed run has exactly the keys and possible numbers."""
    kept = sorted(RESULTS.glob("*.jsonl"))
    assert kept, f"no results in {RESULTS}"
    for path in kept:
        for line, row in zip(path.read_text().splitlines(), report.load(path), strict=True):
            assert sorted(json.loads(line)) == sorted(KEYS), path
            assert 0 < row.us_p10 <= row.us_median <= row.us_p90 and row.us_max >= row.us_median, (path, row)
            assert row.tflops < row.fp8_matmul_tflops and row.touched_experts <= row.local_experts, (path, row)
            assert row.tflops == pytest.approx(report.layer_flops(SHAPES[row.shape], row.tokens) / row.us_median / 1e6, rel=0.01)


def test_floors_are_the_designs():
    """Design, section 2: one expert 13.4 MB (Flash), 35.1 MB (Pro); 32 Flash experts 97 us, 48 Pro 383 us at 4.40 TB/s."""
    assert report.weight_bytes(SHAPES["flash"], 1) == pytest.approx(13.4e6, rel=5e-3)
    assert report.weight_bytes(SHAPES["pro"], 1) == pytest.approx(35.1e6, rel=5e-3)
    flash, large, pro = ROWS[2], ROWS[4], ROWS[5]
    assert flash.hbm_floor_us == pytest.approx(97, abs=0.5) and pro.hbm_floor_us == pytest.approx(383, abs=1)
    assert flash.floor_us == flash.hbm_floor_us and large.floor_us == large.compute_floor_us
    assert report.layer_flops(SHAPES["flash"], 8192) / 1030e6 == pytest.approx(
        2400, rel=0.01
    )  # the issue: 2400 us is 1030 TFLOP/s


def test_weight_bytes_are_those_of_packed_tensors():
    w13, w13_scale = quantize_mxfp4(torch.randn(2, 512, 384))
    w2, w2_scale = quantize_mxfp4(torch.randn(2, 384, 256))
    packed = pack_experts(w13, w13_scale, w2, w2_scale)
    size = sum(getattr(packed, field.name).numel() for field in dataclasses.fields(packed))
    assert report.weight_bytes(dataclasses.replace(SHAPES["flash"], hidden_size=384, intermediate_size=256), 2) == size
    copies = mega_moe.copies_of(packed, 3)
    assert len({copy.w2_packed.data_ptr() for copy in copies}) == 3
    assert all(torch.equal(copy.w13_packed, packed.w13_packed) for copy in copies)


def test_table_and_plot(tmp_path):
    printed = report.table(ROWS, [30.0, None, *range(4)]).splitlines()
    assert len({len(line) for line in printed}) == 1 and len(printed) == 1 + len(ROWS)
    assert printed[0].split("  ")[0].strip() == "tokens" and "41.0" in printed[1] and "30.0" in printed[1] and " - " in printed[2]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    report.save(ROWS[:5], files[0])
    report.save(ROWS[5:], files[1])
    if not report.can_plot():
        assert importlib.util.find_spec("matplotlib") is None
        return
    done = CliRunner().invoke(report.main, [*map(str, files), "--plot", str(tmp_path / "x.png")], catch_exceptions=False)
    assert done.exit_code == 0 and "8192" in done.output
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "x.png").stat().st_size > 10_000


def test_spread():
    times = [float(value) for value in range(1, 102)]
    random.shuffle(times)
    assert measure.spread(times) == (51.0, 11.0, 91.0)


def test_lists_on_the_command_line():
    given = ["--shape", "flash", "--tokens", "1", "8", "64", "--routing", "zipf", "--tokens", "2"]
    assert take_lists(given, "--tokens") == ("--shape flash --tokens 1 --tokens 8 --tokens 64 --routing zipf --tokens 2".split())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tokens", "1", "8", "--ranks", "4"], "--ranks 4"),
        (["--tokens", "0", "8"], "--tokens 0"),
        (["--tokens", "8", "--local-experts", "4"], "--local-experts 4 is below top_k 6"),
        (["--tokens", "1", "8"], "no CUDA GPU"),
    ],
)
def test_the_command_refuses_in_one_sentence(arguments, words):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "hopper_moe.kernels.benchmarks.mega_moe", "--shape", "flash", *arguments],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_compare_says_what_is_there():
    if importlib.util.find_spec("deep_gemm") is None:
        assert "deep_gemm is not installed" in mega_moe.deep_gemm_note()
    elif hasattr(importlib.import_module("deep_gemm"), "fp8_mega_moe"):
        with pytest.raises(Refusal, match="without --compare"):
            mega_moe.deep_gemm_note()
    else:
        assert "has no fp8_mega_moe" in mega_moe.deep_gemm_note()


@pytest.mark.parametrize("rows, experts, top_k", [(8, 32, 6), (24, 48, 6), (128, 32, 8), (8, 7, 3)])
def test_tuner_gives_every_expert_the_same_rows(rows, experts, top_k):
    ids, weights = tune_tiles.even_routing(rows, experts, top_k, device="cpu")
    assert ids.shape == weights.shape and ids.dtype is torch.int32
    assert torch.bincount(ids[ids >= 0].long(), minlength=experts).tolist() == [rows] * experts
    for row in ids.tolist():
        valid = [expert for expert in row if expert >= 0]
        assert len(set(valid)) == len(valid)


def test_tuner_compares_the_largest_tiles_without_padding():
    assert all(tune_tiles.LARGE_ROWS % tile == 0 for tile in TILES)


def test_tuner_chooses_the_smallest_of_the_fastest():
    assert tune_tiles.choose({8: 10.2, 16: 10.05, 32: 10.0, 64: 12.0}) == 16
    assert tune_tiles.choose({8: 10.0, 16: 11.0}) == 8
    us = {rows: {tile: 100.0 + tile for tile in TILES if tile >= rows} for rows in range(8, 129, 8)}
    assert tune_tiles.build_table(128, us) == smallest_tiles()
    assert tune_tiles.build_table(64, {rows: {64: 1.0} for rows in range(8, 65, 8)}).tail_tile[1:9] == (64,) * 8


@pytest.mark.parametrize("sku", ["H200", "H20", "GH200"])
def test_a_measured_table_replaces_one_record(sku, tmp_path):
    path = shutil.copy(measured.PATH, tmp_path / "measured.json")
    before, wanted = tile_table.tables(path), TileTable(64, (64,) * 17, 3)
    tile_table.keep(sku, wanted, "flash, abc1234", path)
    assert tile_table.tables(path) == {**before, sku: wanted}
    written = path.read_text()
    tile_table.keep(sku, wanted, "flash, abc1234", path)
    assert path.read_text() == written
    for section in ("gpus", "layers"):
        assert measured.read(path)[section] == measured.read()[section]
