"""Launches that work: what preflight reports, what `serve` becomes, what `doctor` finds, and the command line around them."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_checkpoint import CONFIG, cached, make_state
from small_v41 import FLASH_V41, nested, tensors_v41, write_v41

from hopper_moe.kernels.device import SM90
from hopper_moe.launch import doctor_checks, preflight, serve, sglang_args
from hopper_moe.launch import machine as machines
from hopper_moe.launch.cli import COMMANDS, main
from hopper_moe.launch.machine import GIB, Gpu, Machine
from hopper_moe.launch.model_facts import LaunchedModel, read_model
from hopper_moe.launch.preflight import check, workspace_line
from hopper_moe.moe_backends import env
from hopper_moe.moe_backends.env import load
from hopper_moe.moe_backends.kernel_specs import REGISTRY
from hopper_moe.moe_backends.sglang.launch_view import LaunchView
from hopper_moe.quantization.checkpoint import write_checkpoint
from hopper_moe.quantization.checkpoint_memory import RankLayout, weights_per_rank
from hopper_moe.quantization.config_values import flatten
from hopper_moe.quantization.layout import packed_expert_bytes
from hopper_moe.quantization.model_facts import ModelFacts, facts_of

FLASH = ModelFacts("DeepseekV4ForCausalLM", "fp8", "fp4", (128, 128), 4096, 2048, 256, 6, 10.0, 43)
PRO = replace(FLASH, hidden_size=7168, intermediate_size=3072, num_experts=384, num_moe_layers=61)
FLASH_41 = facts_of(flatten(FLASH_V41, Path("config.json")), "config.json")
H200 = Gpu(0, "NVIDIA H200", SM90, 140 * GIB, 139 * GIB, 132, 18)
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
    return check(launch_of(arguments), LaunchedModel(facts, None, None), machine, load(environ or {}))


def launch_of(arguments: list[str]) -> sglang_args.Launch:
    """What SGLang's parser makes of these arguments, without importing it here: it changes transformers for the whole process.
    `tests/stock_sglang/test_two_doors.py` has the real one."""
    parser = argparse.ArgumentParser()
    for flag in ("--tp-size", "--ep-size", "--pp-size", "--dp-size", "--attn-dp-size", "--nnodes", "--gpu-id-step"):
        parser.add_argument(flag, type=int, default=1)
    for flag in ("--base-gpu-id", "--node-rank"):
        parser.add_argument(flag, type=int, default=0)
    parser.add_argument("--dist-init-addr")
    parser.add_argument("--speculative-algorithm")
    parser.add_argument("--chunked-prefill-size", type=int)
    parser.add_argument("--enable-dp-attention", action="store_true")
    defaults = dict(moe_runner_backend="hopper_moe", load_format="auto", moe_a2a_backend="none", disaggregation_mode="null")
    off = ("speculative_moe_runner_backend", "speculative_moe_a2a_backend", "quantization", "ep_num_redundant_experts")
    off += ("enable_dynamic_chunking", "cuda_graph_config", "max_running_requests")
    off += ("cuda_graph_backend_decode", "cuda_graph_backend_prefill", "max_prefill_tokens", "speculative_num_draft_tokens")
    off += ("speculative_draft_model_path",)
    parser.set_defaults(**defaults, **dict.fromkeys(off))
    return sglang_args.Launch("model", LaunchView(parser.parse_args(arguments), is_resolved=False), tuple(arguments))


def memory_line(report) -> str:
    (line,) = (line for line in report.lines if line.startswith("memory"))
    return line


def test_no_visible_gpu_is_one_sentence():
    (said,) = _report([], machine=replace(EIGHT, gpus=())).refusals
    assert said == "a launch needs 1 GPU, but 0 are visible: use fewer or set CUDA_VISIBLE_DEVICES."


def test_flash_experts_take_the_bytes_of_the_format():
    """One MXFP4 expert is 3*H*I*(1/2 + 1/32) bytes (kernels.md section 2); packing adds one base byte per row and no more."""
    arguments = ["--tp-size", "8", "--ep-size", "8"]
    fp4 = 3 * 4096 * 2048 * (1 / 2 + 1 / 32) + 2 * 2048 + 4096
    assert f"packed experts {43 * 32 * fp4 / GIB:.2f}," in memory_line(_report(arguments))
    fp8 = 3 * 4096 * 2048 + 2 * 32 * 16 * 16  # the block scales: gate and up in one, four FP32 each
    expanded = {"HOPPER_MOE_KERNEL": "fp8_mega", "SGLANG_DSV4_FP4_DEQUANT": "1"}
    assert f"packed experts {43 * 32 * fp8 / GIB:.2f}," in memory_line(_report(arguments, expanded))


def test_everything_that_a_rank_holds_is_counted(tmp_path, monkeypatch):
    """DeepSeek-V4.1: hash tables and, with speculation, the draft's experts; all the rest once the headers are there."""
    loaded = read_model(str(write_v41(tmp_path / "v41", nested(), tensors_v41(1))))
    whole = replace(H200, memory_bytes=16 * GIB, free_bytes=8 * GIB)

    def line(arguments: list[str], model: LaunchedModel = loaded, environ: dict[str, str] | None = None) -> str:
        return memory_line(check(launch_of(arguments), model, Machine((whole,) * 8), load(environ or {})))

    def gib(bytes_: int) -> str:
        return f"{bytes_ / GIB:.2f}"

    found = weights_per_rank(loaded.facts, loaded.tensors, RankLayout())
    assert f"{gib(found.device)} GiB of weights per rank: packed experts {gib(found.experts)}, hash tables" in line([])
    assert f", other {gib(found.other)}" in line([]) and "draft" not in line([])
    large = replace(loaded, facts=FLASH_41, tensors=None)
    eight = ["--tp-size", "8", "--ep-size", "8"]
    shown = memory_line(check(launch_of(eight), large, EIGHT, load({})))
    assert shown == (
        "memory   57.24 GiB of weights per rank: packed experts 33.64, hash tables 23.60, other weights unknown (their files are "
        "not here)"
    )
    drafting = memory_line(check(launch_of([*eight, "--speculative-algorithm", "DSPARK"]), large, EIGHT, load({})))
    assert "packed experts 33.64, draft experts 0.84, hash tables 23.60" in drafting
    monkeypatch.setenv("SGLANG_ENABLE_DSV41_ENGRAM_HOST_TABLE", "1")
    assert "; 188.83 GiB of hash tables in host memory" in memory_line(check(launch_of(eight), large, EIGHT, load({})))


