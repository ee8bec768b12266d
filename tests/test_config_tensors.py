"""Memory figures without weights: the tensors that config.json implies, and a model of `--load-format dummy`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from small_v41 import nested

from hopper_moe.launch import cpu_arguments
from hopper_moe.launch.model_facts import read_model
from hopper_moe.quantization.checkpoint_check import read_checkpoint
from hopper_moe.quantization.checkpoint_memory import RankLayout, weights_per_rank
from hopper_moe.quantization.checkpoint_names import EXPERT_TENSOR
from hopper_moe.quantization.config_tensors import tensors_of
from hopper_moe.quantization.errors import Refusal

DATA = Path(__file__).parents[1] / "eval" / "data"
CHECKPOINTS = [DATA / "tiny_dsv4", DATA / "gpu_dsv4"]
RANKS = RankLayout(tp_size=2, ep_size=2, has_draft=True)


def config_only(checkpoint: Path, folder: Path, **changes: object) -> Path:
    folder.mkdir()
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: path.name)
def test_they_are_those_of_the_checkpoint(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    wanted = {name: (info.dtype, info.shape, info.num_bytes) for name, info in read_checkpoint(checkpoint)[1].items()}
    wanted = {name: told for name, told in wanted.items() if not EXPERT_TENSOR.match(name)}
    found = tensors_of(config, "config.json")
    assert found and {name: (info.dtype, info.shape, info.num_bytes) for name, info in found.items()} == wanted


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: path.name)
def test_a_folder_without_weights_has_the_checkpoints_memory(tmp_path, checkpoint):
    loaded = read_model(str(config_only(checkpoint, tmp_path / "config")), load_format="dummy")
    loaded.require_complete()
    facts, tensors = read_checkpoint(checkpoint)
    assert loaded.facts == facts and loaded.is_random
    assert weights_per_rank(loaded.facts, loaded.tensors, RANKS) == weights_per_rank(facts, tensors, RANKS)


def test_the_draft_is_counted(tmp_path):
    folder = config_only(DATA / "tiny_dsv4", tmp_path / "config", num_nextn_predict_layers=1)
    loaded = read_model(str(folder), load_format="dummy")
    found, without = (weights_per_rank(loaded.facts, loaded.tensors, ranks) for ranks in (RANKS, replace(RANKS, has_draft=False)))
    assert found.draft_experts and found.other > without.other


def test_an_index_whose_files_were_not_fetched_does_not_matter(tmp_path):
    folder = config_only(DATA / "tiny_dsv4", tmp_path / "config")
    shutil.copy(DATA / "tiny_dsv4" / "model.safetensors.index.json", folder)
    assert read_model(str(folder), load_format="dummy").facts.expert_dtype == "fp4"
    with pytest.raises(Refusal, match="does not exist: fetch the missing file"):
        read_model(str(folder))


def test_without_weights_sglang_builds_fp4_experts(tmp_path, monkeypatch):
    folder = config_only(DATA / "tiny_dsv4", tmp_path / "config", expert_dtype="fp8")
    with pytest.raises(Refusal, match="says expert_dtype=fp8, but the expert weights are fp4"):
        read_model(str(folder), load_format="dummy")
    monkeypatch.setenv("SGLANG_DSV4_FP4_EXPERTS", "0")
    assert read_model(str(folder), load_format="dummy").facts.expert_dtype == "fp8"


def test_of_other_models_only_experts_are_counted(tmp_path):
    folder = tmp_path / "v41"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(nested()))
    loaded = read_model(str(folder), load_format="dummy")
    assert loaded.tensors is None and weights_per_rank(loaded.facts, None, RANKS).other is None


@pytest.mark.parametrize("given", [["--load-format", "dummy"], ["--load-format=dummy"]])
def test_the_cpu_host_needs_weights(given):
    with pytest.raises(Refusal, match="--load-format dummy makes up weights for Hopper GPUs"):
        cpu_arguments.read(["--device", "cpu", *given]).require_weights()
    cpu_arguments.read(["--load-format", "auto"]).require_weights()
