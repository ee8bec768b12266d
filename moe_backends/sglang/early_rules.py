"""Refusals that follow from a launch's arguments alone, without the model: one sentence each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from hopper_moe.moe_backends.env import Settings
from hopper_moe.moe_backends.kernel_specs import KernelSpec
from hopper_moe.moe_backends.sglang.group_rules import exchange_refusals, host_refusals, rank_refusals
from hopper_moe.moe_backends.sglang.launch_view import LaunchView
from hopper_moe.moe_backends.sglang.plan import BACKEND, DEEPEP_EXCHANGE, FUSED_EXCHANGE

_UNSUPPORTED = (  # (argument, flag, why not); refused unless it is off
    ("enable_single_batch_overlap", "--enable-single-batch-overlap", "the fused kernel has no dispatch to overlap with"),
    ("enable_pdmux", "--enable-pdmux", "two launches at once would share one workspace and wait for each other's SMs"),
    ("enable_torch_compile", "--enable-torch-compile", "the kernel call would break every compiled graph"),
    ("enable_lora", "--enable-lora", "adapters on packed FP4 experts would be ignored"),
    ("lora_paths", "--lora-paths", "adapters on packed FP4 experts would be ignored"),
    (
        "enforce_shared_experts_fusion",
        "--enforce-shared-experts-fusion",
        "it would turn the FP8 shared expert into an FP4 routed one",
    ),
    ("enable_waterfill", "--enable-waterfill", "it needs the shared expert fused into the routed ones"),
    ("enable_paged_experts", "--enable-paged-experts", "it moves expert weights behind the kernel's back"),
    ("kt_weight_path", "--kt-weight-path", "it moves experts to the CPU"),
    ("cpu_offload_gb", "--cpu-offload-gb", "it moves packed experts to the CPU"),
    ("elastic_ep_backend", "--elastic-ep-backend", "experts must stay on the ranks that packed them"),
    ("use_ray", "--use-ray", "SGLang loads no plugins in Ray's workers"),
    ("enable_w4a4_mxfp4_megamoe", "--enable-w4a4-mxfp4-megamoe", "FP4 activations need another GPU"),
)
_COPIES_EXPERTS = (("dwdp_size", "--dwdp-size", 1), ("offload_group_size", "--offload-group-size", 0))  # highest that is off
_WHOLE_PARAMETERS = ("sharded_state", "presharded", "remote_instance")
"""Load formats that write a layer's final parameters directly and bypass the loader that we pack experts in."""

PARALLEL_WARMUP = "SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP"


def early_refusals(
    view: LaunchView, spec: KernelSpec, settings: Settings, environ: Mapping[str, str] = os.environ
) -> Iterator[str]:
    """Every reason, in a fixed order. `spec`: the kernel chosen so far."""
    yield from _names(view)
    yield from _unsupported(view, spec)
    yield from _determinism(view, spec)
    yield from _loading(view)
    hosts = list(host_refusals(view))
    yield from hosts
    if not hosts:  # the sizes below are divided over them
        yield from rank_refusals(view, spec, environ)
        yield from exchange_refusals(view, spec)
    if view.exchange(spec) == FUSED_EXCHANGE and environ.get(PARALLEL_WARMUP, "0").lower() in ("1", "true", "yes", "y"):
        yield (
            f"{PARALLEL_WARMUP}={environ[PARALLEL_WARMUP]} warms up with more tokens than a rank may bring to the fused "
            "exchange: unset it."
        )


def declarations(view: LaunchView, spec: KernelSpec, settings: Settings) -> dict[str, Any]:
    """Arguments that this backend sets once nothing is refused."""
    declared: dict[str, Any] = {"moe_a2a_backend": view.exchange(spec), "disable_shared_experts_fusion": True}
    if view.exchange(spec) == DEEPEP_EXCHANGE:  # rows as the kernels take them: unrounded
        declared |= {"deepep_mode": view.deepep_mode, "deepep_dispatcher_output_dtype": "bf16"}
    if uncapturable(spec, settings):
        declared["disable_cuda_graph"] = True
    return declared


def uncapturable(spec: KernelSpec, settings: Settings) -> str | None:
    """What in this launch prevents CUDA graphs; None: nothing."""
    if not spec.capturable:
        return f"kernel {spec.name}"
    return "HOPPER_MOE_INEXACT_ROWS=reference" if settings.inexact_rows == "reference" else None


def _names(view: LaunchView) -> Iterator[str]:
    runner, draft = view.args.moe_runner_backend, view.args.speculative_moe_runner_backend
    if runner != BACKEND:
        if draft == BACKEND:
            yield (
                f"--speculative-moe-runner-backend {BACKEND} needs --moe-runner-backend {BACKEND} as well: give both or neither "
                f"(--moe-runner-backend is {runner})."
            )
        else:
            yield f"--moe-runner-backend {runner} is not this plugin: leave it out or use `sglang serve`."
    elif draft not in (None, BACKEND):
        yield (
            f"--speculative-moe-runner-backend {draft} beside --moe-runner-backend {BACKEND} would serve the draft's FP4 experts "
            "with another kernel: drop --speculative-moe-runner-backend."
        )


def _unsupported(view: LaunchView, spec: KernelSpec) -> Iterator[str]:
    if view.option("enable_two_batch_overlap") and spec.multi_rank and view.exchange(spec) != DEEPEP_EXCHANGE:
        yield (
            f"--enable-two-batch-overlap cannot run with kernel {spec.name}, which runs whole batches: drop it, or set "
            "HOPPER_MOE_KERNEL=w4a16."
        )
    for field, flag, reason in _UNSUPPORTED:
        value = view.option(field)
        if value is not None:
            given = flag if value is True else f"{flag} {value}"
            yield f"{given} cannot run with --moe-runner-backend {BACKEND}, {reason}: drop one of the two."
    for field, flag, highest in _COPIES_EXPERTS:
        value = view.option(field) or 0
        if value > highest:
            yield f"{flag} {value} copies or moves expert weights behind the kernel's back: drop it."


def _determinism(view: LaunchView, spec: KernelSpec) -> Iterator[str]:
    """SGLang itself refuses the attention of DeepSeek-V4 here; it knows nothing of our kernels."""
    flag = view.asks_for_determinism
    if flag and not spec.batch_invariant:
        yield (
            f"{flag} needs results that do not depend on the batch, but {spec.name} computes batches of other sizes in another "
            "order: set HOPPER_MOE_KERNEL=mxfp4_mega, or drop the flag."
        )


def _loading(view: LaunchView) -> Iterator[str]:
    args = view.args
    options = []
    if args.load_format in _WHOLE_PARAMETERS:
        options.append(f"--load-format {args.load_format}")
    if view.option("weight_cache_mode"):
        options.append(f"--weight-cache-mode {args.weight_cache_mode}")
    for option in options:
        yield (
            f"{option} fills parameters without SGLang's weight loader, where {BACKEND} checks and packs each expert: drop it "
            "and give the stock checkpoint."
        )
    if args.quantization not in (None, "fp8"):
        yield (
            f"--quantization {args.quantization} is not how DeepSeek-V4 FP4 experts are stored: drop it, the checkpoint says fp8."
        )
