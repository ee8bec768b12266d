"""Which kernel runs, and why. Importing this loads no kernel, no torch, no SGLang.

`choose` answers "which kernel, and why" from the settings and the machine; `layer_refusals` answers "can it serve this
layer"; `create_runner` imports the one module that is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hopper_moe.kernels.device import Device
from hopper_moe.moe_backends.auto_table import DECODE, PREFILL, fastest
from hopper_moe.moe_backends.env import Settings
from hopper_moe.moe_backends.env_table import AUTO, EXPAND_FP4
from hopper_moe.moe_backends.kernel_specs import KERNELS, REGISTRY, KernelSpec
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.layout import check_num_experts

if TYPE_CHECKING:
    from hopper_moe.kernels.shard import ExpertShard
    from hopper_moe.moe_backends.runner import ExpertRunner

logger = logging.getLogger("hopper_moe")


@dataclass(frozen=True)
class Choice:
    """The kernel that will run and one sentence saying why."""

    spec: KernelSpec
    reason: str


def choose(
    settings: Settings,
    capability: tuple[int, int] | None,
    *,
    device: Device | None = None,
    shard: ExpertShard | None = None,
    expert_dtype: str = "fp4",
    prefill_only: bool = False,
) -> Choice:
    """The kernel to run on a device of this compute capability (None: no CUDA device), and the reason, which is logged.

    With `shard` (whose experts reach the kernel as `expert_dtype`, "fp4" or "fp8") and `device` `auto`
    decides from the measured table among the kernels that can serve the layer; without, it takes the first one that runs here.

    Raises `Refusal` when the kernel asked for is not built or does not run here, or when no allowed kernel does.
    """
    if settings.kernel != AUTO:
        spec = REGISTRY[settings.kernel]
        problem = _problem(spec, settings, capability)
        if problem:
            raise Refusal(f"HOPPER_MOE_KERNEL={spec.name}: {problem}; {_advice(settings, capability)}")
        choice = Choice(spec, f"asked for by HOPPER_MOE_KERNEL={spec.name}")
    else:
        layer = None if shard is None else _Layer(shard, expert_dtype, PREFILL if prefill_only else DECODE)
        choice = _choose_automatically(settings, capability, device, layer)
    logger.info("kernel %s: %s", choice.spec.name, choice.reason)
    return choice


@dataclass(frozen=True)
class _Layer:
    """Input of `auto`: a rank's share of the layer, its experts' type, and the batch sizes that are compared."""

    shard: ExpertShard
    expert_dtype: str
    tokens: tuple[int, int]


def _choose_automatically(
    settings: Settings, capability: tuple[int, int] | None, device: Device | None, layer: _Layer | None
) -> Choice:
    problems = {name: _problem(REGISTRY[name], settings, capability) for name in settings.allowed_kernels}
    able = [name for name, problem in problems.items() if problem is None]
    if not able:
        raise Refusal(
            f"HOPPER_MOE_KERNEL=auto ({settings.sources['kernel']}): none is left that runs here, "
            f"{_passed_over(problems)}; {_advice(settings, capability)}"
        )
    if layer is not None:
        refused = {name: layer_refusals(REGISTRY[name], layer.shard, layer.expert_dtype) for name in able}
        able = [name for name in able if not refused[name]]
        if not able:
            problems |= {name: sentences[0].removesuffix(".") for name, sentences in refused.items()}
            raise Refusal(f"HOPPER_MOE_KERNEL=auto: no kernel here serves this layer, {_passed_over(problems)}.")
    timed = [name for name in able if REGISTRY[name].capturable]  # the reference is never in a race
    if layer is not None and device is not None and len(timed) > 1:
        verdict = fastest(timed, device, layer.shard, layer.tokens)
        if verdict is not None:
            return Choice(REGISTRY[verdict[0]], verdict[1])
        return Choice(REGISTRY[timed[0]], f"the first of {', '.join(timed)}, which no measurement compares on {device}")
    better = {name: why for name, why in problems.items() if why and KERNELS.index(name) < KERNELS.index(able[0])}
    passed_over = f"; passed over: {_passed_over(better)}" if better else ""
    return Choice(REGISTRY[able[0]], f"the best that runs on {_device(capability)}{passed_over}")


def _passed_over(problems: Mapping[str, str | None]) -> str:
    """Kernels that cannot run, grouped by reason."""
    kernels: dict[str, list[str]] = {}
    for name, problem in problems.items():
        kernels.setdefault(str(problem).replace(f"which {name} needs", "which it needs"), []).append(name)
    return ", ".join(f"{', '.join(names)} ({reason})" for reason, names in kernels.items())


def layer_refusals(spec: KernelSpec, layer: ExpertShard, expert_dtype: str) -> list[str]:
    """Every reason why `spec` cannot serve such a share of a layer, one sentence each; empty: it can.

    `expert_dtype`: "fp4", "fp8" or another type; "unknown" is left to SGLang's loader, which asks again.
    """
    found = []
    for field in ("hidden_size", "intermediate_size"):
        value = getattr(layer, field)
        if value < 1 or value % spec.size_multiple:
            found.append(
                f"{field} {value} is not a positive multiple of {spec.size_multiple}, which {spec.name} needs: "
                "no kernel here serves it."
            )
    if layer.num_experts < 1:
        found.append(f"num_experts {layer.num_experts} is not positive: the checkpoint has no routed experts to serve.")
    elif spec.library is not None:  # the fused kernel
        try:
            check_num_experts(layer.num_experts, layer.num_local_experts)
        except Refusal as problem:
            found.append(str(problem))
    most = min(spec.max_top_k, max(layer.num_experts, 1))
    if not 1 <= layer.top_k <= most:
        found.append(
            f"top_k {layer.top_k} is outside 1..{most}, the most that {spec.name} routes here: choose another checkpoint."
        )
    if expert_dtype not in (spec.expert_dtype, "unknown"):
        expand = f" (or set {EXPAND_FP4}=1 to expand them at load)" if (expert_dtype, spec.expert_dtype) == ("fp4", "fp8") else ""
        found.append(
            f"the checkpoint's experts are {expert_dtype}, but {spec.name} serves {spec.expert_dtype}: "
            f"choose another kernel or checkpoint{expand}."
        )
    return found


def create_runner(name: str) -> ExpertRunner:
    """A new runner of kernel `name`, for one layer. Imports the kernel's module; raises `Refusal` when it is not built."""
    spec = REGISTRY.get(name)
    if spec is None:
        raise Refusal(f"{name!r} is not a kernel: use one of {', '.join(REGISTRY)}.")
    module, attribute = spec.factory.split(":")
    return getattr(importlib.import_module(module), attribute)()


def _problem(spec: KernelSpec, settings: Settings, capability: tuple[int, int] | None) -> str | None:
    if spec.capability is not None and capability != spec.capability:
        return f"needs compute capability {spec.capability[0]}.{spec.capability[1]}, here is {_device(capability)}"
    if spec.package is not None and importlib.util.find_spec(spec.package) is None:
        return f"needs {spec.package}, which is not installed (pip install 'sglang-hopper-moe[sglang]')"
    missing = [name for name in ("fp8_combine", "fp4_dispatch") if getattr(settings, name) and name not in spec.options]
    if missing:
        return " and ".join(f"has no {name} in this release (set by {settings.origin(name)}=1)" for name in missing)
    return None


def _advice(settings: Settings, capability: tuple[int, int] | None) -> str:
    set_options = [name for name in ("fp8_combine", "fp4_dispatch") if getattr(settings, name)]
    if set_options:
        return f"unset {' and '.join(map(settings.origin, set_options))}."
    runs = [name for name in REGISTRY if REGISTRY[name].capability in (None, capability)]
    return f"here runs: {', '.join(runs)}."


def _device(capability: tuple[int, int] | None) -> str:
    return "a machine without a CUDA device" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
