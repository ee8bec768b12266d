"""Every hook into SGLang, each with its reason. Nothing else in this repository changes SGLang's behaviour.

Three kinds. *Resolution* hooks run once, in the process that resolves the command line. *Around* hooks are applied by SGLang's
own HookRegistry in every process. *Takeovers* replace two functions of `mega_moe.py`, only in a worker and only when a layer of
ours is built for the "megamoe" exchange; they are looked up as module globals at every call, and every layer that does not carry
our mark goes to the original. HookRegistry would import that module in the launcher (seconds) and would swallow a failure.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hopper_moe.moe_backends import arguments, compat, seams
from hopper_moe.moe_backends.arguments import BACKEND, ModelFacts, ServingPlan
from hopper_moe.moe_backends.env import CAPACITY_NOTE, settings
from hopper_moe.moe_backends.env_table import AUTO, MAX_CAPACITY, STOCK_CAPACITY
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.moe_backends.registry import REGISTRY, KernelSpec, choose

logger = logging.getLogger("hopper_moe")

MARK = "_hopper_moe_layer"
"""Attribute of the layers that our quant method has packed."""

FP8_METHOD = "sglang.srt.layers.quantization.fp8.Fp8Config.get_quant_method"
POST_INIT = "sglang.srt.server_args.ServerArgs.__post_init__"


@dataclass(frozen=True)
class Hook:
    """`function(original, *args)` for around hooks and takeovers, `function(server_args, previous)` for resolution hooks."""

    target: str  # a resolution step, or a dotted name
    function: Callable[..., Any]
    reason: str


@functools.cache
def chosen_kernel() -> KernelSpec:
    """The kernel of this process; the choice is logged once."""
    return choose(settings(), compat.capability()).spec


def kernel_for(args: Any, model: ModelFacts) -> KernelSpec:
    """`chosen_kernel`, or what the measured table prefers to it for this layer where the choice is left to us."""
    early = chosen_kernel()
    if settings().kernel != AUTO:
        return early
    choice = choose(
        settings(),
        compat.capability(),
        device_name=compat.device_name(),
        layer=arguments.layer_shape(args, model, settings()),
        prefill_only=args.disaggregation_mode == "prefill",
    )
    # What was declared before the model was known depends on graphs and, if ranks have their own tokens, on who exchanges them.
    exchanges = compat.attn_dp_size(args) > 1 or args.moe_a2a_backend == "megamoe"
    other_exchange = exchanges and choice.spec.multi_rank != early.multi_rank
    return early if other_exchange or choice.spec.capturable != early.capturable else choice.spec


# ---- resolving the command line


def before_resolution(server_args: Any) -> bool:
    """Refuse what needs no model and declare the exchange. Returns whether this backend was asked for."""
    args = compat.view(server_args)
    if not arguments.is_asked_for(args):
        return False
    missing = [hook.target for hook in AROUND[compat.table_version()] if not _is_applied(hook.target)]
    if missing:
        raise Refusal(
            f"SGLang could not apply the hook on {', '.join(missing)} (see the log above): reinstall sglang and "
            "sglang-hopper-moe."
        )
    compat.declare(server_args, **arguments.early(args, chosen_kernel(), settings(), compat.attn_dp_size(args)))
    return True


def after_resolution(server_args: Any) -> None:
    """Refuse what needs the model and the resolved arguments; leave the plan for the workers."""
    args = compat.view(server_args)
    model = compat.model_facts(server_args)
    plan = arguments.late(args, kernel_for(args, model), settings(), model, compat.attn_dp_size(args))
    plan.publish(os.environ)
    if plan.exchange == "megamoe":
        # SGLang compares batches with its own variable and, above it, leaves the fused path without a word.
        _set_stock_capacity(plan.capacity)
    logger.info("serving with %s", plan)


def _set_stock_capacity(tokens: int) -> None:
    """For SGLang in this process and its workers. What the user gave by that very name stays the user's: it is the same value."""
    os.environ[STOCK_CAPACITY] = str(tokens)
    if settings().sources["max_tokens_per_rank"] != STOCK_CAPACITY:
        os.environ[CAPACITY_NOTE] = str(tokens)


