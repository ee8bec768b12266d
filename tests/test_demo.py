"""The main job end to end in real processes: `hopper-moe demo`, `eval compare --serve`, and sabotages that must be caught."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from hopper_moe.eval import serving
from hopper_moe.eval.accuracy_table.cpu_host import run_all
from hopper_moe.eval.demo import demo, tiny_model
from hopper_moe.kernels.device import SM90
from hopper_moe.launch import machine
from hopper_moe.launch.machine import Gpu, Machine
from hopper_moe.moe_backends.sglang.hyper_connections import FUSE, hyper_connection_refusals
from hopper_moe.quantization.checkpoint_check import read_checkpoint
from hopper_moe.quantization.errors import Refusal


def hopper_moe(*args: str) -> subprocess.CompletedProcess:
    code = "from hopper_moe.launch.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=500)


def test_demo_serves_and_scores_at_least_80_percent(tmp_path: Path) -> None:
    result = hopper_moe("demo", "--num-examples", "80", "--kernels", "reference", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "answer:   7+5=12. \\boxed{12}" in result.stdout
    assert json.loads((tmp_path / "reference" / "metrics.json").read_text())["pass@1"] >= 0.8
    assert "OK: every kernel" in result.stdout


def test_demo_fails_on_a_checkpoint_whose_experts_changed_places(tmp_path: Path) -> None:
    """What mixing up local and global expert ids does."""
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_model(), folder)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    mixed = {re.sub(r"experts\.(\d)\.", lambda m: f"experts.{7 - int(m[1])}.", name): t for name, t in tensors.items()}
    assert mixed.keys() == tensors.keys()
    save_file(mixed, file, metadata={"format": "pt"})
    result = hopper_moe(
        "demo", "--num-examples", "40", "--kernels", "w4a16", "--model", str(folder), "--out", str(tmp_path / "out")
    )
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAILED: w4a16 below 80%" in result.stderr


def test_demo_refuses_a_kernel_this_machine_lacks() -> None:
    result = hopper_moe("demo", "--kernels", "reference,nonsense")
    assert result.returncode == 2
    assert "kernel nonsense does not run on the CPU host" in result.stderr
    assert "---" not in result.stdout, "refused before the first server was started"


def test_on_a_hopper_machine_the_gpu_model_is_served_as_sglang_needs_it(monkeypatch, tmp_path) -> None:
    """Its small hidden size is refused without the variable, which the server inherits."""
    monkeypatch.delenv(FUSE)
    h200 = Gpu(0, "NVIDIA H200", SM90, 140 << 30, 139 << 30, 132, 18)
    monkeypatch.setattr(machine, "detect", lambda: Machine((h200,)))
    facts, _ = read_checkpoint(tiny_model().with_name("gpu_dsv4"))
    assert list(hyper_connection_refusals(facts, os.environ))

    @contextmanager
    def served(model: str, *_how: object):
        assert Path(model).name == "gpu_dsv4" and not list(hyper_connection_refusals(facts, os.environ))
        raise Refusal("far enough")
        yield

    monkeypatch.setattr(serving, "served", served)
    result = CliRunner().invoke(demo, ["--kernels", "mxfp4_mega", "--out", str(tmp_path)])
    assert "far enough" in str(result.exception), result.output


def test_compare_starts_both_servers(tmp_path: Path) -> None:
    args = ("eval", "compare", "--serve", str(tiny_model()), "--kernels", "transformers,w4a16")
    result = hopper_moe(*args, "--num-examples", "40", "--margin", "9", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    compared = json.loads((tmp_path / "w4a16-against-transformers" / "compare.json").read_text())
    assert (compared["label_a"], compared["label_b"], compared["verdict"]) == ("transformers", "w4a16", "same")
    assert compared["paired_questions"] == 40


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> dict[str, dict]:
    """Kernels and sabotages on 100 questions."""
    return {row["name"]: row for row in run_all(tiny_model(), tmp_path_factory.mktemp("truth"), 100)}


def test_each_sabotage_is_caught(truth: dict[str, dict]) -> None:
    sabotaged = {name: row["verdict"] for name, row in truth.items() if row["sabotage"]}
    assert sabotaged == dict.fromkeys(
        ("scaling factor dropped", "scaling factor applied twice", "clamp missing", "gate and up swapped"), "worse"
    )


def test_honest_kernels_are_not(truth: dict[str, dict]) -> None:
    for name in ("w4a16", "transformers"):
        assert truth[name]["verdict"] != "worse"
        assert abs(truth[name]["difference"]) <= 0.05