def test_a_gpu_without_room_for_all_weights_is_refused_before_they_load():
    facts = FLASH_41
    small = replace(EIGHT, gpus=tuple(replace(gpu, free_bytes=60 * GIB) for gpu in EIGHT.gpus))
    refusals = _report(["--tp-size", "8", "--ep-size", "8"], machine=small, facts=facts).refusals
    assert len(refusals) == 8 and "60.0 GiB free, but the experts and hash tables alone need 57.2 GiB" in refusals[0]


def test_preflight_on_eight_h200():
    report = _report(["--tp-size", "8", "--ep-size", "8"])
    assert report.refusals == () and report.verdict.choice.spec.name == "mxfp4_mega"
    (kernel,) = (line for line in report.lines if line.startswith("kernel"))
    assert "mxfp4_mega: the fastest at 8 of 8 batch sizes of 1 to 128 tokens" in kernel and "before w4a16" in kernel
    assert f"packed experts {43 * 32 * 13377536 / GIB:.2f}," in memory_line(report)
    assert "ranks    tensor parallel 8, expert parallel 8" in report.lines


@pytest.mark.parametrize(
    "arguments, sizes",
    [
        (["--tp-size", "4", "--dp-size", "2"], "--tp-size 4 x --dp-size 2"),
        (["--tp-size", "4", "--pp-size", "2"], "--tp-size 4 x --pp-size 2"),
        (["--tp-size", "4", "--pp-size", "2"], "--tp-size 4 x --pp-size 2"),
    ],
)
def test_stages_and_replicas_take_gpus_of_their_own(arguments, sizes):
    four = replace(EIGHT, gpus=EIGHT.gpus[:4])
    (said,) = _report([*arguments, "--ep-size", "4"], machine=four).refusals
    assert f"{sizes} needs 8 GPUs, but 4 are visible" in said
    assert _report([*arguments, "--ep-size", "4"]).refusals == ()


@pytest.mark.parametrize("arguments", [["--dp-size", "4", "--enable-dp-attention"], ["--attn-dp-size", "4"]])
def test_attention_data_parallelism_takes_no_gpus(arguments):
    four = replace(EIGHT, gpus=EIGHT.gpus[:4])
    assert _report(["--tp-size", "4", *arguments], machine=four).refusals == ()