def _is_applied(target: str) -> bool:
    from sglang.srt.plugins.hook_registry import HookRegistry

    return target in HookRegistry._patched


def choose_exchange(server_args: Any, previous: Callable[[Any], None]) -> None:
    before_resolution(server_args)
    previous(server_args)


def check_budget(server_args: Any, previous: Callable[[Any], None]) -> None:
    if arguments.is_asked_for(compat.view(server_args)):
        after_resolution(server_args)
    previous(server_args)


def resolve_legacy(original: Callable[[Any], None], server_args: Any) -> None:
    ServingPlan.withdraw(os.environ)  # "auto" in a worker must mean ours only if this very launch asked for it
    asked = before_resolution(server_args)
    if asked:
        compat.declare(server_args, moe_runner_backend="auto", speculative_moe_runner_backend=None)
        if server_args.moe_a2a_backend == "megamoe":
            # Its default of 1024 is refused in the middle of the resolution; `after_resolution` sets what this launch needs.
            _set_stock_capacity(settings().max_tokens_per_rank or MAX_CAPACITY)
    original(server_args)
    if asked and server_args.model_path.lower() not in ("none", "dummy"):
        after_resolution(server_args)


# ---- building a layer


def expert_quant_method(original: Callable[..., Any], config: Any, layer: Any, prefix: str) -> Any:
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
    from sglang.srt.layers.quantization.utils import is_layer_skipped

    if not isinstance(layer, FusedMoE) or (plan := compat.active_plan()) is None:
        return original(config, layer, prefix)
    if is_layer_skipped(prefix, config.ignored_layers, fused_mapping=config.packed_modules_mapping):
        return original(config, layer, prefix)
    kernel = REGISTRY[plan.kernel]
    if not config.is_fp4_experts and (kernel.expert_dtype != "fp8" or config.weight_block_size != [128, 128]):
        raise Refusal(
            f"{prefix}: these experts are FP8 with blocks {config.weight_block_size}, but {kernel.name} serves "
            f"{kernel.expert_dtype}{' with blocks [128, 128]' if kernel.expert_dtype == 'fp8' else ''}: use "
            "--moe-runner-backend auto."
        )
    take_over(plan.exchange)
    from hopper_moe.quantization.sglang_method import HopperMoEMethod

    return HopperMoEMethod(Fp8MoEMethod(config), prefix, kernel, plan)


@functools.cache
def take_over(exchange: str) -> None:
    """Check the worker's seams (`Refusal` if SGLang differs) and put the takeovers of the "megamoe" exchange in place, once."""
    version = compat.table_version()
    if problems := seams.check(seams.WORKER[version]):
        raise Refusal(
            f"SGLang {compat.installed_version()} differs from {version} where hopper_moe hooks in: {'; '.join(problems)}."
        )
    if exchange != "megamoe":
        return
    for hook in TAKEOVERS[version]:
        module_name, _, name = hook.target.rpartition(".")
        module = importlib.import_module(module_name)
        original = getattr(module, name)
        setattr(module, name, functools.wraps(original)(functools.partial(hook.function, original)))


# ---- the fused path of a worker


def experts_are_ready(original: Callable[..., bool], experts: Any) -> bool:
    return True if getattr(experts, MARK, False) else original(experts)


def run_experts(original: Callable[..., Any], experts: Any, *args: Any, **kwargs: Any) -> Any:
    if not getattr(experts, MARK, False):
        return original(experts, *args, **kwargs)
    return experts.quant_method.run_mega(experts, *args, **kwargs)


def should_use_mega_moe_legacy(original: Callable[..., bool], moe: Any, hidden_states: Any) -> bool:
    if not getattr(moe.experts, MARK, False):
        return original(moe, hidden_states)
    return compat.exchange_is_megamoe()


