"""Bad environments, arguments and models: each is refused with one sentence by `hopper-moe serve`, and nothing is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_checkpoint import CONFIG as SMALL_CONFIG
from small_checkpoint import cached, edit_tensors, make_state

from hopper_moe.kernels.device import SM90
from hopper_moe.launch import doctor_checks
from hopper_moe.launch import machine as machines
from hopper_moe.launch.cli import main
from hopper_moe.launch.machine import GIB, Gpu, Machine
from hopper_moe.moe_backends import env
from hopper_moe.quantization.checkpoint import write_checkpoint
from hopper_moe.quantization.checkpoint_files import TensorInfo

CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 20,
    "swiglu_limit": 10.0,
    "expert_dtype": "fp4",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
H200 = Gpu(0, "NVIDIA H200", SM90, 140 * GIB, 139 * GIB, 132, 18)
COMMAND = Path(sys.executable).with_name("hopper-moe")
SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 8, "num_hidden_layers": 2}
A100 = Gpu(1, "NVIDIA A100", (8, 0), 80 * GIB, 79 * GIB, 108, 12)


def _gpus(count: int) -> tuple[Gpu, ...]:
    return tuple(replace(H200, index=index) for index in range(count))


def _write_model(folder: Path, dtype: str = "I8", **changes) -> Path:
    """A checkpoint of one expert weight; its bytes are a hole in a sparse file."""
    folder.mkdir()
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    size = 2 if dtype == "BF16" else 1
    entry = {"dtype": dtype, "shape": [2048, 2048 // size], "data_offsets": [0, 2048 * 2048]}
    header = json.dumps({"layers.0.ffn.experts.0.w1.weight": entry}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2048 * 2048)
    return folder


# name -> (environment, arguments, the words that the sentence must contain)
ON_EIGHT_H200 = {
    "unknown variable": ({"HOPPER_MOE_KERNAL": "auto"}, [], "did you mean HOPPER_MOE_KERNEL?"),
    "unknown kernel": ({"HOPPER_MOE_KERNEL": "marlin"}, [], "'marlin' is not a kernel"),
    "empty kernel": ({"HOPPER_MOE_KERNEL": ""}, [], "'' is not a kernel"),
    "kernel for other experts": ({"HOPPER_MOE_KERNEL": "fp8_mega"}, [], "experts are fp4, but fp8_mega serves fp8"),
    "capacity no number": ({"HOPPER_MOE_MAX_TOKENS_PER_RANK": "8k"}, [], "'8k' is not a whole number"),
    "capacity zero": ({"HOPPER_MOE_MAX_TOKENS_PER_RANK": "0"}, [], "=0 is outside 1..262144"),
    "capacity negative": ({"HOPPER_MOE_MAX_TOKENS_PER_RANK": "-1"}, [], "'-1' is not a whole number"),
    "capacity too large": ({"HOPPER_MOE_MAX_TOKENS_PER_RANK": "999999999"}, [], "outside 1..262144"),
    "older capacity no number": (
        {"SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK": "1e3"},
        [],
        "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK='1e3'",
    ),
    "capacities contradict": (
        {"HOPPER_MOE_MAX_TOKENS_PER_RANK": "1024", "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK": "2048"},
        [],
        "contradict each other",
    ),
    "switch no switch": ({"HOPPER_MOE_FP8_COMBINE": "maybe"}, [], "'maybe' is not a switch"),
    "older switch no switch": ({"DG_USE_FP4_ACTS": "2"}, [], "DG_USE_FP4_ACTS='2' is not a switch"),
    "fp8 combine without exchange": ({"HOPPER_MOE_KERNEL": "w4a16", "DG_USE_FP8_COMBINE": "1"}, [], "unset DG_USE_FP8_COMBINE"),
    "fp4 dispatch without exchange": (
        {"HOPPER_MOE_KERNEL": "w4a16", "HOPPER_MOE_FP4_DISPATCH": "1"},
        [],
        "unset HOPPER_MOE_FP4_DISPATCH",
    ),
    "combine contradiction": ({"HOPPER_MOE_FP8_COMBINE": "0", "DG_USE_FP8_COMBINE": "1"}, [], "contradict each other"),
    "timeout zero": ({"HOPPER_MOE_TIMEOUT_S": "0"}, [], "outside 1..3600 seconds"),
    "timeout with unit": ({"HOPPER_MOE_TIMEOUT_S": "5m"}, [], "'5m' is not a whole number"),
    "cache dir relative": ({"HOPPER_MOE_CACHE_DIR": "cache"}, [], "relative path"),
    "cache dir is a file": ({"HOPPER_MOE_CACHE_DIR": "/etc/hostname"}, [], "is a file"),
    "dequant against mxfp4": (
        {"HOPPER_MOE_KERNEL": "mxfp4_mega", "SGLANG_DSV4_FP4_DEQUANT": "1"},
        [],
        "SGLANG_DSV4_FP4_DEQUANT=1 (1: FP4 experts are turned",
    ),
    "mega against no mega": (
        {"HOPPER_MOE_KERNEL": "mxfp4_mega", "SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "0"},
        [],
        "contradict each other",
    ),
    "fp8 experts against mxfp4": (
        {"HOPPER_MOE_KERNEL": "mxfp4_mega", "SGLANG_DSV4_FP4_EXPERTS": "0"},
        [],
        "contradict each other",
    ),
    "no mega but fp8": ({"SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "0", "SGLANG_DSV4_FP4_DEQUANT": "1"}, [], "contradict each other"),
    "no mega but fp8 by name": (
        {"SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "0", "HOPPER_MOE_KERNEL": "fp8_mega"},
        [],
        "contradict each other",
    ),
    "old memory layout": ({"SGLANG_OPT_FIX_MEGA_MOE_MEMORY": "0"}, [], "does not have: unset it"),
    "tp no number": ({}, ["--tp-size", "eight"], "invalid int value: 'eight'"),
    "tp without value": ({}, ["--tp-size"], "expected one argument"),
    "more ranks than GPUs": ({}, ["--tp", "16"], "needs 16 GPUs, but 8 are visible"),
    "more stages than GPUs": ({}, ["--tp", "8", "--pp-size", "2"], "--tp-size 8 x --pp-size 2 needs 16 GPUs, but 8 are visible"),
    "more replicas than GPUs": (
        {},
        ["--tp", "8", "--dp-size", "2"],
        "--tp-size 8 x --dp-size 2 needs 16 GPUs, but 8 are visible",
    ),
    "experts on the CPU": ({}, ["--cpu-offload-gb", "8"], "--cpu-offload-gb 8 cannot run"),
    "ep does not divide tp": ({}, ["--tp-size", "8", "--ep-size", "3"], "--ep-size 3 does not divide --tp-size 8"),
    "dp does not divide tp": ({}, ["--tp-size", "8", "--attn-dp-size", "3"], "3 attention data-parallel ranks do not divide"),
    "two nodes": (
        {},
        ["--nnodes", "2", "--dist-init-addr", "10.0.0.1:5000", "--tp-size", "32", "--ep-size", "32"],
        "needs 16 GPUs on each of 2 hosts",
    ),
    "another runner": ({}, ["--moe-runner-backend", "triton"], "--moe-runner-backend triton is not this plugin"),
    "another exchange": ({}, ["--moe-a2a-backend=nixl"], "--moe-a2a-backend nixl brings a block of rows per expert"),
    "DeepEP on one GPU": ({}, ["--moe-a2a-backend=deepep"], "--tp-size 1 is no number of ranks that DeepEP serves"),
    "another quantization": ({}, ["--quantization", "awq"], "--quantization awq is not how"),
    "LoRA": ({}, ["--enable-lora"], "--enable-lora"),
    "two-batch overlap": ({}, ["--enable-two-batch-overlap"], "--enable-two-batch-overlap"),
    "fused shared experts": ({}, ["--enforce-shared-experts-fusion"], "--enforce-shared-experts-fusion"),
    "LoRA adapters": ({}, ["--lora-paths", "a=/x", "b=/y"], "--lora-paths"),
    "chunk of nothing": (
        {"HOPPER_MOE_KERNEL": "mxfp4_mega"},
        ["--tp-size", "8", "--attn-dp-size", "8", "--chunked-prefill-size", "0"],
        "--chunked-prefill-size 0 leaves the tokens per rank unbounded",
    ),
    "no such file of arguments": ({}, ["--config", "/nowhere/server.yaml"], "/nowhere/server.yaml"),
    "no such argument": ({}, ["--tp-sise", "8"], "unrecognized arguments: --tp-sise 8"),
    "model twice": ({}, ["--model-path", "/other"], "name the model once"),
    "port too large": ({}, ["--port", "70000"], "'70000' is not a whole number in 1..65535"),
    "host not ours": ({}, ["--host", "192.0.2.1"], "cannot be used"),
}


@pytest.fixture
def refuse(monkeypatch, tmp_path):
    """Run `hopper-moe serve` in this process on a simulated machine; anything that would start or load a model fails the test."""

    def started(*_args, **_kwargs):
        raise AssertionError("a server was started or a weight was read in spite of bad input")

    monkeypatch.setattr(os, "execvpe", started)
    monkeypatch.setattr(TensorInfo, "read_bytes", started)

    def run(machine: Machine, model: str, arguments: list[str], environ: dict[str, str]) -> str:
        for name in list(os.environ):
            if name.startswith(("HOPPER_MOE_", "DG_USE_", "SGLANG_")):
                monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(machines, "detect", lambda: machine)
        env.settings.cache_clear()
        result = CliRunner().invoke(main, ["serve", model, *arguments])
        env.settings.cache_clear()
        assert result.exit_code == 2, result.output
        assert "starting:" not in result.output
        sentence = result.stderr.removeprefix("hopper-moe: ").rstrip("\n")
        assert "\n" not in sentence and sentence[-1] in ".?" and 30 < len(sentence) < 500, sentence
        assert not re.search(r"[.!?] [A-Z]", sentence), f"more than one sentence: {sentence}"
        return sentence

    return run


@pytest.mark.parametrize("case", ON_EIGHT_H200)
def test_bad_environment_and_arguments(case, refuse, tmp_path):
    environ, arguments, words = ON_EIGHT_H200[case]
    model = _write_model(tmp_path / "model")
    assert words in refuse(Machine(_gpus(8), driver="580"), str(model), arguments, environ)


BAD_MODELS = {
    "hidden size": ({"hidden_size": 4100}, "hidden_size 4100 is not a positive multiple of 128"),
    "intermediate size": ({"moe_intermediate_size": 2000}, "intermediate_size 2000 is not a positive multiple of 128"),
    "intermediate size in ranks": ({"moe_intermediate_size": 3200}, "3200 over 8 tensor-parallel slices is no multiple of 128"),
    "experts in ranks": ({"n_routed_experts": 252}, "252 experts do not divide into 8"),
    "too many choices": ({"num_experts_per_tok": 17}, "top_k 17 is outside 1..16"),
    "no experts": ({"n_routed_experts": ...}, "no n_routed_experts"),
    "another architecture": ({"architectures": ["KimiK3ForCausalLM"]}, "not KimiK3ForCausalLM"),
    "size is text": ({"hidden_size": "4096"}, "hidden_size='4096'"),
    "clamp negative": ({"swiglu_limit": -1}, "swiglu_limit=-1"),
    "type contradicts": ({"expert_dtype": "fp8"}, "says expert_dtype=fp8, but the expert weights are fp4"),
    "too large": ({"num_hidden_layers": 430, "n_routed_experts": 384}, "GiB must stay free"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_config(case, refuse, tmp_path):
    changes, words = BAD_MODELS[case]
    arguments = ["--tp-size", "8"] + ([] if case == "intermediate size in ranks" else ["--ep-size", "8"])
    machine = Machine((H200,) * 8) if case != "too large" else Machine(_gpus(1))
    arguments = arguments if case != "too large" else []
    assert words in refuse(machine, str(_write_model(tmp_path / "model", **changes)), arguments, {})


@pytest.mark.parametrize("dtype, words", [("BF16", "experts are bf16"), ("I4", "experts are I4")])
def test_bad_expert_type_on_disk(dtype, words, refuse, tmp_path):
    model = _write_model(tmp_path / "model", dtype, expert_dtype=...)
    assert words in refuse(Machine(_gpus(1)), str(model), [], {})


def test_fp8_experts_on_disk_are_refused_by_an_fp4_kernel(refuse, tmp_path):
    model = _write_model(tmp_path / "model", "F8_E4M3", expert_dtype=...)
    said = refuse(Machine(_gpus(1)), str(model), [], {"HOPPER_MOE_KERNEL": "mxfp4_mega"})
    assert "experts are fp8, but mxfp4_mega serves fp4" in said


def test_bad_folders(refuse, tmp_path):
    machine = Machine(_gpus(1))
    assert "does not exist" in refuse(machine, str(tmp_path / "nowhere"), [], {})
    (tmp_path / "empty").mkdir()
    assert "config.json does not exist" in refuse(machine, str(tmp_path / "empty"), [], {})
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "is not valid JSON" in refuse(machine, str(tmp_path / "empty"), [], {})
    assert "is a file, not a checkpoint" in refuse(machine, str(tmp_path / "empty" / "config.json"), [], {})
    model = _write_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "is no whole safetensors file" in refuse(machine, str(model), [], {})
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"layers.0.ffn.experts.0.w1.weight": "model-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001.safetensors is named in model.safetensors.index.json but does not exist" in refuse(
        machine, str(model), [], {}
    )


def test_the_revision_that_sglang_will_load_is_checked(offline, monkeypatch):  # H16
    monkeypatch.setattr(machines, "detect", lambda: Machine(_gpus(1)))
    monkeypatch.setattr(doctor_checks, "sglang", lambda: [])
    cached(offline, "main", "a", **SIZES)
    edit_tensors(cached(offline, "exp", "b", **SIZES), lambda tensors: tensors.pop("layers.1.ffn.experts.3.w2.scale"))
    for command in (["serve", "org/name", "--dry-run"], ["doctor", "org/name"]):
        result = CliRunner().invoke(main, [*command, "--revision", "exp"])
        assert result.exit_code in (1, 2) and "layers.1.ffn.experts.3.w2.scale is missing" in result.output, result.output
        assert "w2.scale is missing" not in CliRunner().invoke(main, command).output


def test_bad_machines(refuse, tmp_path):
    model = str(_write_model(tmp_path / "model"))
    mixed = Machine((H200, A100))
    assert "needs Hopper GPUs only" in refuse(mixed, model, ["--tp-size", "2"], {})
    assert "no Hopper GPU is visible" in refuse(Machine(), model, ["--device", "cuda"], {})
    assert "here is a machine without a CUDA device" in refuse(Machine(), model, [], {"HOPPER_MOE_KERNEL": "mxfp4_mega"})


def test_port_in_use(refuse, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        sentence = refuse(Machine(_gpus(1)), str(_write_model(tmp_path / "model")), ["--port", port], {})
    assert f"--port {port} cannot be used (Address already in use)" in sentence


def test_an_unfinished_download_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "detect", lambda: Machine(_gpus(1)))
    folder = write_checkpoint(tmp_path / "model", make_state(1, **SIZES), {**SMALL_CONFIG, **SIZES})
    edit_tensors(folder, lambda tensors: tensors.pop("layers.1.ffn.experts.3.w2.scale"))
    monkeypatch.setattr(doctor_checks, "sglang", lambda: [])  # 20 s, and not what this is about
    for command in (["serve", str(folder), "--dry-run"], ["doctor", str(folder)]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code in (1, 2) and "layers.1.ffn.experts.3.w2.scale is missing" in result.output, result.output


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="preflight compiles the kernel, which needs nvcc")
def test_serve_becomes_stock_sglang_on_hopper(tmp_path, monkeypatch):
    started = {}
    monkeypatch.setenv("HOPPER_MOE_KERNEL", "mxfp4_mega")
    env.settings.cache_clear()
    model = write_checkpoint(tmp_path / "model", make_state(1, **SIZES), {**SMALL_CONFIG, **SIZES})
    monkeypatch.setattr(os, "execvpe", lambda file, command, environ: started.update(command=command, environ=environ))
    monkeypatch.setattr(machines, "detect", lambda: Machine(_gpus(8), driver="580"))
    arguments = ["--tp-size", "8", "--ep-size", "8", "--mem-fraction-static", "0.8", "--port", "31234"]
    result = CliRunner().invoke(main, ["serve", str(model), *arguments])
    assert result.exit_code == 0, result.output
    stock = str(COMMAND.with_name("sglang"))
    assert started["command"] == [stock, "serve", "--model-path", str(model), *arguments, "--moe-runner-backend", "hopper_moe"]
    assert started["environ"]["PYTHONSAFEPATH"] == "1"
    assert "preflight: kernel   mxfp4_mega" in result.output
    assert "GiB of workspace per rank, for 8192 tokens a call; kernel compiled" in result.output
    again = CliRunner().invoke(main, ["serve", str(model), "--moe-runner-backend", "hopper_moe", "--dry-run", "--port", "31234"])
    assert again.exit_code == 0 and again.output.count("--moe-runner-backend") == 1