def test_the_gpus_that_sglang_will_use_are_the_ones_that_are_checked():
    """Two servers on one host: the first four GPUs belong to another one."""
    half = replace(EIGHT, gpus=tuple(replace(gpu, free_bytes=(5 if gpu.index < 4 else 139) * GIB) for gpu in EIGHT.gpus))
    four = ["--tp-size", "4", "--ep-size", "4"]
    assert len(_report(four, machine=half).refusals) == 4
    assert _report([*four, "--base-gpu-id", "4"], machine=half).refusals == ()
    every_other = _report([*four, "--gpu-id-step", "2"], machine=half).refusals
    assert [said.split(" has ")[0] for said in every_other] == ["GPU 0", "GPU 2"]
    (said,) = _report([*four, "--base-gpu-id", "6"]).refusals
    assert "--base-gpu-id 6 and --gpu-id-step 1 put a rank on GPU 9, but 8 are visible" in said
    far = replace(EIGHT, blocked_peers=((0, 4), (4, 7)))
    assert _report(["--tp-size", "4", "--attn-dp-size", "4"], machine=far).refusals == ()
    (said,) = _report(["--tp-size", "4", "--attn-dp-size", "4", "--base-gpu-id", "4"], machine=far).refusals
    assert "GPUs 4->7 cannot" in said


def test_a_gpu_that_is_too_small_for_the_fused_kernel_is_refused_before_weights_load():
    small = replace(EIGHT, gpus=tuple(replace(gpu, shared_bytes=100 << 10) for gpu in EIGHT.gpus))
    (said,) = _report([], machine=small).refusals
    assert "NVIDIA H200 gives a block 102400 bytes of shared memory, below the 232448" in said
    few = replace(EIGHT, gpus=tuple(replace(gpu, num_sms=7) for gpu in EIGHT.gpus))
    assert _report(["--tp-size", "4", "--attn-dp-size", "4"], machine=few).refusals == ()
    (said,) = _report(["--tp-size", "8", "--attn-dp-size", "8"], machine=few).refusals
    assert "NVIDIA H200 has 7 SMs, but 8 ranks need 8 at least" in said


def test_the_exchange_buffer_is_announced_for_the_chunk_that_was_given(monkeypatch):
    monkeypatch.setattr(preflight, "workspace_bytes", lambda shard, library, **_: shard.max_tokens_per_rank << 20)
    exchange = ["--tp-size", "8", "--attn-dp-size", "8", "--chunked-prefill-size", "131072"]
    for arguments, environ, tokens in (
        (exchange, {}, 16384),
        (exchange, {"HOPPER_MOE_MAX_TOKENS_PER_RANK": "20000"}, 20000),
        (["--tp-size", "8", "--chunked-prefill-size", "131072"], {}, 8192),  # runs in pieces
    ):
        line = workspace_line(_report(arguments, environ).verdict, load(environ))
        assert f"per rank, for {tokens} tokens a call" in line and f"{tokens / 1024:.2f} GiB" in line


def test_a_pipeline_stage_holds_its_own_layers_only():
    machine = replace(EIGHT, gpus=tuple(replace(gpu, free_bytes=138 * GIB) for gpu in EIGHT.gpus))
    report = _report(["--tp-size", "4", "--pp-size", "2", "--ep-size", "4"], machine=machine, facts=PRO)
    assert report.refusals == ()
    assert "ranks    tensor parallel 4, expert parallel 4, pipeline stages 2" in report.lines
    layer = 96 * packed_expert_bytes(PRO.hidden_size, PRO.intermediate_size)
    first, last = (line for line in report.lines if line.startswith("memory"))
    assert f"per rank of stage 0: packed experts {30 * layer / GIB:.2f}," in first  # of 61 layers
    assert f"per rank of stage 1: packed experts {31 * layer / GIB:.2f}," in last
    tight = replace(machine, gpus=tuple(replace(gpu, free_bytes=30 * layer + 5 * GIB) for gpu in EIGHT.gpus))
    refusals = _report(["--tp-size", "4", "--pp-size", "2", "--ep-size", "4"], machine=tight, facts=PRO).refusals
    assert [said.split(" has ")[0] for said in refusals] == [f"GPU {number}" for number in (4, 5, 6, 7)], "the larger stage"
    assert any(
        "GiB must stay free" in said
        for said in _report(["--tp-size", "4", "--ep-size", "4"], machine=machine, facts=PRO).refusals
    )