def run_mega_routed_legacy(
    original: Callable[..., Any], moe: Any, hidden_states: Any, forward_batch: Any, input_ids_global: Any, num_tokens: int
) -> Any:
    if not getattr(moe.experts, MARK, False):
        return original(moe, hidden_states, forward_batch, input_ids_global, num_tokens)
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo

    topk_ids = topk_weights = None
    if num_tokens > 0:
        routed = moe.topk(
            hidden_states,
            moe.gate(hidden_states, forward_batch=forward_batch),
            num_token_non_padded=forward_batch.num_token_non_padded if forward_batch is not None else None,
            expert_location_dispatch_info=ExpertLocationDispatchInfo.init_new(layer_id=moe.layer_id),
            **({"input_ids": input_ids_global} if moe.is_hash else {}),
        )
        topk_ids, topk_weights = routed.topk_ids, routed.topk_weights
    fused = moe.experts.should_fuse_routed_scaling_factor_in_topk
    return moe.experts.quant_method.run_mega(
        moe.experts,
        hidden_states,
        topk_ids,
        topk_weights,
        hidden_size=moe.config.hidden_size,
        intermediate_size=moe.config.moe_intermediate_size,
        top_k=moe.config.num_experts_per_tok + moe.num_fused_shared_experts,
        num_tokens=num_tokens,
        activation_clamp=getattr(moe.config, "swiglu_limit", None),
        routed_scaling_factor=1.0 if fused else float(moe.routed_scaling_factor),
    )


# ---- the tables

_MEGA = "sglang.srt.layers.moe.mega_moe"
_QUANT_HOOK = Hook(
    FP8_METHOD,
    expert_quant_method,
    "SGLang builds no runner for a backend it does not know, so the layer's quant method must be ours: it owns packing and the "
    "call",
)

RESOLUTION: dict[str, tuple[Hook, ...]] = {
    "0.5.23": (
        Hook(
            "handle_mega_moe",
            choose_exchange,
            "first step of resolution: the exchange decides row layout, ep_size and shared experts",
        ),
        Hook(
            "validate_mega_moe_token_budget_for_model",
            check_budget,
            "last step that sees model and sizes together; SGLang's own budget check divides by the attention-DP size twice",
        ),
    ),
    "0.5.17": (),
}
AROUND: dict[str, tuple[Hook, ...]] = {
    "0.5.23": (_QUANT_HOOK,),
    "0.5.17": (
        _QUANT_HOOK,
        Hook(
            POST_INIT,
            resolve_legacy,
            "0.5.17 has no resolution hooks and no registered names: the name becomes auto plus our plan",
        ),
    ),
}
TAKEOVERS: dict[str, tuple[Hook, ...]] = {
    "0.5.23": (
        Hook(f"{_MEGA}.is_mega_moe_experts_ready", experts_are_ready, "its answer for SM90 depends on deep_gemm's FP8 kernel"),
        Hook(
            f"{_MEGA}.run_mega_routed_experts", run_experts, "the kernel call; gate, top-k, hash and shared experts stay SGLang's"
        ),
    ),
    "0.5.17": (
        Hook(f"{_MEGA}.should_use_mega_moe", should_use_mega_moe_legacy, "0.5.17 has no readiness function to answer for"),
        Hook(f"{_MEGA}._run_mega_routed", run_mega_routed_legacy, "0.5.17 calls the kernel in the same function as the top-k"),
    ),
}


def install() -> None:
    """Register the hooks of the installed version. The name comes after them, and the choice last: without it no launch can ask
    for us."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    version = compat.table_version()
    for hook in RESOLUTION[version]:
        from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

        register_resolution_hook(hook.target)(hook.function)
    for hook in AROUND[version]:
        HookRegistry.register(hook.target, hook.function, HookType.AROUND)
    compat.register_name()
    compat.register_choice()
    logger.debug("registered --moe-runner-backend %s", BACKEND)
