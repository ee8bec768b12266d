"""One table of launches at both doors: SGLang's own resolution with the plugin's hooks, and `hopper-moe serve` before it starts.

The verdict and the sentence are the same, because both ask the same rules.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import stock

from hopper_moe.kernels.device import SM90
from hopper_moe.launch.model_facts import read_model
from hopper_moe.launch.sglang_args import parse
from hopper_moe.moe_backends.env import settings
from hopper_moe.moe_backends.kernel_specs import REGISTRY
from hopper_moe.moe_backends.registry import Choice
from hopper_moe.moe_backends.sglang import verdict
from hopper_moe.moe_backends.sglang.hyper_connections import FUSE
from hopper_moe.moe_backends.sglang.low_latency_rules import BUDGET
from hopper_moe.moe_backends.sglang.plan import BACKEND
from hopper_moe.moe_backends.sglang.verdict import judge
from hopper_moe.quantization.errors import Refusal

CHUNK = ("--chunked-prefill-size", "4096")
DP8 = ("--tp-size", "8", "--attn-dp-size", "8", *CHUNK)
EP8 = ("--tp-size", "8", "--ep-size", "8")
MTP = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3")
MTP += ("--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "4")
NODES2 = ("--nnodes", "2", "--node-rank", "0", "--dist-init-addr", "10.0.0.1:5000")
TP16 = ("--tp-size", "16", "--attn-dp-size", "16", *CHUNK)
DEEPEP = ("--moe-a2a-backend", "deepep")
NORMAL, LOW_LATENCY = ((*DEEPEP, "--deepep-mode", mode) for mode in ("normal", "low_latency"))
REQUESTS = ("--max-running-requests",)
EPLB = ("--enable-eplb", "--ep-num-redundant-experts", "16")
WIDE = {"n_routed_experts": 64}
MEGA, W4A16, AUTO = ({"HOPPER_MOE_KERNEL": name} for name in ("mxfp4_mega", "w4a16", "auto"))
EXPANDED = {"HOPPER_MOE_KERNEL": "fp8_mega", "SGLANG_DSV4_FP4_DEQUANT": "1"}
DETERMINISTIC, ON_POLICY = ("--enable-deterministic-inference",), ("--rl-on-policy-target", "fsdp")
FLASH = {"hidden_size": 4096, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 6}
V41 = {"hidden_size": 5120, "moe_intermediate_size": 2304, "n_routed_experts": 384, "num_experts_per_tok": 6}

# (arguments, words of the sentence or None where it is served, environment, config.json changes)
LAUNCHES = [
    ((), None, {}, {}),
    (EP8, None, {}, {}),
    (("--tp", "8", "--ep", "8"), None, {}, {}),
    (("--tensor-parallel", "8", "--expert-parallel", "8"), None, {}, {}),
    (DP8, None, MEGA, {}),
    (("--tp-size", "8", "--enable-dp-attention", "--dp-size", "8", *CHUNK), None, MEGA, {}),
    ((*DP8, "--ep-size", "4"), None, MEGA, {}),
    (("--tp-size", "4", "--attn-dp-size", "2", *CHUNK), None, MEGA, FLASH),
    (("--tp-size", "8"), None, MEGA, FLASH),
    (("--moe-a2a-backend", "megamoe", *CHUNK), None, MEGA, {}),
    (("--moe-a2a-backend", "none"), None, MEGA, {}),
    (("--elastic-ep-backend", "none"), None, {}, {}),
    (("--cpu-offload-gb", "0"), None, {}, {}),
    (("--offload-group-size", "-1"), None, {}, {}),
    (("--quantization", "fp8"), None, {}, {}),
    (("--load-format", "safetensors"), None, {}, {}),
    (("--load-format", "dummy"), None, {}, {}),
    (("--load-format", "dummy", *DP8, *MTP), None, MEGA | {"HOPPER_MOE_DUMMY_ROUTING": "zipf:1"}, FLASH),
    (("--dp-size", "2"), None, MEGA, {}),
    ((*EP8, "--ep-num-redundant-experts", "8"), None, MEGA, {}),
    ((*DP8, *MTP), None, MEGA, {}),
    (("--speculative-moe-runner-backend", BACKEND), None, MEGA, {}),
    (("--speculative-moe-a2a-backend", "none", *MTP), None, MEGA, {}),
    (("--chunked-prefill-size", "-1"), None, MEGA, {}),
    (("--pp-size", "2", *EP8), None, MEGA, {}),
    ((*NODES2, "--pp-size", "2", *DP8), None, MEGA, {}),
    ((*NODES2, *EP8), None, MEGA, {}),
    (("--disaggregation-mode", "decode", *DP8), None, MEGA, {}),
    (("--disaggregation-mode", "prefill", *DP8), None, MEGA, {}),
    (DP8, None, MEGA | {"HOPPER_MOE_MAX_TOKENS_PER_RANK": "4096"}, {}),
    (("--enable-two-batch-overlap",), "--enable-two-batch-overlap cannot run with kernel mxfp4_mega", MEGA, {}),
    (("--enable-single-batch-overlap",), "--enable-single-batch-overlap cannot run", {}, {}),
    (("--enable-pdmux",), "--enable-pdmux cannot run .* one workspace", {}, {}),
    (("--enable-torch-compile",), "--enable-torch-compile cannot run", {}, {}),
    (("--enable-lora",), "--enable-lora cannot run .* adapters", {}, {}),
    (("--enforce-shared-experts-fusion",), "--enforce-shared-experts-fusion cannot run .* shared expert", {}, {}),
    (("--enforce-shared-experts",), "--enforce-shared-experts-fusion cannot run .* shared expert", {}, {}),
    (("--enable-waterfill",), "--enable-waterfill cannot run .* shared expert", {}, {}),
    (("--enable-paged-experts",), "--enable-paged-experts cannot run", {}, {}),
    (("--kt-weight-path", "/x"), "--kt-weight-path /x cannot run .* CPU", {}, {}),
    (("--cpu-offload-gb", "8"), "--cpu-offload-gb 8 cannot run .* CPU", {}, {}),
    (("--offload-group-size", "4"), "--offload-group-size 4 copies or moves", {}, {}),
    (("--dwdp-size", "2"), "--dwdp-size 2 copies or moves", {}, {}),
    (("--elastic-ep-backend", "mooncake"), "--elastic-ep-backend mooncake cannot run", {}, {}),
    (("--load-format", "sharded_state"), "--load-format sharded_state fills", {}, {}),
    (("--load-format", "presharded"), "--load-format presharded fills", {}, {}),
    (("--load-format", "remote_instance"), "--load-format remote_instance fills", {}, {}),
    (("--weight-cache-mode", "daemon"), "--weight-cache-mode daemon fills", {}, {}),
    (("--use-ray",), "--use-ray cannot run", {}, {}),
    (("--quantization", "modelopt_fp4"), "--quantization modelopt_fp4 is not how", {}, {}),
    # hosts and pipeline stages
    ((*NODES2, "--pp-size", "2", *EP8), None, MEGA, {}),
    ((*NODES2, "--pp-size", "4", *EP8), None, MEGA, {}),
    (("--nnodes", "4", *NODES2[2:], "--pp-size", "2", *EP8), None, MEGA, {}),
    (("--pp-size", "2", *EP8, "--disaggregation-mode", "prefill"), None, MEGA, {}),
    (("--nnodes", "0", *EP8), "--nnodes 0, --pp-size 1 and --tp-size 8 must all be 1 or more", MEGA, {}),
    (("--nnodes", "2", "--node-rank", "2", *NODES2[4:], "--pp-size", "2", *EP8), "--node-rank 2 is outside 0..1", MEGA, {}),
    (("--nnodes", "2", "--pp-size", "2", *EP8), "--nnodes 2 needs an address .*--dist-init-addr HOST:PORT", MEGA, {}),
    ((*NODES2, "--pp-size", "3", *EP8), "--pp-size 3 does not spread evenly over --nnodes 2", MEGA, {}),
    ((*NODES2, "--tp-size", "3"), "--tp-size 3 does not divide over the 2 hosts of a pipeline stage", MEGA, {}),
    ((*NODES2, "--dp-size", "2", "--tp-size", "2"), "--dp-size 2 starts replicas inside one host", MEGA, {}),
    (("--pp-size", "8"), "--pp-size 8 is above the 4 layers", MEGA, {}),
    ((), "hidden_size 384 is no multiple of 2048, so SGLang's fused hyper-connection", {FUSE: "1"}, {}),
    ((), None, MEGA | {FUSE: "1"}, FLASH),
    ((), None, MEGA | {FUSE: "true"}, FLASH | {"hidden_size": 7168}),
    (("--pp-size", "2"), None, MEGA | {"SGLANG_PP_LAYER_PARTITION": "3,1"}, {}),
    (("--pp-size", "2"), "LAYER_PARTITION=3,2 does not give each of 2 stages", MEGA | {"SGLANG_PP_LAYER_PARTITION": "3,2"}, {}),
    (("--pp-size", "2"), "LAYER_PARTITION=4 does not give each of 2", MEGA | {"SGLANG_PP_LAYER_PARTITION": "4"}, {}),
    (("--pp-size", "2"), "LAYER_PARTITION=a,4 does not give", MEGA | {"SGLANG_PP_LAYER_PARTITION": "a,4"}, {}),
    ((*NODES2, "--moe-a2a-backend", "megamoe", *TP16), "16 ranks .* over hosts.*--pp-size 2 with.*deepep-mode normal", MEGA, {}),
    # DeepEP
    ((*EP8, *NORMAL), None, MEGA, {}),
    ((*DP8, *NORMAL), None, MEGA, {}),
    ((*DP8, *NORMAL), None, {"HOPPER_MOE_KERNEL": "auto"}, {}),
    ((*DP8, *NORMAL), None, W4A16, {}),
    ((*DP8, *NORMAL), None, {}, {}),
    ((*DP8, *NORMAL, "--deepep-dispatcher-output-dtype", "bf16"), None, MEGA, {}),
    ((*DP8, *NORMAL, *EPLB), None, MEGA, WIDE),
    ((*DP8, *NORMAL, *MTP), None, MEGA, {}),
    ((*DP8, *NORMAL, "--disaggregation-mode", "prefill"), None, MEGA, {}),
    ((*DP8, *NORMAL, "--disaggregation-mode", "decode"), None, MEGA, {}),
    ((*TP16, *NODES2, *NORMAL), None, MEGA, {}),
    ((*TP16, *NODES2), None, MEGA, {}),
    ((*TP16, *NODES2), None, {"HOPPER_MOE_KERNEL": "auto"}, {}),
    ((*TP16, *NODES2, "--ep-size", "16"), None, W4A16, {}),
    ((*TP16, *NORMAL), None, MEGA, {}),
    (("--tp-size", "48", "--attn-dp-size", "48", "--nnodes", "6", *NODES2[2:], *CHUNK), None, MEGA, {"n_routed_experts": 1152}),
    # its low-latency mode
    ((*DP8, *DEEPEP), None, MEGA, FLASH),
    ((*DP8, *DEEPEP, "--deepep-mode", "auto"), None, W4A16, FLASH),
    ((*DP8, *DEEPEP, *MTP), None, MEGA, FLASH),
    ((*EP8, *DEEPEP, *REQUESTS, "1024"), None, MEGA, FLASH),
    ((*TP16, *NODES2, *DEEPEP), None, MEGA, FLASH),
    ((*TP16, *NODES2, *LOW_LATENCY), None, MEGA | {BUDGET: "256"}, FLASH),
    ((*TP16, *NODES2, *LOW_LATENCY[2:], *CHUNK[:1], "2048"), None, MEGA, FLASH),
    ((*DP8, *LOW_LATENCY), None, W4A16 | {BUDGET: "512"}, FLASH),
    ((*DP8, *LOW_LATENCY, "--disaggregation-mode", "decode"), None, MEGA, FLASH),
    ((*DP8, *DEEPEP, *REQUESTS, "4096", "--disaggregation-mode", "prefill"), None, MEGA, FLASH),
    ((*DP8, *DEEPEP, *REQUESTS, "1280"), None, MEGA | {BUDGET: "160"}, FLASH),
    ((*DP8, *LOW_LATENCY, *EPLB), None, MEGA | {BUDGET: "512"}, FLASH),
    ((*DP8, *DEEPEP, "--expert-distribution-recorder-mode", "per_token"), None, MEGA, FLASH),
    (
        (*DP8, *DEEPEP, *REQUESTS, "1280"),
        f"at most 128 tokens .*but 1280 running requests bring 160: set {BUDGET}=160 or lower --max-running-requests to 1024",
        MEGA,
        FLASH,
    ),
    ((*DP8, *DEEPEP, *MTP, *REQUESTS, "512"), "512 running requests of 4 draft tokens bring 256: .* to 256", MEGA, FLASH),
    ((*DP8, *DEEPEP, *REQUESTS, "16384"), "16384 running requests bring 2048: lower --max-running", MEGA, FLASH),
    ((*EP8, *DEEPEP, *REQUESTS, "1032"), "1032 running requests bring 129: .* to 1024", MEGA, FLASH),
    ((*DP8, *LOW_LATENCY), f"prefill, but chunks bring 512: set {BUDGET}=512, lower --chunked.* or use .* auto", MEGA, FLASH),
    ((*TP16, *NODES2, *LOW_LATENCY[2:]), f"chunks bring 256: set {BUDGET}=256, lower", MEGA, FLASH),
    ((*DP8, *LOW_LATENCY, *CHUNK[:1], "16384"), "chunks bring 2048: lower --chunked-prefill-size or use", MEGA, FLASH),
    ((*DP8, *LOW_LATENCY, *CHUNK[:1], "-1"), "also in prefill: give a positive --chunked-prefill-size", MEGA, FLASH),
    *[
        ((*DP8, *DEEPEP), f"{BUDGET}={number} is outside 1..1024", MEGA | {BUDGET: number}, FLASH)
        for number in ("0", "1025", "x")
    ],
    ((*DP8, *DEEPEP, *MTP, "--speculative-adaptive"), "--speculative-adaptive lengthens drafts .* or use", MEGA, FLASH),
    ((*DP8, *DEEPEP), "--deepep-mode auto cannot send rows of hidden_size 384", MEGA, {}),
    ((*DP8, *DEEPEP, *EPLB), "--enable-eplb counts tokens .*--deepep-mode auto has two", MEGA, FLASH),
    ((*DP8, *DEEPEP, "--expert-distribution-recorder-mode", "stat"), "recorder-mode stat counts tokens", MEGA, FLASH),
    ((*DP8, *LOW_LATENCY, "--deepep-dispatcher-output-dtype", "nvfp4"), "-dtype nvfp4 would round tokens", MEGA, FLASH),
    ((*DP8, *DEEPEP, "--enable-two-batch-overlap"), "--enable-two-batch-overlap would run DeepEP beside", MEGA, FLASH),
    ((*DP8, *NORMAL, "--deepep-dispatcher-output-dtype", "fp8"), "-dtype fp8 would round tokens .*drop it", MEGA, {}),
    ((*DP8, *NORMAL, "--enable-two-batch-overlap"), "--enable-two-batch-overlap would run DeepEP beside", MEGA, {}),
    ((*DP8, *NORMAL, "--enable-single-batch-overlap"), "--enable-single-batch-overlap cannot run", MEGA, {}),
    ((*DP8, *NORMAL), "needs deep_gemm, which SGLANG_ENABLE_JIT_DEEPGEMM=0", MEGA | {"SGLANG_ENABLE_JIT_DEEPGEMM": "0"}, {}),
    ((*DP8, *NORMAL, *MTP, "--speculative-moe-a2a-backend", "none"), "--speculative-moe-a2a-backend none .* drop", MEGA, {}),
    (NORMAL, "--tp-size 1 is no number of ranks that DeepEP serves", MEGA, {}),
    (("--tp-size", "6", *NORMAL), "--tp-size 6 is no number of ranks that DeepEP serves", MEGA, {"n_routed_experts": 12}),
    ((*DP8, *NODES2), "gives each host 4 of the 8 ranks .*takes 8 ranks for one host.*--pp-size 2 with --tp-size 4", MEGA, {}),
    *[
        ((*DP8, "--moe-a2a-backend", name), f"--moe-a2a-backend {name} .*drop it, or .*--deepep-mode normal", MEGA, {})
        for name in ("nixl", "mooncake", "pplx", "deepep_v2", "flashinfer", "flashinfer_megamoe", "mori")
    ],
    # replicas
    (("--dp-size", "2", *EP8), None, MEGA, {}),
    (("--dp-size", "2", "--disaggregation-mode", "decode"), None, MEGA, {}),
    (("--dp-size", "2", "--disaggregation-mode", "prefill", *EP8), None, MEGA, {}),
    (("--speculative-moe-runner-backend", "triton"), "--speculative-moe-runner-backend triton beside", {}, {}),
    ((*DP8, *MTP, "--speculative-moe-a2a-backend", "none"), "--speculative-moe-a2a-backend none .* drop", MEGA, {}),
    ((*DP8, *MTP, "--speculative-moe-a2a-backend", "deepep"), "--speculative-moe-a2a-backend deepep .* drop", MEGA, {}),
    (("--tp-size", "8", "--attn-dp-size", "8", "--chunked-prefill-size", "-1"), "size -1 leaves the tokens", MEGA, {}),
    (DP8, "MAX_TOKENS_PER_RANK=256 is below the 512 tokens", MEGA | {"HOPPER_MOE_MAX_TOKENS_PER_RANK": "256"}, {}),
    (("--tp-size", "8", "--ep-size", "3"), "--ep-size 3 does not divide --tp-size 8: use 8", {}, {}),
    (("--tp-size", "8", "--attn-dp-size", "3"), "3 attention data-parallel ranks do not divide --tp-size 8", {}, {}),
    (("--tp-size", "16", "--attn-dp-size", "16", *CHUNK), "--tp-size 16 is above the 8 ranks that exchange", MEGA, {}),
    (("--tp-size", "8", "--moe-a2a-backend", "megamoe", *CHUNK), "needs a kernel that exchanges tokens itself", W4A16, {}),
    (("--cuda-graph-backend-decode", "full"), "--cuda-graph-backend-decode full was given: drop it", {}, {}),
    (("--tp-size", "8"), "2304 over 8 tensor-parallel slices is no multiple of 128.*use --ep-size 8", MEGA, V41),
    (EP8, None, MEGA, V41),
    (("--tp-size", "8", "--ep-size", "8"), "20 experts do not divide into 8", {}, {"n_routed_experts": 20}),
    ((), "hidden_size 4160 is not a positive multiple of 128", {}, {"hidden_size": 4160}),
    ((), "intermediate_size 192 is not a positive multiple of 128", {}, {"moe_intermediate_size": 192}),
    ((), "top_k 17 is outside 1..16", {}, {"num_experts_per_tok": 17, "n_routed_experts": 32}),
    ((), "experts are fp4, but fp8_mega serves fp8", {"HOPPER_MOE_KERNEL": "fp8_mega"}, {}),
    (DP8, "PARALLEL_DEEPGEMM_WARMUP=1 warms up", MEGA | {"SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP": "1"}, {}),
    ((), "quantization is None, but only quant_method fp8", {}, {"quantization_config": None}),
    # determinism
    *[
        ((*flags, *more), None, environ, {})
        for flags in (DETERMINISTIC, ON_POLICY)
        for more, environ in (((), {}), ((), MEGA), ((), AUTO), ((), EXPANDED), (EP8, MEGA), (DP8, MEGA), ((*DP8, *NORMAL), MEGA))
    ],
    (DETERMINISTIC, "^--enable-deterministic-inference needs results .* but w4a16 .*HOPPER_MOE_KERNEL=mxfp4_mega", W4A16, {}),
    (ON_POLICY, "^--rl-on-policy-target fsdp needs results .* but w4a16 .*HOPPER_MOE_KERNEL=mxfp4_mega", W4A16, {}),
    ((*ON_POLICY, *DETERMINISTIC, *EP8), "^--rl-on-policy-target fsdp needs .* but w4a16 ", W4A16, {}),
    ((*DETERMINISTIC, *DP8, *NORMAL), "^--enable-deterministic-inference needs .* but w4a16 ", W4A16, {}),
]


def test_the_table_is_large():
    assert len(LAUNCHES) >= 60 and len({repr(launch) for launch in LAUNCHES}) == len(LAUNCHES)


def at_the_plugin(model: Path, argv: tuple[str, ...]) -> tuple[str | None, dict | None]:
    """(the sentence that stops SGLang's resolution, or the plan)."""
    try:
        stock.resolve(model, *argv)
    except Refusal as refusal:
        return str(refusal), None
    return None, json.loads(os.environ["_HOPPER_MOE_PLAN"])


def at_serve(model: Path, argv: tuple[str, ...]) -> tuple[str | None, dict | None]:
    """The same of `hopper-moe serve`, on a machine with enough H200."""
    stock.forget_settings()
    launch = parse(str(model), ["--device", "cuda", "--log-level", "error", *argv])
    found = judge(launch.view, read_model(str(model)).facts, settings(), SM90, None)
    if found.refusals:
        return found.refusals[0], None
    return None, vars(found.plan)


@pytest.fixture
def deterministic_attention() -> Iterator[None]:
    """SGLang 0.5.23 refuses DeepSeek-V4's attention with determinism; by its own extension point this one does not."""
    from sglang.srt.arg_groups import choices

    choices.add_deterministic_attention_backend_choices(["dsv4"])
    yield
    choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.remove("dsv4")


@pytest.mark.parametrize("argv", [DETERMINISTIC, ON_POLICY, (*DETERMINISTIC, *EP8)])
def test_of_deterministic_attention_sglang_says_the_same_with_us_as_without(model, argv):
    said = []
    for backend in ("hopper_moe", "marlin"):
        with pytest.raises(ValueError, match="attention backends are supported for deterministic.* specified 'dsv4'") as caught:
            stock.resolve(model, *argv, backend=backend)
        said.append((type(caught.value), str(caught.value)))
    assert said[0] == said[1]
    assert at_serve(model, argv)[0] is None, "it is SGLang's to say"


@pytest.mark.parametrize("flags", [(), DETERMINISTIC])
def test_auto_keeps_the_kernel_whose_bits_do_not_depend_on_the_batch(model, monkeypatch, flags):
    """Also where the measured table prefers another."""
    os.environ.update(AUTO)
    w4a16 = Choice(REGISTRY["w4a16"], "measured")
    monkeypatch.setattr(verdict, "choose", lambda *_args, **how: w4a16 if "shard" in how else Choice(REGISTRY["mxfp4_mega"], ""))
    assert at_serve(model, flags)[1]["kernel"] == ("mxfp4_mega" if flags else "w4a16")


@pytest.mark.usefixtures("deterministic_attention")
@pytest.mark.parametrize(
    ("argv", "words", "environ", "changes"), LAUNCHES, ids=[f"{i} {' '.join(row[0])}" for i, row in enumerate(LAUNCHES)]
)
def test_both_doors_say_the_same(tmp_path, argv, words, environ, changes):
    model = stock.write_model(tmp_path / "model", **changes)
    os.environ.update(environ)
    before = dict(os.environ)
    late, plan = at_the_plugin(model, argv)
    os.environ.clear()
    os.environ.update(before)
    early, expected = at_serve(model, argv)
    assert dict(os.environ) == before, "a look at the arguments leaves the environment alone"
    assert early == late
    if words is None:
        assert late is None and plan["kernel"] == expected["kernel"] and plan["exchange"] == expected["exchange"]
        assert plan["exchange"] != "deepep" or plan["capacity"] == 8192, "DeepEP's rows are run in pieces"
        asked = "normal" not in argv and not {"deepep", "low_latency"}.isdisjoint(argv)  # else DeepEP is in its normal mode
        sent = int(environ.get(BUDGET, 128)) * int(argv[argv.index("--tp-size") + 1]) if asked else 0
        assert plan["block_rows"] == expected["block_rows"] == sent
    else:
        assert late is not None and re.search(words, late), late