@pytest.mark.parametrize(
    "node, sizes, environ, said",
    [
        (0, "--pp-size 2", {}, ["0 of 0..1 on host 0 of 0..1: layers 0..29, ranks 0..7 of 8, GPUs 0, 1, 2, 3, 4, 5, 6, 7"]),
        (1, "--pp-size 2", {}, ["1 of 0..1 on host 1 of 0..1: layers 30..60, ranks 0..7 of 8, GPUs 0, 1, 2, 3, 4, 5, 6, 7"]),
        (1, "--pp-size 2", {"SGLANG_PP_LAYER_PARTITION": "33,28"}, ["1 of 0..1 on host 1 of 0..1: layers 33..60, ranks 0..7"]),
        (
            1,
            "--tp-size 4 --pp-size 4",
            {},
            ["2 of 0..3 on host 1 of 0..1: layers 30..44, ranks 0..3 of 4, GPUs 0, 1, 2, 3", "3 of 0..3 .*, GPUs 4, 5, 6, 7"],
        ),
        (
            1,
            "--tp-size 16 --ep-size 16",
            {},
            ["0 of 0..0 on host 1 of 0..1: layers 0..60, ranks 8..15 of 16, GPUs 0, 1, 2, 3,"],
        ),
    ],
)
def test_what_of_a_launch_is_on_this_host(monkeypatch, node, sizes, environ, said):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    arguments = ["--nnodes", "2", "--node-rank", str(node), "--dist-init-addr", "10.0.0.1:5000", "--tp-size", "8"]
    report = _report([*arguments, *sizes.split()], facts=PRO)
    found = [line.removeprefix("stage    ") for line in report.lines if line.startswith("stage ")]
    assert len(found) == len(said) and all(re.match(words, line) for words, line in zip(said, found, strict=True)), report
    memory = [line for line in report.lines if line.startswith("memory")]
    assert len(memory) == len(said) and (report.refusals == () or "--tp-size 16" in sizes)


def test_stages_and_replicas_exchange_no_tokens_with_each_other():
    arguments = ["--tp-size", "4", "--attn-dp-size", "4", "--pp-size", "2"]
    assert _report(arguments, machine=replace(EIGHT, blocked_peers=((0, 4), (4, 0)))).refusals == ()
    (said,) = _report(arguments, machine=replace(EIGHT, blocked_peers=((4, 7), (7, 4)))).refusals
    assert "GPUs 4->7, 7->4 cannot address each other's memory" in said


def test_a_layer_that_the_fused_kernel_cannot_hold_goes_to_the_next_one_unless_it_was_named():
    many = replace(FLASH, num_experts=1032)
    assert _report(["--tp-size", "8", "--ep-size", "8"], facts=many).verdict.choice.spec.name == "w4a16"
    named = _report(["--tp-size", "8", "--ep-size", "8"], {"HOPPER_MOE_KERNEL": "mxfp4_mega"}, facts=many)
    assert any("num_experts 1032 is above 1024, the limit of the fused kernel" in sentence for sentence in named.refusals)


def test_tensor_parallel_slices_are_checked_as_slices():
    assert _report(["--tp-size", "8"]).refusals == ()  # 2048 / 8 = 256
    odd = replace(FLASH, intermediate_size=2304)  # V4.1-Flash: 2304 / 8 = 288 is no multiple of 128, whole experts are
    assert any("2304 over 8 tensor-parallel slices" in sentence for sentence in _report(["--tp-size", "8"], facts=odd).refusals)
    assert _report(["--tp-size", "8", "--ep-size", "8"], facts=odd).refusals == ()


def test_capacity_and_peers_matter_only_to_a_kernel_that_exchanges_tokens(monkeypatch):
    arguments = ["--tp-size", "8", "--attn-dp-size", "8", "--chunked-prefill-size", "131072"]
    far = replace(EIGHT, blocked_peers=((0, 7), (7, 0)))
    small = {"HOPPER_MOE_MAX_TOKENS_PER_RANK": "2048"}
    spec = REGISTRY["mxfp4_mega"]
    monkeypatch.setitem(REGISTRY, "mxfp4_mega", replace(spec, multi_rank=False))
    assert _report(arguments, small, far).refusals == ()
    monkeypatch.setitem(REGISTRY, "mxfp4_mega", replace(spec, multi_rank=True))
    capacity, peers = _report(arguments, small, far).refusals
    assert "GPUs 0->7, 7->0 cannot address each other's memory" in peers
    assert "HOPPER_MOE_MAX_TOKENS_PER_RANK=2048 is below the 16384 tokens" in capacity  # 131072 over 8 ranks, divided once
    assert _report(arguments, {"HOPPER_MOE_MAX_TOKENS_PER_RANK": "16384"}).refusals == ()


