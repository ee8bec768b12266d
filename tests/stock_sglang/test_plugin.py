"""Registration and resolution in stock SGLang: seams, hooks, the command line, and everything that is refused there."""

from __future__ import annotations

import json
import os

import pytest
import stock

from hopper_moe.moe_backends.sglang import hooks, seams
from hopper_moe.moe_backends.sglang.plan import BACKEND
from hopper_moe.quantization.errors import Refusal


def plan() -> dict:
    return json.loads(os.environ["_HOPPER_MOE_PLAN"])


def resolved(args) -> object:
    from sglang.srt.arg_groups.overrides import resolved_view

    return resolved_view(args)


# ---- seams and hooks


@pytest.mark.parametrize("tables", [seams.LAUNCHER, seams.WORKER], ids=["launcher", "worker"])
def test_every_seam_is_as_pinned(tables):
    assert seams.check(tables) == []


def test_a_changed_or_missing_seam_is_noticed():
    table = {
        "sglang.srt.layers.moe.mega_moe.run_mega_routed_experts": "experts x",
        "sglang.srt.no_such_module.f": "",
        "sglang.srt.layers.moe.mega_moe.g": "",
    }
    problems = seams.check(table)
    assert (
        len(problems) == 3
        and "takes (experts hidden_states" in problems[0]
        and "is missing" in problems[1]
        and "is missing" in problems[2]
    )


def test_every_hook_is_in_place():
    from sglang.srt.arg_groups import resolution_hooks
    from sglang.srt.plugins.hook_registry import HookRegistry

    for hook in hooks.AROUND:
        assert hook.target in HookRegistry._patched and hook.reason
    for hook in hooks.RESOLUTION:
        assert hook.function in resolution_hooks._HOOKS[hook.target] and hook.reason
    targets = {hook.target for hook in hooks.TAKEOVERS + hooks.AROUND}
    assert targets <= set(seams.LAUNCHER) | set(seams.WORKER), "a hook target that no seam test watches"


def test_a_changed_seam_leaves_the_name_unregistered(monkeypatch):
    from hopper_moe.moe_backends.sglang import plugin

    monkeypatch.setitem(seams.LAUNCHER, "sglang.srt.layers.moe.utils.get_moe_runner_backend", "changed")
    installed = []
    monkeypatch.setattr(hooks, "install", lambda: installed.append(1))
    with pytest.raises(Refusal, match="cannot run there: .*get_moe_runner_backend takes"):
        plugin.register.__wrapped__()
    assert not installed


@pytest.mark.parametrize("installed", [seams.VERSION, "0.5.24", "0.6.0rc1"])
def test_this_version_and_newer_ones_are_looked_at(installed):
    seams.require_supported(installed)


@pytest.mark.parametrize("installed", ["0.5.22", "0.5.17.post1", "0.5.9"])
def test_an_older_version_is_refused(installed):
    with pytest.raises(Refusal, match=f"SGLang {installed} is not supported by hopper_moe: install sglang>=0.5.23"):
        seams.require_supported(installed)


