"""The measured table behind `auto`, the comparison's own arithmetic, and the expansion of FP4 experts to FP8. No GPU needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from layer_compare import relative_l2
from layer_data import make_layer
from test_benchmark_report import made_up_row

from hopper_moe.eval.layer_bench import backends, contenders
from hopper_moe.eval.layer_bench.accuracy import expanded
from hopper_moe.eval.layer_bench.baselines import BASELINES, create_baseline
from hopper_moe.eval.layer_bench.cli import main as bench
from hopper_moe.kernels import measured, reference
from hopper_moe.kernels.benchmarks import report
from hopper_moe.kernels.benchmarks.workload import SHAPES
from hopper_moe.kernels.device import Device
from hopper_moe.kernels.reference_weights import Mxfp4Experts
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends import auto_table
from hopper_moe.moe_backends.auto_table import fastest
from hopper_moe.quantization.codecs import dequantize_mxfp4
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.fp8_blocks import expand_mxfp4

FLASH = ExpertShard.of(SHAPES["flash"], 8192, num_experts=32)
BETWEEN = replace(FLASH, hidden_size=6144, intermediate_size=3072, num_experts=48, num_local_experts=48)
H200 = measured.gpus()["H200"]
H20 = Device("NVIDIA H20", 78, 4023, 1980)


def rows_of(kernel: str, us: dict[int, float], shape: str = "flash") -> list[report.Measurement]:
    rows = [made_up_row(tokens, value, shape) for tokens, value in us.items()]
    return [report.Measurement(**{**row.__dict__, "kernel": kernel}) for row in rows]


@pytest.fixture
def path(tmp_path):
    """A table in which mxfp4_mega wins decode of Flash and w4a16 that of Pro; above 128 tokens it is the other way round."""
    path = tmp_path / "table.json"
    measured.label_to_write(H200, "H200", path)
    auto_table.update(rows_of("mxfp4_mega", {1: 50, 8: 100, 128: 200, 512: 900}) + rows_of("marlin", {1: 10}), path)
    auto_table.update(rows_of("w4a16", {1: 60, 8: 90, 128: 300, 512: 300}), path)  # replaces: one run decides
    assert {name for entry in auto_table.load(path) for name in entry.us} == {"w4a16"}
    auto_table.update(
        rows_of("mxfp4_mega", {1: 50, 8: 100, 128: 200, 512: 900})
        + rows_of("w4a16", {1: 60, 8: 90, 128: 300, 512: 300})
        + rows_of("mxfp4_mega", {1: 120}, "pro")
        + rows_of("w4a16", {1: 110}, "pro"),
        path,
    )
    return path


def test_the_mean_over_decode_sizes_decides(path):
    kernel, reason = fastest(("mxfp4_mega", "w4a16"), H200, FLASH, path=path)
    assert kernel == "mxfp4_mega" and "2 of 3 batch sizes of 1 to 128 tokens" in reason and "for this layer" in reason
    assert "1.17x before w4a16" in reason
    kernel, reason = fastest(("mxfp4_mega", "w4a16"), H200, FLASH, auto_table.PREFILL, path)
    assert kernel == "w4a16" and "1 of 1 batch sizes of 512 to 512 tokens" in reason


def test_an_unknown_layer_takes_the_nearest_and_says_so(path):
    kernel, reason = fastest(("mxfp4_mega", "w4a16"), H200, BETWEEN, path=path)
    assert kernel == "w4a16" and "the nearest layer measured (7168 x 3072, 48 experts, top 6 on H200)" in reason
    kernel, reason = fastest(("mxfp4_mega", "w4a16"), H20, FLASH, path=path)
    assert kernel == "mxfp4_mega" and "for this layer (4096 x 2048, 32 experts, top 6 on H200)" in reason
    assert "NVIDIA H20 (78 SMs, 4023 GB/s, 1980 MHz) was not measured; NVIDIA H200" in reason


def test_no_entry_for_all_of_them_is_no_verdict(path, tmp_path):
    assert fastest(("mxfp4_mega", "fp8_mega"), H200, FLASH, path=path) is None
    assert fastest(("mxfp4_mega", "w4a16"), H200, FLASH, path=tmp_path / "none.json") is None


def test_the_kept_table_can_be_read_and_knows_only_our_kernels():
    kept = auto_table.load()
    assert kept, "the table that came with the package is empty"
    for entry in kept:
        assert entry.us and set(entry.us) <= set(contenders.OURS) and all(us > 0 for us in entry.us.values())


def test_who_wins_where():
    rows = rows_of("mxfp4_mega", {1: 50.0, 64: 150.0}) + rows_of("marlin", {1: 100.0, 64: 120.0})
    assert backends.winners(rows) == (
        "mxfp4_mega is the fastest at 1 (2.00x before marlin)\nmarlin is the fastest at 64 (1.25x before mxfp4_mega)"
    )
    lines = backends.table(rows).splitlines()
    assert lines[0].split() == ["tokens", "mxfp4_mega", "marlin"]
    assert "50.0*" in lines[1] and "120.0*" in lines[2] and "100.0 " in lines[1]


def test_baselines_say_what_is_missing(monkeypatch):
    with pytest.raises(Refusal, match="'cutlass' is not a baseline: use one of marlin"):
        create_baseline("cutlass")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in BASELINES:
        with pytest.raises(Refusal, match=f"{name}: .* is not installed; leave it out or install it"):
            create_baseline(name)


def test_fp4_experts_become_fp8_without_loss(seed):
    layer = make_layer(seed, num_experts=3, hidden_size=256, intermediate_size=128)
    for weight, scale in ((layer.w13[0], layer.w13_scale[0]), (layer.w2[1], layer.w2_scale[1])):
        q, block = expand_mxfp4(weight, scale)
        values = q.double() * block.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(values, dequantize_mxfp4(weight, scale))
    given = (layer.x, layer.topk_ids, layer.topk_weights)
    both = [
        reference.exact(*given, experts, swiglu_limit=2.0) for experts in (Mxfp4Experts(*layer.weights), expanded(layer.weights))
    ]
    assert relative_l2(*both) < 1e-12


def test_blocks_that_fp8_cannot_hold_are_refused():
    weight = torch.full((128, 64), 0x11, dtype=torch.uint8)  # 0.5 everywhere ...
    weight[7, 9] = 0x17  # ... but for a 6
    scale = torch.full((128, 4), 127, dtype=torch.uint8)
    scale[5, 1] = 127 - 14
    expand_mxfp4(weight, scale)
    scale[5, 1] = 127 - 15
    with pytest.raises(Refusal, match="32 weights are too far below the largest of their 128 x 128 block"):
        expand_mxfp4(weight, scale)


def test_the_accuracy_table_on_a_cpu():
    run = CliRunner().invoke(bench, ["accuracy", "--shape", "small", "--tokens", "4"], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    found = {line[:28].strip(): [float(cell) for cell in line[28:].split()] for line in run.output.splitlines()[2:]}
    for name, (low, high) in {
        "definition of w4a16": (1e-3, 5e-3),
        "definition of mxfp4_mega": (3e-2, 6e-2),
        "definition of fp8_mega": (3e-2, 6e-2),
    }.items():
        relative, distance, worst = found[name]
        assert low < relative < high and distance < relative**2 and relative <= worst < 2 * relative


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run here")
def test_commands_refuse_in_one_sentence():
    run = CliRunner().invoke(bench, ["backends", "--tokens", "1", "2", "--kernels", "w4a16", "marlin"])
    assert run.exit_code == 2 and "this machine has no CUDA GPU" in run.output
