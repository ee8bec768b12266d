"""Launches that work: what preflight reports, what `serve` becomes, what `doctor` finds, and the command line around them."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_checkpoint import CONFIG, edit_tensors, make_state

from hopper_moe.launch import doctor_checks, serve, sglang_args
from hopper_moe.launch import machine as machines
from hopper_moe.launch.cli import COMMANDS, main
from hopper_moe.launch.machine import GIB, Gpu, Machine
from hopper_moe.launch.model_facts import ModelFacts, read_model
from hopper_moe.launch.preflight import check, expert_bytes_per_rank, workspace_line
from hopper_moe.moe_backends import env
from hopper_moe.moe_backends.env import load
from hopper_moe.moe_backends.registry import REGISTRY
from hopper_moe.quantization.checkpoint import write_checkpoint

FLASH = ModelFacts("DeepseekV4ForCausalLM", 4096, 2048, 256, 6, 43, 10.0, "fp4")
PRO = ModelFacts("DeepseekV4ForCausalLM", 7168, 3072, 384, 6, 61, 10.0, "fp4")
H200 = Gpu(0, "NVIDIA H200", (9, 0), 140 * GIB, 139 * GIB, 132, 18)
EIGHT = Machine(tuple(replace(H200, index=index) for index in range(8)), driver="580.65")
COMMAND = Path(sys.executable).with_name("hopper-moe")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("HOPPER_MOE_", "DG_USE_", "SGLANG_")):
            monkeypatch.delenv(name)
    env.settings.cache_clear()
    yield
    env.settings.cache_clear()


SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 8, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), make_state(1, **SIZES), {**CONFIG, **SIZES})


def _report(arguments: list[str], environ: dict[str, str] | None = None, machine: Machine = EIGHT, facts: ModelFacts = FLASH):
    plan, problems = sglang_args.parse("model", arguments)
    assert problems == []
    return check(plan, facts, machine, load(environ or {}))


def test_flash_experts_take_the_bytes_of_the_format():
    """One MXFP4 expert is 3*H*I*(1/2 + 1/32) bytes (kernels.md section 2); packing adds one base byte per row and no more."""
    per_expert = 3 * 4096 * 2048 * (1 / 2 + 1 / 32) + 2 * 2048 + 4096
    assert expert_bytes_per_rank(FLASH, 8, 2048) == 43 * 32 * per_expert
    fp8 = 3 * 4096 * 2048 + 2 * 32 * 16 * 16  # the block scales: gate and up in one, four FP32 each
    assert expert_bytes_per_rank(FLASH, 8, 2048, "fp8") == 43 * 32 * fp8


def test_preflight_on_eight_h200():
    report = _report(["--tp-size", "8", "--ep-size", "8"])
    assert report.refusals == () and report.choice.spec.name == "mxfp4_mega"
    (kernel,) = (line for line in report.lines if line.startswith("kernel"))
    assert "mxfp4_mega: the fastest at 8 of 8 batch sizes of 1 to 128 tokens" in kernel and "before w4a16" in kernel
    assert f"memory   {43 * 32 * 13377536 / GIB:.2f} GiB of packed expert weights per rank" in report.lines
    assert "ranks    tensor parallel 8, expert parallel 8" in report.lines


@pytest.mark.parametrize(
    "arguments, sizes",
    [
        (["--tp", "4", "--dp", "2"], "--tp-size 4 x --dp-size 2"),
        (["--tp", "4", "--pp-size", "2"], "--tp-size 4 x --pp-size 2"),
        (["--tp", "4", "--pipeline-parallel-size", "2"], "--tp-size 4 x --pp-size 2"),
    ],
)
def test_stages_and_replicas_take_gpus_of_their_own(arguments, sizes):
    four = replace(EIGHT, gpus=EIGHT.gpus[:4])
    (said,) = _report([*arguments, "--ep", "4"], machine=four).refusals
    assert f"{sizes} needs 8 GPUs, but 4 are visible" in said
    assert _report([*arguments, "--ep", "4"]).refusals == ()


@pytest.mark.parametrize("arguments", [["--dp-size", "4", "--enable-dp-attention"], ["--attn-dp-size", "4"]])
def test_attention_data_parallelism_takes_no_gpus(arguments):
    four = replace(EIGHT, gpus=EIGHT.gpus[:4])
    assert _report(["--tp", "4", *arguments], machine=four).refusals == ()


def test_the_gpus_that_sglang_will_use_are_the_ones_that_are_checked():
    """Two servers on one host: the first four GPUs belong to another one."""
    half = replace(EIGHT, gpus=tuple(replace(gpu, free_bytes=(5 if gpu.index < 4 else 139) * GIB) for gpu in EIGHT.gpus))
    four = ["--tp", "4", "--ep", "4"]
    assert len(_report(four, machine=half).refusals) == 4
    assert _report([*four, "--base-gpu-id", "4"], machine=half).refusals == ()
    every_other = _report([*four, "--gpu-id-step", "2"], machine=half).refusals
    assert [said.split(" has ")[0] for said in every_other] == ["GPU 0", "GPU 2"]
    (said,) = _report([*four, "--base-gpu-id", "6"]).refusals
    assert "--base-gpu-id 6 and --gpu-id-step 1 put a rank on GPU 9, but 8 are visible" in said
    far = replace(EIGHT, blocked_peers=((0, 4), (4, 7)))
    assert _report(["--tp", "4", "--attn-dp-size", "4"], machine=far).refusals == ()
    (said,) = _report(["--tp", "4", "--attn-dp-size", "4", "--base-gpu-id", "4"], machine=far).refusals
    assert "GPUs 4->7 cannot" in said


def test_fp8_experts_need_a_tile_table_too():
    """The same fused kernel: without one it would stop at its first layer, after the weights were loaded."""
    unknown = replace(EIGHT, gpus=(replace(H200, name="NVIDIA H900"),))
    (said,) = _report([], machine=unknown, facts=replace(FLASH, expert_dtype="fp8", num_moe_layers=4)).refusals
    assert "no tile table for 'NVIDIA H900'" in said


def test_the_exchange_buffer_is_announced_for_the_chunk_that_was_given(monkeypatch):
    from hopper_moe.kernels import mega_moe

    monkeypatch.setattr(mega_moe, "workspace_bytes", lambda *, num_tokens_capacity, **_shape: num_tokens_capacity << 20)
    exchange = ["--tp", "8", "--attn-dp-size", "8", "--chunked-prefill-size", "131072"]
    for arguments, environ, tokens in (
        (exchange, {}, 16384),
        (exchange, {"HOPPER_MOE_MAX_TOKENS_PER_RANK": "20000"}, 20000),
        (["--tp", "8", "--chunked-prefill-size", "131072"], {}, 8192),  # runs in pieces
    ):
        line = workspace_line(_report(arguments, environ), load(environ))
        assert f"per rank, for {tokens} tokens a call" in line and f"{tokens / 1024:.2f} GiB" in line


def test_a_pipeline_stage_holds_its_own_layers_only():
    machine = replace(EIGHT, gpus=tuple(replace(gpu, free_bytes=138 * GIB) for gpu in EIGHT.gpus))
    report = _report(["--tp", "4", "--pp-size", "2", "--ep", "4"], machine=machine, facts=PRO)
    assert report.refusals == ()
    assert "ranks    tensor parallel 4, expert parallel 4, pipeline stages 2" in report.lines
    stage = expert_bytes_per_rank(replace(PRO, num_moe_layers=31), 4, 3072)  # 61 layers: 30 and 31
    assert f"memory   {stage / GIB:.2f} GiB of packed expert weights per rank" in report.lines
    assert any("GiB must stay free" in said for said in _report(["--tp", "4", "--ep", "4"], machine=machine, facts=PRO).refusals)


def test_stages_and_replicas_exchange_no_tokens_with_each_other():
    arguments = ["--tp", "4", "--attn-dp-size", "4", "--pp-size", "2"]
    assert _report(arguments, machine=replace(EIGHT, blocked_peers=((0, 4), (4, 0)))).refusals == ()
    (said,) = _report(arguments, machine=replace(EIGHT, blocked_peers=((4, 7), (7, 4)))).refusals
    assert "GPUs 4->7, 7->4 cannot address each other's memory" in said


def test_no_offload_at_all_is_no_offload():
    assert sglang_args.parse("model", ["--cpu-offload-gb", "0"])[1] == []
    for arguments in (["--cpu-offload-gb", "8"], ["--cpu-offload-gb=8"], ["--enable-lora"]):
        assert "leave it out" in sglang_args.parse("model", arguments)[1][0]


def test_a_layer_that_the_fused_kernel_cannot_hold_goes_to_the_next_one_unless_it_was_named():
    many = replace(FLASH, num_experts=512)
    assert _report(["--tp-size", "8", "--ep-size", "8"], facts=many).choice.spec.name == "w4a16"
    named = _report(["--tp-size", "8", "--ep-size", "8"], {"HOPPER_MOE_KERNEL": "mxfp4_mega"}, facts=many)
    assert any("512 experts are above the 400 that mxfp4_mega routes" in sentence for sentence in named.refusals)


def test_tensor_parallel_slices_are_checked_as_slices():
    assert _report(["--tp-size", "8"]).refusals == ()  # 2048 / 8 = 256
    odd = replace(FLASH, intermediate_size=2304)  # V4.1-Flash: 2304 / 8 = 288 is no multiple of 128, whole experts are
    assert any("intermediate_size 288" in sentence for sentence in _report(["--tp-size", "8"], facts=odd).refusals)
    assert _report(["--tp-size", "8", "--ep-size", "8"], facts=odd).refusals == ()


def test_capacity_and_peers_matter_only_to_a_kernel_that_exchanges_tokens(monkeypatch):
    arguments = ["--tp-size", "8", "--attn-dp-size", "8", "--chunked-prefill-size", "131072"]
    far = replace(EIGHT, blocked_peers=((0, 7), (7, 0)))
    small = {"HOPPER_MOE_MAX_TOKENS_PER_RANK": "2048"}
    spec = REGISTRY["mxfp4_mega"]
    monkeypatch.setitem(REGISTRY, "mxfp4_mega", replace(spec, multi_rank=False))
    assert _report(arguments, small, far).refusals == ()
    monkeypatch.setitem(REGISTRY, "mxfp4_mega", replace(spec, multi_rank=True))
    peers, capacity = _report(arguments, small, far).refusals
    assert "GPUs 0->7, 7->0 cannot address each other's memory" in peers
    assert "HOPPER_MOE_MAX_TOKENS_PER_RANK=2048 is below the 16384 tokens" in capacity  # 131072 over 8 ranks, divided once
    assert _report(arguments, {"HOPPER_MOE_MAX_TOKENS_PER_RANK": "16384"}).refusals == ()


def test_unknown_expert_type_is_left_to_the_loader():
    assert _report(["--tp-size", "8", "--ep-size", "8"], facts=replace(FLASH, expert_dtype="unknown")).refusals == ()


def test_model_facts(model):
    assert read_model(str(model)) == ModelFacts("DeepseekV4ForCausalLM", 256, 128, 8, 2, 2, 10.0, "fp4")


def test_an_unfinished_download_is_refused(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model", make_state(1, **SIZES), {**CONFIG, **SIZES})
    edit_tensors(folder, lambda tensors: tensors.pop("layers.1.ffn.experts.3.w2.scale"))
    monkeypatch.setattr(doctor_checks, "sglang", lambda: [])  # 20 s, and not what this is about
    for command in (["serve", str(folder), "--dry-run"], ["doctor", str(folder)]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code in (1, 2) and "layers.1.ffn.experts.3.w2.scale is missing" in result.output, result.output


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="preflight compiles the kernel, which needs nvcc")
def test_serve_becomes_stock_sglang_on_hopper(model, monkeypatch):
    started = {}
    monkeypatch.setattr(os, "execvpe", lambda file, command, environ: started.update(command=command, environ=environ))
    monkeypatch.setattr(machines, "detect", lambda: EIGHT)
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


def test_the_same_command_uses_the_cpu_host_elsewhere(model, monkeypatch):
    from hopper_moe.launch import cpu_host

    served = {}
    monkeypatch.setattr(cpu_host, "serve", lambda folder, **settings: served.update(folder=folder, **settings))
    monkeypatch.setattr(machines, "detect", lambda: Machine())
    arguments = ["--tp-size", "8", "--mem-fraction-static", "0.8", "--port", "31234"]
    result = CliRunner().invoke(main, ["serve", str(model), *arguments])
    assert result.exit_code == 0, result.output
    assert served == {"folder": str(model), "host": "127.0.0.1", "port": 31234, "kernel": "reference"}
    assert "have no meaning to it: --tp-size 8 --mem-fraction-static 0.8" in result.output
    monkeypatch.setattr(machines, "detect", lambda: pytest.fail("--device cpu must not look for GPUs"))
    forced = CliRunner().invoke(main, ["serve", str(model), "--device", "cpu", "--port", "31234"])
    assert forced.exit_code == 0, forced.output


def test_sglang_knows_every_argument_that_we_read(tmp_path):
    """Our names for its arguments, against its real parser (in its own process: it changes transformers for the whole one)."""
    code = (
        "import argparse, json; from sglang.srt.server_args import ServerArgs\n"
        "stock = argparse.ArgumentParser(); ServerArgs.add_cli_args(stock)\n"
        "print(json.dumps([option for action in stock._actions for option in action.option_strings]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    known = set(json.loads(done.stdout.splitlines()[-1]))
    ours = {option for action in sglang_args._parser()._actions for option in action.option_strings}
    shorthand = {"--tp", "--dp"}  # taken by SGLang as an abbreviation or on older versions
    assert ours - known <= shorthand, ours - known - shorthand


def test_every_command_resolves():
    for name, (target, _) in COMMANDS.items():
        module, attribute = target.split(":")
        command = getattr(importlib.import_module(module), attribute)
        result = CliRunner().invoke(command, ["--help"])
        assert result.exit_code == 0 and "Usage:" in result.output, name


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "config.json").mkdir()
    done = CliRunner().invoke(main, ["checkpoint", "inspect", str(tmp_path)])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1, done.exception
    assert done.stderr.startswith("hopper-moe: ") and str(tmp_path / "config.json") in done.stderr

    def gone(*_args):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(machines, "detect", gone)
    piped = CliRunner().invoke(main, ["doctor"])  # `hopper-moe doctor | head -1`: nothing is wrong, nobody listens
    assert piped.exit_code == 1 and piped.stderr == ""


def test_doctor_is_right_on_this_machine(model):
    """The real command on the real machine, stock SGLang included."""
    import torch

    shown = subprocess.run([COMMAND, "doctor", str(model)], capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    lines = {line[5:17].strip(): (line[:5].strip(), line[18:]) for line in shown.stdout.splitlines() if line[:5].strip()}
    assert torch.__version__ in lines["torch"][1] and lines["plugin"][0] == "ok"
    assert "places where the plugin hooks in look as in" in lines["sglang"][1] and lines["sglang"][0] == "ok"
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(torch.cuda.device_count() - 1) in lines["gpu"][1]
    else:
        assert lines["gpu"][0] == "note" and lines["kernel"][1].startswith("reference")
    assert "GiB of packed expert weights per rank" in shown.stdout
    assert "Ready. Works here: " in shown.stdout


@pytest.mark.parametrize(
    "environ, subject",
    [
        ({"SGLANG_PLUGINS": "other"}, "plugin"),
        ({"HOPPER_MOE_KERNEL": "w4a16", "HOPPER_MOE_FP8_COMBINE": "1"}, "kernel"),
        ({"HOPPER_MOE_TYPO": "1"}, "environment"),
    ],
)
def test_doctor_fails_where_a_launch_would(environ, subject, monkeypatch):
    monkeypatch.setattr(doctor_checks, "sglang", lambda: [])  # 20 s, and not what this is about
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1 and f"Not ready: {subject}." in result.output, result.output


def test_doctor_names_hopper_gpus_and_blocked_peers():
    [driver, *gpus] = doctor_checks.gpus(EIGHT)
    assert driver.text == "580.65" and len(gpus) == 8 and all(finding.verdict == "ok" for finding in gpus)
    assert gpus[3].text == "3: NVIDIA H200, compute capability 9.0, 132 SMs, 140 GiB HBM, 139 GiB free, 18 NVLinks up"
    assert doctor_checks.peers(EIGHT)[0].verdict == "ok"
    assert "0->1" in doctor_checks.peers(replace(EIGHT, blocked_peers=((0, 1),)))[0].text
    broken = doctor_checks.gpus(Machine(driver="580.65"))[0]
    assert broken.verdict == "FAIL" and "torch sees no device" in broken.text


@pytest.mark.parametrize("version", ["0.5.17.post1", "0.5.20", "0.5.22"])
def test_doctor_says_that_an_sglang_between_the_supported_ones_is_not(version, monkeypatch):
    monkeypatch.setattr(doctor_checks.importlib.metadata, "version", lambda name: version)
    (finding,) = doctor_checks.sglang()
    assert finding.verdict == "FAIL" and finding.subject == "sglang"
    assert finding.text.startswith(f"SGLang {version} is not supported") and "sglang==0.5.23 or 0.5.17" in finding.text


def test_third_party_kernels_check_notices_our_folder(monkeypatch):
    assert doctor_checks.third_party_kernels().verdict == "ok"
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.syspath_prepend(str(Path(serve.__file__).resolve().parent.parent))
    importlib.invalidate_caches()
    assert doctor_checks.third_party_kernels().verdict == "FAIL"


@pytest.mark.gpu
def test_detects_the_hopper_gpu():
    import torch

    found = machines.detect()
    assert found.is_hopper and found.driver and len(found.gpus) == torch.cuda.device_count()
    assert found.gpus[0].num_sms == torch.cuda.get_device_properties(0).multi_processor_count