def test_unknown_expert_type_is_left_to_the_loader():
    assert _report(["--tp-size", "8", "--ep-size", "8"], facts=replace(FLASH, expert_dtype="unknown")).refusals == ()


def test_model_facts(model):
    facts = read_model(str(model)).facts
    sizes = (facts.hidden_size, facts.intermediate_size, facts.num_experts, facts.top_k, facts.num_moe_layers)
    assert sizes == (256, 128, 8, 2, 2) and (facts.expert_dtype, facts.quantization, facts.swiglu_limit) == ("fp4", "fp8", 10.0)


def test_the_same_command_uses_the_cpu_host_elsewhere(model, monkeypatch):
    from hopper_moe.launch.cpu_host import server

    served = {}
    monkeypatch.setattr(server, "serve", lambda folder, **settings: served.update(folder=folder, **settings))
    monkeypatch.setattr(machines, "detect", lambda: Machine())
    arguments = ["--tp-size", "8", "--mem-fraction-static", "0.8", "--port", "31234"]
    named = ["--api-key", "secret", "--served-model-name", "v4"]
    result = CliRunner().invoke(main, ["serve", str(model), *arguments, *named])
    assert result.exit_code == 0, result.output
    at = {"host": "127.0.0.1", "port": 31234, "kernel": "reference"}
    assert served == {"folder": str(model), **at, "api_key": "secret", "served_model_name": "v4"}
    assert "secret" not in result.output
    assert "have no meaning to it: --tp-size 8 --mem-fraction-static 0.8" in result.output
    monkeypatch.setattr(machines, "detect", lambda: pytest.fail("--device cpu must not look for GPUs"))
    forced = CliRunner().invoke(main, ["serve", str(model), "--device", "cpu", "--port", "31234"])
    assert forced.exit_code == 0, forced.output


def test_every_command_resolves():
    for name, command in COMMANDS.items():
        module, attribute = command.place.split(":")
        result = CliRunner().invoke(getattr(importlib.import_module(module), attribute), ["--help"])
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


@pytest.mark.parametrize("encoding, wanted", [("utf-8", b"h\xc3\xa9\\udcff\n"), ("ascii", b"h\xc3\xa9?\n")])  # click mends ascii
def test_a_folder_whose_name_cannot_be_encoded_is_shown_escaped(model, tmp_path, encoding, wanted):
    name = os.fsdecode(b"h\xc3\xa9\xff")
    (tmp_path / name).symlink_to(model)
    environ = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict", "LC_ALL": "C.UTF-8"}
    shown = subprocess.run([COMMAND, "checkpoint", "inspect", name], cwd=tmp_path, env=environ, capture_output=True, timeout=300)
    assert shown.returncode == 0 and b"checkpoint         " + wanted in shown.stdout, shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], "MODEL is empty"),
        (["--model-path", "/m"], "--model-path stands where MODEL is expected: give the"),
    ],
)
def test_a_model_that_is_none_is_one_sentence(arguments, words):
    shown = CliRunner().invoke(main, ["serve", *arguments, "--device", "cpu"])
    assert shown.exit_code == 2 and words in shown.stderr


def test_the_commands_check_the_revision_that_was_asked_for(offline, monkeypatch):
    """H16 at the CPU's door; `stock_sglang/test_bad_launch.py` has the other."""
    monkeypatch.setattr(machines, "detect", lambda: Machine())
    for revision, commit, experts in (("main", "a", 4), ("exp", "b", 8)):
        cached(offline, revision, commit, **SIZES | {"n_routed_experts": experts})
    monkeypatch.setattr(doctor_checks, "sglang", lambda: [])  # 20 s, and not what this is about
    for command in (["serve", "org/name", "--dry-run"], ["doctor", "org/name"]):
        for arguments, experts in (([], 4), (["--revision", "exp"], 8)):
            shown = CliRunner().invoke(main, [*command, *arguments])
            assert shown.exit_code == 0 and f", {experts} experts, top 2" in shown.output, shown.output


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
    assert "GiB of packed expert weights" in shown.stdout
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
    assert finding.text.startswith(f"SGLang {version} is not supported") and "sglang>=0.5.23" in finding.text


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
