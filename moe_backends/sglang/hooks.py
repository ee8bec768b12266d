"""Every hook into SGLang, each with its reason. Nothing else in this repository changes SGLang's behaviour.

Three kinds. *Resolution* hooks run once, in the process that resolves the command line. *Around* hooks are applied by
SGLang's own HookRegistry in every process. *Takeovers* replace functions of SGLang's modules, only in a worker and only when
it builds a layer of ours: two of `mega_moe.py` for the "megamoe" exchange, the scheduler's calls for weights and its loops
for pipeline stages, one of the loader for `--load-format dummy`. SGLang looks these functions up at every call; models and
layers that are not ours are passed to the originals. HookRegistry is not used for them: it would import these modules in the
launcher, which takes seconds, and would swallow a failure.
"""

from __future__ import annotations

import functools
import logging
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hopper_moe.kernels.device import current_device
from hopper_moe.moe_backends.env import CAPACITY_NOTE, settings
from hopper_moe.moe_backends.env_table import DUMMY_ROUTING, STOCK_CAPACITY
from hopper_moe.moe_backends.kernel_specs import REGISTRY
from hopper_moe.moe_backends.registry import Choice, choose
from hopper_moe.moe_backends.sglang import compat, lost_node, seams, weight_calls
from hopper_moe.moe_backends.sglang.early_rules import declarations, early_refusals, uncapturable
from hopper_moe.moe_backends.sglang.group_rules import exchange_reason
from hopper_moe.moe_backends.sglang.late_rules import division_refusals, late_refusals, serving_plan
from hopper_moe.moe_backends.sglang.plan import BACKEND, DEEPEP_EXCHANGE, FUSED_EXCHANGE
from hopper_moe.moe_backends.sglang.verdict import choose_for_model
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.expert_tensors import MARK

logger = logging.getLogger("hopper_moe")

FP8_METHOD = "sglang.srt.layers.quantization.fp8.Fp8Config.get_quant_method"


@dataclass(frozen=True)
class Hook:
    """`function(original, *args)` for around hooks and takeovers, `function(server_args, previous)` for resolution hooks."""

    target: str  # a resolution step, or a dotted name
    function: Callable[..., Any]
    reason: str


@functools.cache
def chosen_kernel() -> Choice:
    """The kernel of this process, chosen without knowledge of the model; logged once."""
    return choose(settings(), compat.capability())


# ---- resolving the command line


def before_resolution(server_args: Any) -> None:
    """Apply the rules that need no model and declare the exchange, if this backend was requested."""
    view = compat.view(server_args)
    if not view.asks_for_us:
        return
    missing = [hook.target for hook in AROUND if not _is_applied(hook.target)]
    if missing:
        raise Refusal(
            f"SGLang could not apply the hook on {', '.join(missing)} (see the log above): reinstall sglang and "
            "sglang-hopper-moe."
        )
    spec = chosen_kernel().spec
    _raise_first(early_refusals(view, spec, settings()))
    if reason := uncapturable(spec, settings()):
        logger.warning("%s cannot be captured in a CUDA graph: graphs are off.", reason)
    logger.info("exchange %s", exchange_reason(view, spec))
    compat.declare(server_args, **declarations(view, spec, settings()))


def after_resolution(server_args: Any) -> None:
    """Apply the rules that need the model and the resolved arguments; publish the plan for the workers."""
    view, model = compat.view(server_args), compat.model_facts(server_args)
    _raise_first(division_refusals(view, chosen_kernel().spec, model))
    spec = choose_for_model(chosen_kernel(), view, model, settings(), compat.capability(), current_device()).spec
    _raise_first(late_refusals(view, spec, settings(), model))
    plan = serving_plan(view, spec, settings())
    plan.publish(os.environ)
    if plan.exchange == FUSED_EXCHANGE:
        # SGLang compares batches with its own variable and silently leaves the fused path above it.
        _set_stock_capacity(plan.capacity)
    logger.info("serving with %s", plan)


def _raise_first(refusals: Iterator[str]) -> None:
    for sentence in refusals:
        raise Refusal(sentence)


def _set_stock_capacity(tokens: int) -> None:
    """Set SGLang's own limit for this process and its workers, and note that the value is ours unless the user set this name."""
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
    if compat.view(server_args).asks_for_us:
        after_resolution(server_args)
    previous(server_args)