def test_a_hook_that_sglang_could_not_apply_stops_the_launch(model, monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry

    monkeypatch.setattr(HookRegistry, "_patched", set())
    with pytest.raises(Refusal, match="could not apply the hook on .*get_quant_method"):
        stock.resolve(model)


# ---- the command line


def test_the_stock_parser_accepts_the_name_once():
    from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES

    assert MOE_RUNNER_BACKEND_CHOICES.count(BACKEND) == 1


@pytest.mark.parametrize(
    ("argv", "fields", "exchange", "capacity"),
    [
        ((), {"moe_a2a_backend": "none", "ep_size": 1}, "none", 8192),
        (("--tp-size", "2"), {"moe_a2a_backend": "none", "ep_size": 1}, "none", 8192),
        (("--tp-size", "8", "--ep-size", "8"), {"moe_a2a_backend": "none", "ep_size": 8}, "none", 8192),
        (("--tp-size", "8", "--attn-dp-size", "8"), {"moe_a2a_backend": "megamoe", "ep_size": 8}, "megamoe", 512),
        (
            ("--tp-size", "8", "--enable-dp-attention", "--dp-size", "8"),
            {"moe_a2a_backend": "megamoe", "ep_size": 8},
            "megamoe",
            512,
        ),
        (("--moe-a2a-backend", "megamoe"), {"moe_a2a_backend": "megamoe", "ep_size": 1}, "megamoe", 4096),
    ],
    ids=["one GPU", "TP 2", "EP 8", "EP 8 with attention DP", "older spelling", "exchange on one GPU"],
)
def test_resolution(model, argv, fields, exchange, capacity):
    args = stock.resolve(model, *argv, "--chunked-prefill-size", "4096", "--max-running-requests", "64")
    view = resolved(args)
    assert {name: getattr(view, name) for name in fields} == fields
    assert view.moe_runner_backend == view.speculative_moe_runner_backend == BACKEND
    assert view.cuda_graph_config.decode.backend == "disabled", "the reference cannot be captured"
    assert plan() == {"kernel": "reference", "exchange": exchange, "capacity": capacity, "block_rows": 0}
    args.check_server_args()


def test_graphs_stay_on_for_the_fused_kernel(model):
    os.environ["HOPPER_MOE_KERNEL"] = "mxfp4_mega"
    args = stock.resolve(model)
    assert resolved(args).cuda_graph_config.decode.backend == "full"
    assert plan()["kernel"] == "mxfp4_mega"


def test_auto_takes_the_fused_kernel_on_sm90(model):
    os.environ["HOPPER_MOE_KERNEL"] = "auto"
    stock.resolve(model, "--tp-size", "4", "--attn-dp-size", "4", "--ep-size", "4")
    assert plan()["kernel"] == "mxfp4_mega" and plan()["exchange"] == "megamoe", "ranks have tokens of their own"
    stock.resolve(model, "--tp-size", "4", "--ep-size", "4")
    assert plan()["kernel"] == "mxfp4_mega" and plan()["exchange"] == "none", "every rank sees every token: nothing to move"


def test_the_budget_is_not_divided_twice(model):
    """131072 / 8 = 16384 tokens per rank. SGLang's own check divides by 8 once more and lets a capacity of 2048 pass."""
    argv = ("--tp-size", "8", "--attn-dp-size", "8", "--chunked-prefill-size", "131072")
    os.environ["HOPPER_MOE_MAX_TOKENS_PER_RANK"] = "2048"
    with pytest.raises(Refusal, match="MAX_TOKENS_PER_RANK=2048 is below the 16384 tokens"):
        stock.resolve(model, *argv)
    os.environ["HOPPER_MOE_MAX_TOKENS_PER_RANK"] = "16384"
    stock.resolve(model, *argv)
    assert plan()["capacity"] == 16384
    assert os.environ["SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK"] == "16384", "SGLang compares batches with this one"


def test_what_one_launch_sets_for_sglang_binds_no_later_one(model):
    """A program that ran sglang.Engine hands its environment on to every server that it starts afterwards."""
    stock.resolve(model, *EP8, "--chunked-prefill-size", "8192")
    assert plan()["capacity"] == 1024
    stock.resolve(model, *EP8, "--chunked-prefill-size", "16384")
    assert plan()["capacity"] == 2048
    os.environ["HOPPER_MOE_MAX_TOKENS_PER_RANK"] = "4096"
    stock.resolve(model, *EP8, "--chunked-prefill-size", "16384")
    assert plan()["capacity"] == 4096
    del os.environ["HOPPER_MOE_MAX_TOKENS_PER_RANK"]
    os.environ["SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK"] = "1024"  # now the user says so
    with pytest.raises(Refusal, match="NUM_MAX_TOKENS_PER_RANK=1024 is below the 2048 tokens"):
        stock.resolve(model, *EP8, "--chunked-prefill-size", "16384")


def test_the_budget_covers_what_dynamic_chunking_may_choose(model):
    """SGLang's chunk sizer is bounded by --max-prefill-tokens alone, which is no divided quantity, and probes at 1.25 times the
    chunk before it serves."""
    from sglang.srt.arg_groups.overrides import max_prefill_buffer_tokens

    argv = (*EP8, "--pp-size", "2", "--max-running-requests", "8")
    argv += ("--chunked-prefill-size", "8192", "--max-prefill-tokens", "1200")
    stock.resolve(model, *argv)
    assert plan()["capacity"] == 1024
    args = stock.resolve(model, *argv, "--enable-dynamic-chunking")
    assert plan()["capacity"] == max_prefill_buffer_tokens(args) == 1280
    stock.resolve(model, *argv, "--enable-dynamic-chunking", "--max-prefill-tokens", "16384")
    assert plan()["capacity"] == 16384
    os.environ["HOPPER_MOE_MAX_TOKENS_PER_RANK"] = "1024"
    with pytest.raises(Refusal, match="=1024 is below the 1280 tokens .*lower --chunked-prefill-size or --max-prefill-tokens"):
        stock.resolve(model, *argv, "--enable-dynamic-chunking")


def test_other_launches_are_left_alone(model):
    args = stock.resolve(model, backend="auto")
    assert resolved(args).moe_runner_backend == "flashinfer_mxfp4" and "_HOPPER_MOE_PLAN" not in os.environ
    args = stock.resolve(model, "--tp-size", "8", "--attn-dp-size", "8", backend="megamoe")
    assert resolved(args).moe_a2a_backend == "megamoe" and "_HOPPER_MOE_PLAN" not in os.environ


# ---- refusals

EP8 = ("--tp-size", "8", "--attn-dp-size", "8")
MTP = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3")
MTP += ("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")


@pytest.mark.parametrize(("argv", "exchange"), [(EP8, "megamoe"), ((), "none")], ids=["megamoe", "none"])
def test_the_draft_takes_its_rows_as_the_target_does(model, argv, exchange):
    for spelled in ((), ("--speculative-moe-a2a-backend", exchange)):
        stock.resolve(model, *argv, *MTP, *spelled)
        assert plan()["exchange"] == exchange


def test_only_the_draft_on_this_backend_is_refused(model):
    with pytest.raises(Refusal, match="needs --moe-runner-backend hopper_moe as well"):
        stock.resolve(model, "--speculative-moe-runner-backend", BACKEND, backend="triton")


@pytest.mark.parametrize(
    ("environ", "argv", "sentence"),
    [
        ({"HOPPER_MOE_KERNEL": "fp8_mega"}, (), "the checkpoint's experts are fp4, but fp8_mega serves fp8"),
        ({"HOPPER_MOE_KERNEL": "fast"}, (), "'fast' is not a kernel"),
        ({"SGLANG_DSV4_FP4_DEQUANT": "1"}, (), "contradict each other"),
        ({"HOPPER_MOE_INEXACT_ROWS": "nearest"}, (), "'nearest' is not a rule for inexact rows"),
        (
            {"HOPPER_MOE_KERNEL": "w4a16"},
            ("--tp-size", "8", "--moe-a2a-backend", "megamoe"),
            "with 8 ranks needs a kernel that exchanges tokens itself",
        ),
        (
            {"HOPPER_MOE_KERNEL": "mxfp4_mega", "HOPPER_MOE_INEXACT_ROWS": "reference"},
            ("--cuda-graph-backend-decode", "full"),
            "HOPPER_MOE_INEXACT_ROWS=reference cannot be captured",
        ),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_environments_that_are_refused(model, environ, argv, sentence):
    os.environ.update(environ)
    with pytest.raises(Refusal, match=sentence):
        stock.resolve(model, *argv)


COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}, "ignore": ["lm_head"]}


@pytest.mark.parametrize(
    ("dtype", "changes", "sentence"),
    [
        ("F8_E4M3", {}, "the checkpoint.s experts are fp8, but .* serves fp4"),
        (
            "I8",
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "quantization_config": None},
            "not LlamaForCausalLM",
        ),
        ("I8", {"hidden_size": 4160}, "hidden_size 4160 is not a positive multiple of 128"),
        ("I8", {"moe_intermediate_size": 192}, "intermediate_size 192 is not a positive multiple of 128"),
        ("I8", {"num_experts_per_tok": 17, "n_routed_experts": 32}, "top_k 17 is outside 1..16"),
        ("I8", {"swiglu_limit": -1.0}, "swiglu_limit -1.0 .* no positive number"),
        ("BF16", {"quantization_config": None}, "quantization is None, but only quant_method fp8"),
        ("I8", {"quantization_config": None}, "quantization is None, but only quant_method fp8"),
        ("BF16", {"quantization_config": COMPRESSED}, "quantization is compressed-tensors, but only quant_method fp8"),
    ],
    ids=[
        "FP8 experts",
        "Llama",
        "hidden size",
        "intermediate size",
        "top-k",
        "clamp",
        "BF16 repack",
        "no quantization",
        "compressed-tensors",
    ],
)
def test_models_that_are_refused(tmp_path, dtype, changes, sentence):
    with pytest.raises(Refusal, match=sentence):
        stock.resolve(stock.write_model(tmp_path, dtype, **changes))


def test_experts_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(Refusal, match="12 experts do not divide into 8 expert-parallel ranks"):
        stock.resolve(stock.write_model(tmp_path, n_routed_experts=12), "--tp-size", "8", "--ep-size", "8")
