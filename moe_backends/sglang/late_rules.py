"""Refusals that follow from model and sizes together, and the plan of a launch that can run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping

from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends.env import Settings
from hopper_moe.moe_backends.kernel_specs import KernelSpec
from hopper_moe.moe_backends.registry import layer_refusals
from hopper_moe.moe_backends.sglang.early_rules import uncapturable
from hopper_moe.moe_backends.sglang.hyper_connections import hyper_connection_refusals
from hopper_moe.moe_backends.sglang.launch_view import LaunchView
from hopper_moe.moe_backends.sglang.low_latency_rules import block_tokens, low_latency_refusals
from hopper_moe.moe_backends.sglang.plan import BACKEND, DEEPEP_EXCHANGE, DEFAULT_CAPACITY, FUSED_EXCHANGE, ServingPlan
from hopper_moe.moe_backends.sglang.stages import stage_refusals
from hopper_moe.quantization.model_facts import SERVED_ARCHITECTURES, ModelFacts, block_size_refusal


def expert_dtype(model: ModelFacts, settings: Settings) -> str:
    """Type of the experts that the kernel receives, "fp4" or "fp8"; an unknown type is left to SGLang's loader."""
    if model.expert_dtype == "fp4" and settings.expand_fp4:
        return "fp8"
    return model.expert_dtype


def rank_shard(view: LaunchView, spec: KernelSpec, model: ModelFacts) -> ExpertShard:
    """One MoE layer as the kernel of rank 0 sees it. Sizes that do not divide are rounded down: `division_refusals` names
    them."""
    shard = ExpertShard.of(
        model,
        DEFAULT_CAPACITY,
        num_experts=_num_experts(view, model),
        num_ranks=view.ep_size(spec),
        intermediate_size=model.intermediate_size // _moe_tp(view, spec),
    )
    return shard.alone() if view.exchange(spec) == DEEPEP_EXCHANGE else shard


def _num_experts(view: LaunchView, model: ModelFacts) -> int:
    """Experts of a layer over all ranks, EPLB's copies included."""
    return model.num_experts + (view.args.ep_num_redundant_experts or 0)


def late_refusals(
    view: LaunchView, spec: KernelSpec, settings: Settings, model: ModelFacts, environ: Mapping[str, str] = os.environ
) -> Iterator[str]:
    """Every further reason, in a fixed order."""
    yield from model_refusals(model)
    yield from stage_refusals(model.num_layers, view.args.pp_size, environ)
    yield from layer_refusals(spec, rank_shard(view, spec, model), expert_dtype(model, settings))
    if reason := uncapturable(spec, settings):
        for phase in ("decode", "prefill"):
            backend = view.graph_backend(phase)
            if backend != "disabled":
                yield (
                    f"{reason} cannot be captured in a CUDA graph, but --cuda-graph-backend-{phase} {backend} was given: drop it."
                )
    exchange = view.exchange(spec)
    if view.is_resolved and view.args.moe_a2a_backend != exchange:
        yield (
            f"SGLang resolved --moe-a2a-backend to {view.args.moe_a2a_backend}, but {spec.name} needs {exchange}: drop the "
            "option behind it."
        )
    if exchange == FUSED_EXCHANGE:
        yield from _capacity_refusals(view, spec, settings)
    if _sends_blocks(view, spec):
        yield from low_latency_refusals(view, model.hidden_size, environ)
    yield from hyper_connection_refusals(model, environ)


def serving_plan(view: LaunchView, spec: KernelSpec, settings: Settings, environ: Mapping[str, str] = os.environ) -> ServingPlan:
    """The plan of a launch that nothing refuses. Before resolution the capacity is a lower bound."""
    exchange = view.exchange(spec)
    needed = view.required_tokens if exchange == FUSED_EXCHANGE else 0  # otherwise larger batches are run in pieces
    return ServingPlan(
        spec.name,
        exchange,
        settings.max_tokens_per_rank or needed or DEFAULT_CAPACITY,
        block_rows=(block_tokens(environ) or 0) * view.args.tp_size if _sends_blocks(view, spec) else 0,
    )


def _sends_blocks(view: LaunchView, spec: KernelSpec) -> bool:
    """Whether decoding, at least, runs in DeepEP's low-latency mode."""
    return view.exchange(spec) == DEEPEP_EXCHANGE and view.deepep_mode != "normal"


def _moe_tp(view: LaunchView, spec: KernelSpec) -> int:
    return max(view.args.tp_size // view.ep_size(spec), 1)


def model_refusals(model: ModelFacts) -> Iterator[str]:
    """Why no machine serves this model with this backend."""
    if model.architecture not in SERVED_ARCHITECTURES:
        yield (
            f"--moe-runner-backend {BACKEND} serves {', '.join(SERVED_ARCHITECTURES)}, not {model.architecture}: use "
            "--moe-runner-backend auto."
        )
    if model.expert_dtype == "nvfp4":
        yield f"the checkpoint's experts are NVFP4, {BACKEND} serves MXFP4 experts: use --moe-runner-backend auto."
    if model.quantization != "fp8":
        # Only SGLang's Fp8Config calls our hook; with another method Triton would silently run the experts.
        yield (
            f"the model's quantization is {model.quantization}, but only quant_method fp8 in its config.json makes SGLang build "
            f"expert layers for {BACKEND}: give the stock checkpoint, or use --moe-runner-backend auto."
        )
    if model.swiglu_limit is not None and not (math.isfinite(model.swiglu_limit) and model.swiglu_limit > 0):
        yield f"swiglu_limit {model.swiglu_limit} in the model's config.json is no positive number: mend or remove it."
    if sentence := block_size_refusal(model):
        yield sentence


def division_refusals(view: LaunchView, spec: KernelSpec, model: ModelFacts) -> Iterator[str]:
    """Sizes that do not divide over the ranks, whichever kernel runs; checked before `auto` chooses one."""
    moe_tp, shard = _moe_tp(view, spec), rank_shard(view, spec, model)
    sliced = model.intermediate_size % moe_tp or (
        shard.intermediate_size % spec.size_multiple and not model.intermediate_size % spec.size_multiple
    )
    if moe_tp > 1 and sliced:
        yield (
            f"moe_intermediate_size {model.intermediate_size} over {moe_tp} tensor-parallel slices is no multiple of "
            f"{spec.size_multiple}, which {spec.name} needs: use --ep-size {view.args.tp_size}, so that ranks hold whole experts."
        )
    if (num_experts := _num_experts(view, model)) % view.ep_size(spec):
        yield (
            f"{num_experts} experts do not divide into {view.ep_size(spec)} expert-parallel ranks: choose a size that "
            "divides them."
        )


def _capacity_refusals(view: LaunchView, spec: KernelSpec, settings: Settings) -> Iterator[str]:
    chunk = view.chunked_prefill_size
    if view.args.disaggregation_mode != "decode" and (chunk is not None or view.is_resolved) and (chunk or 0) <= 0:
        yield (
            f"--chunked-prefill-size {chunk} leaves the tokens per rank unbounded, but the exchange buffer of {spec.name} is "
            "sized once: give a positive --chunked-prefill-size."
        )
        return
    asked, needed = settings.max_tokens_per_rank, view.required_tokens
    if asked is not None and asked < needed:
        also = " or --max-prefill-tokens, up to which chunks are sized dynamically" if view.has_dynamic_chunks else ""
        yield (
            f"{settings.origin('max_tokens_per_rank')}={asked} is below the {needed} tokens that a rank may bring (chunked "
            f"prefill {chunk} per rank, or running requests x draft tokens): raise it to {needed} or lower "
            f"--chunked-prefill-size{also}."
        )