# ---- building a layer


def expert_quant_method(original: Callable[..., Any], config: Any, layer: Any, prefix: str) -> Any:
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
    from sglang.srt.layers.quantization.utils import is_layer_skipped

    if not isinstance(layer, FusedMoE):
        return original(config, layer, prefix)
    plan = compat.active_plan()
    if plan is not None or DUMMY_ROUTING in os.environ:
        take_over_dummy_weights()
    if plan is None:
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
    from hopper_moe.moe_backends.sglang.runner_backend import RunnerBackend
    from hopper_moe.quantization.sglang_method import HopperMoEMethod

    return HopperMoEMethod(Fp8MoEMethod(config), prefix, RunnerBackend(prefix, plan))


@functools.cache
def take_over(exchange: str) -> None:
    """Check the worker's seams (`Refusal` if SGLang differs) and install the takeovers, once."""
    if problems := seams.check(seams.WORKER):
        raise Refusal(seams.difference(compat.installed_version(), problems))
    if exchange == DEEPEP_EXCHANGE:
        compat.require_deepep()
    _replace(WEIGHT_CALLS)
    _replace(STAGE_LOOPS)
    if exchange == FUSED_EXCHANGE:
        _replace(TAKEOVERS)


@functools.cache
def take_over_dummy_weights() -> None:
    """Install the takeover of `--load-format dummy`, once. Also for a stock backend, if the user set the routing."""
    _replace((DUMMY_WEIGHTS,))


@functools.cache
def _replace(hooks: tuple[Hook, ...]) -> None:
    for hook in hooks:
        holder_name, _, name = hook.target.rpartition(".")
        holder = pkgutil.resolve_name(holder_name)
        setattr(holder, name, _around(getattr(holder, name), hook.function))


def _around(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:  # a function, so that a class binds it
        return function(original, *args, **kwargs)

    return call


def random_experts(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    from hopper_moe.moe_backends.sglang.dummy_load import fill

    fill(original, *args, **kwargs)


# ---- the fused path of a worker


def experts_are_ready(original: Callable[..., bool], experts: Any) -> bool:
    return True if getattr(experts, MARK, False) else original(experts)


def run_experts(original: Callable[..., Any], experts: Any, *args: Any, **kwargs: Any) -> Any:
    if not getattr(experts, MARK, False):
        return original(experts, *args, **kwargs)
    return experts.quant_method.run_mega(experts, *args, **kwargs)


# ---- the tables

_MEGA = "sglang.srt.layers.moe.mega_moe"

RESOLUTION = (
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
)
AROUND = (
    Hook(
        FP8_METHOD,
        expert_quant_method,
        "SGLang builds no runner for a backend it does not know, so the layer's quant method must be ours: it owns packing "
        "and the call",
    ),
)
TAKEOVERS = (
    Hook(f"{_MEGA}.is_mega_moe_experts_ready", experts_are_ready, "its answer for SM90 depends on deep_gemm's FP8 kernel"),
    Hook(f"{_MEGA}.run_mega_routed_experts", run_experts, "the kernel call; gate, top-k, hash and shared experts stay SGLang's"),
)
WEIGHT_CALLS = (
    *(
        Hook(f"{weight_calls.MANAGER}.{name}", weight_calls.answer, "a Refusal would leave the scheduler and end the server")
        for name in weight_calls.CALLS
    ),
    Hook(f"{weight_calls.MANAGER}.{weight_calls.RESUME}", weight_calls.resume, "weights without a backup are garbage after it"),
)
STAGE_LOOPS = tuple(
    Hook(f"{lost_node.MIXIN}.{name}", lost_node.watch, "a node that is gone is a traceback of gloo's otherwise")
    for name in lost_node.LOOPS
)
DUMMY_WEIGHTS = Hook(
    "sglang.srt.model_loader.loader.initialize_dummy_weights",
    random_experts,
    "SGLang leaves packed FP4 weights unset and routes all tokens to the same experts",
)


def install() -> None:
    """Register the hooks, then the name, and the choice last: without it no launch can select this backend."""
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in RESOLUTION:
        register_resolution_hook(hook.target)(hook.function)
    for hook in AROUND:
        HookRegistry.register(hook.target, hook.function, HookType.AROUND)
    compat.register_name()
    compat.register_choice()
    logger.debug("registered --moe-runner-backend %s", BACKEND)
