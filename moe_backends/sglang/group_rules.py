"""Refusals about ranks, hosts and what moves tokens between them, without the model: one sentence each."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping

from hopper_moe.moe_backends.env_table import is_off
from hopper_moe.moe_backends.kernel_specs import KernelSpec
from hopper_moe.moe_backends.sglang.launch_view import LaunchView
from hopper_moe.moe_backends.sglang.plan import BACKEND, DEEPEP_EXCHANGE, FUSED_EXCHANGE, NO_EXCHANGE
from hopper_moe.quantization import layout

DEEPEP_NORMAL = "--moe-a2a-backend deepep --deepep-mode normal"
DEEPEP_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
"""Group sizes that the package deep_ep has settings for; others need --deepep-config."""
DEEPEP_HOST_RANKS = 8
"""DeepEP takes so many consecutive ranks for the GPUs of one host."""

JIT_DEEPGEMM = "SGLANG_ENABLE_JIT_DEEPGEMM"
_DEEPEP_PACKAGES = {"deep_ep": "sgl-deep-ep", "deep_gemm": "sgl-deep-gemm"}

_MODES = {
    "normal": "normal mode, so decoding runs without CUDA graphs",
    "low_latency": "low-latency mode, also for prefill",
    "auto": "normal mode for prefill, low-latency mode for decoding",
}

_OTHER_EXCHANGES = {
    "nixl": "brings a block of rows per expert, which was never run here",
    "mooncake": "brings FP8 rows with a scale per 128 values, which no kernel here reads",
    "pplx": "brings a block of rows per expert, which was never run here",
    "deepep_v2": "is joined to SGLang's own deep_gemm runner",
    "flashinfer": "is joined to FlashInfer's runners",
    "flashinfer_megamoe": "is a kernel for SM100 GPUs",
    "mori": "is for AMD GPUs",
    "ascend_fuseep": "is for Ascend devices",
    "ascend_tp": "is for Ascend devices",
}


def host_refusals(view: LaunchView) -> Iterator[str]:
    """Why these hosts cannot hold the launch: SGLang would wait for ranks that no host starts, or stop with a traceback."""
    args = view.args
    nnodes, stages, tp_size = args.nnodes, args.pp_size, args.tp_size
    if nnodes < 1 or stages < 1 or tp_size < 1:
        yield f"--nnodes {nnodes}, --pp-size {stages} and --tp-size {tp_size} must all be 1 or more: give positive sizes."
        return
    if nnodes > 1 and not 0 <= args.node_rank < nnodes:
        yield f"--node-rank {args.node_rank} is outside 0..{nnodes - 1}, the hosts of --nnodes {nnodes}: number them from 0."
    if nnodes > 1 and args.dist_init_addr is None:
        yield f"--nnodes {nnodes} needs an address where the hosts meet: give all --dist-init-addr HOST:PORT of the first host."
    if nnodes % stages and stages % nnodes:
        yield (
            f"--pp-size {stages} does not spread evenly over --nnodes {nnodes}: use as many stages as hosts, or a multiple or a "
            "divisor of that number."
        )
    elif tp_size % view.nodes_per_stage:
        yield (
            f"--tp-size {tp_size} does not divide over the {view.nodes_per_stage} hosts of a pipeline stage: use a multiple of "
            f"{view.nodes_per_stage}."
        )
    if nnodes > 1 and view.num_replicas > 1:
        yield (
            f"--dp-size {args.dp_size} starts replicas inside one host, not over --nnodes {nnodes}: start one server a host, or "
            "use --attn-dp-size."
        )


def rank_refusals(view: LaunchView, spec: KernelSpec, environ: Mapping[str, str]) -> Iterator[str]:
    """Sizes that do not divide, and groups that the exchange does not serve."""
    args, exchange = view.args, view.exchange(spec)
    if args.ep_size < 1 or args.tp_size % args.ep_size:
        yield f"--ep-size {args.ep_size} does not divide --tp-size {args.tp_size}: use {args.tp_size} or leave it out."
    if view.attn_dp_size < 1 or args.tp_size % view.attn_dp_size:
        yield f"{view.attn_dp_size} attention data-parallel ranks do not divide --tp-size {args.tp_size}: use a divisor."
    elif exchange == FUSED_EXCHANGE and spec.multi_rank:
        yield from _fused_group(view, spec)
    elif exchange == DEEPEP_EXCHANGE:
        yield from list(_deepep_group(view)) or [*_deepep_options(view), *_deepep_packages(environ)]


def exchange_refusals(view: LaunchView, spec: KernelSpec) -> Iterator[str]:
    """An exchange that is not served, or not with this kernel."""
    asked = view.args.moe_a2a_backend
    if asked not in (NO_EXCHANGE, FUSED_EXCHANGE, DEEPEP_EXCHANGE):
        reason = _OTHER_EXCHANGES.get(asked, "is not known here")
        yield (
            f"--moe-a2a-backend {asked} {reason}, so {BACKEND} does not run with it: drop it, or between hosts use "
            f"{DEEPEP_NORMAL}."
        )
        return
    if asked == FUSED_EXCHANGE and view.args.tp_size > 1 and not spec.multi_rank:
        yield (
            f"--moe-a2a-backend megamoe with {view.args.tp_size} ranks needs a kernel that exchanges tokens itself, which "
            f"{spec.name} does not: drop --moe-a2a-backend, then SGLang's own collectives move them."
        )
    exchange, draft = view.exchange(spec), view.args.speculative_moe_a2a_backend
    if draft not in (None, exchange):
        yield (
            f"--speculative-moe-a2a-backend {draft} would lay out the draft's rows in another way than {spec.name}, which runs "
            f"its layers too, takes them here ({exchange}): drop --speculative-moe-a2a-backend."
        )


def exchange_reason(view: LaunchView, spec: KernelSpec) -> str:
    """What moves tokens between the ranks of a stage, and why: one line. Before SGLang has resolved the launch."""
    exchange, asked = view.exchange(spec), view.args.moe_a2a_backend
    if exchange == FUSED_EXCHANGE:
        return f"{exchange}: the ranks of a stage are in one host, where {spec.name} itself moves tokens over NVLink"
    if exchange == DEEPEP_EXCHANGE:
        why = f"the {view.args.tp_size} ranks of a stage span {view.nodes_per_stage} hosts, which the kernel's own does not leave"
        why = "asked for" if asked == exchange else why
        return f"{exchange}: {why}; {_MODES[view.deepep_mode]}"
    return f"{exchange}: every rank sees all tokens of its stage, and SGLang's collectives add the results up"


def _fused_group(view: LaunchView, spec: KernelSpec) -> Iterator[str]:
    """The ranks of one pipeline stage exchange tokens, over NVLink."""
    tp_size, nnodes = view.args.tp_size, view.args.nnodes
    if view.nodes_per_stage > 1:
        yield (
            f"--nnodes {nnodes} spreads the {tp_size} ranks that exchange tokens over hosts, but {spec.name} exchanges inside "
            f"one: use --pp-size {nnodes} with --tp-size {view.ranks_per_node}, so that each host holds a pipeline stage, or "
            f"DeepEP ({DEEPEP_NORMAL})."
        )
    elif tp_size > layout.MAX_RANKS:
        yield (
            f"--tp-size {tp_size} is above the {layout.MAX_RANKS} ranks that exchange tokens inside {spec.name}: use --pp-size "
            f"with --tp-size {layout.MAX_RANKS}, DeepEP ({DEEPEP_NORMAL}), or drop attention data parallelism."
        )


def _deepep_group(view: LaunchView) -> Iterator[str]:
    tp_size, of_host = view.args.tp_size, len(view.local_ranks)
    if view.nodes_per_stage > 1 and of_host != DEEPEP_HOST_RANKS:
        yield (
            f"--nnodes {view.args.nnodes} gives each host {of_host} of the {tp_size} ranks that exchange tokens, but DeepEP "
            f"takes {DEEPEP_HOST_RANKS} ranks for one host: use {DEEPEP_HOST_RANKS} GPUs a host, or --pp-size "
            f"{view.args.nnodes} with --tp-size {view.ranks_per_node}, so that each host holds a pipeline stage."
        )
    elif tp_size not in DEEPEP_RANKS and (tp_size % DEEPEP_HOST_RANKS or not view.option("deepep_config")):
        yield (
            f"--tp-size {tp_size} is no number of ranks that DeepEP serves ({', '.join(map(str, DEEPEP_RANKS))}): use one of "
            "them, or drop --moe-a2a-backend."
        )


def _deepep_options(view: LaunchView) -> Iterator[str]:
    args = view.args
    if view.deepep_mode == "auto" and (recording := _recording(view)):
        yield (
            f"{recording} counts tokens per expert in one mode of DeepEP only, and --deepep-mode auto has two: use --deepep-mode "
            "normal or low_latency."
        )
    if view.deepep_mode != "normal" and view.option("speculative_adaptive"):
        yield (
            f"--speculative-adaptive lengthens drafts while it serves, and --deepep-mode {view.deepep_mode} has room for a fixed "
            "number of tokens: drop it, or use --deepep-mode normal."
        )
    if args.deepep_dispatcher_output_dtype not in ("auto", "bf16"):
        yield (
            f"--deepep-dispatcher-output-dtype {args.deepep_dispatcher_output_dtype} would round tokens before the kernel, which "
            "takes BF16 rows: drop it."
        )
    if view.option("enable_two_batch_overlap"):
        yield (
            "--enable-two-batch-overlap would run DeepEP beside a kernel that takes every SM of the GPU: drop it, or "
            "--moe-a2a-backend."
        )


def _recording(view: LaunchView) -> str | None:
    """The argument after which SGLang records how many tokens experts get; its recorder has no form for two modes."""
    if mode := view.option("expert_distribution_recorder_mode"):
        return None if mode == "per_token" else f"--expert-distribution-recorder-mode {mode}"
    return "--enable-eplb" if view.option("enable_eplb") else None


def _deepep_packages(environ: Mapping[str, str]) -> Iterator[str]:
    """SGLang hands DeepEP's rows to a quantisation method only where it can run deep_gemm; else it stops in a request."""
    for module, package in _DEEPEP_PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            yield f"--moe-a2a-backend deepep needs {module}, which is not installed: pip install {package}."
    if is_off(environ.get(JIT_DEEPGEMM, "1")):
        yield f"--moe-a2a-backend deepep needs deep_gemm, which {JIT_DEEPGEMM}={environ[JIT_DEEPGEMM]} turns off: unset it."
