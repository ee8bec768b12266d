"""Kernel name -> what it needs and how to make its runner. Importing this loads no kernel, no torch, no SGLang.

`choose` answers "which kernel, and why" from the settings and the machine; `layer_refusals` answers "can it serve this
layer"; `create_runner` imports the one module that is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hopper_moe.kernels.tile_table import sku_of
from hopper_moe.moe_backends.auto_table import DECODE, PREFILL, MeasuredLayer, fastest
from hopper_moe.moe_backends.env import Settings
from hopper_moe.moe_backends.env_table import AUTO, EXPAND_FP4, KERNELS
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.quantization.layout import DIM_MULTIPLE, MAX_TOP_K

if TYPE_CHECKING:
    from hopper_moe.moe_backends.base import ExpertRunner

logger = logging.getLogger("hopper_moe")

HOPPER = (9, 0)
EXCHANGE_OPTIONS = frozenset({"fp8_combine", "fp4_dispatch"})


@dataclass(frozen=True)
class KernelSpec:
    """One kernel and all that it requires. `factory` is "module:callable", called without arguments; None: not built."""

    name: str
    summary: str
    factory: str | None
    expert_dtype: str  # "fp4" or "fp8": the checkpoint's expert weights
    capability: tuple[int, int] | None = None  # exact compute capability; None: any device, CPU included
    size_multiple: int = DIM_MULTIPLE  # of hidden_size and intermediate_size
    max_top_k: int = MAX_TOP_K
    max_experts: int | None = None  # of the whole layer, redundant ones included
    capturable: bool = True  # can run inside a CUDA graph
    multi_rank: bool = False  # its runner has `run_across_ranks`: it moves tokens between ranks itself; else SGLang does
    package: str | None = None  # a package that is not among our own requirements
    library: str | None = None  # of kernels/jit.py: the fused kernel's, which takes a workspace (an exchange buffer across ranks)
    options: frozenset[str] = frozenset()  # optional settings it implements: fp8_combine, fp4_dispatch


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one MoE layer as a rank sees it; `expert_dtype` is "fp4" or "fp8"."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    expert_dtype: str
    ep_size: int = 1


@dataclass(frozen=True)
class Choice:
    """The kernel that will run and one sentence saying why."""

    spec: KernelSpec
    reason: str


_SPECS = (
    KernelSpec(
        "mxfp4_mega",
        "FP4 experts, one fused kernel: dispatch, both GEMMs, SwiGLU and combine, across the ranks of a host",
        "hopper_moe.moe_backends.runners.mxfp4_mega:create",
        "fp4",
        HOPPER,
        max_experts=400,
        multi_rank=True,
        library="mega_moe",
        options=EXCHANGE_OPTIONS,
    ),
    KernelSpec(
        "fp8_mega",
        "FP8 experts, the same fused kernel",
        "hopper_moe.moe_backends.runners.fp8_mega:create",
        "fp8",
        HOPPER,
        max_experts=400,
        multi_rank=True,
        library="fp8_mega",
        options=EXCHANGE_OPTIONS,
    ),
    KernelSpec(
        "w4a16",
        "FP4 experts, BF16 activations: FlashInfer's mixed-input kernel",
        "hopper_moe.moe_backends.runners.w4a16:create",
        "fp4",
        HOPPER,
        package="flashinfer",
    ),
    KernelSpec(
        "reference",
        "FP4 experts in plain torch, FP64 sums: any device, slow, what the kernels are checked against",
        "hopper_moe.moe_backends.runners.reference:create",
        "fp4",
        multi_rank=True,
        capturable=False,
        options=EXCHANGE_OPTIONS,
    ),
)
REGISTRY: dict[str, KernelSpec] = {spec.name: spec for spec in _SPECS}
assert tuple(REGISTRY) == KERNELS, "every kernel name of the environment table has exactly one spec, in the same order"


def choose(
    settings: Settings,
    capability: tuple[int, int] | None,
    *,
    device_name: str | None = None,
    layer: LayerShape | None = None,
    prefill_only: bool = False,
) -> Choice:
    """The kernel to run on a device of this compute capability (None: no CUDA device), and the reason, which is logged.

    With `layer` and `device_name` (as torch says it) `auto` decides from the measured table among the kernels that can serve the
    layer; without, it takes the first one that runs here.

    Raises `Refusal` when the kernel asked for is not built or does not run here, or when no allowed kernel does.
    """
    if settings.kernel != AUTO:
        spec = REGISTRY[settings.kernel]
        problem = _problem(spec, settings, capability)
        if problem:
            raise Refusal(f"HOPPER_MOE_KERNEL={spec.name}: {problem}; {_advice(settings, capability)}")
        choice = Choice(spec, f"asked for by HOPPER_MOE_KERNEL={spec.name}")
    else:
        choice = _choose_automatically(settings, capability, device_name, layer, PREFILL if prefill_only else DECODE)
    logger.info("kernel %s: %s", choice.spec.name, choice.reason)
    return choice


def _choose_automatically(
    settings: Settings,
    capability: tuple[int, int] | None,
    device_name: str | None,
    layer: LayerShape | None,
    tokens: tuple[int, int],
) -> Choice:
    problems = {name: _problem(REGISTRY[name], settings, capability) for name in settings.allowed_kernels}
    able = [name for name, problem in problems.items() if problem is None]
    if not able:
        raise Refusal(
            f"HOPPER_MOE_KERNEL=auto ({settings.sources['kernel']}): none is left that runs here, "
            f"{_passed_over(problems)}; {_advice(settings, capability)}"
        )
    if layer is not None:
        refused = {name: layer_refusals(REGISTRY[name], layer) for name in able}
        able = [name for name in able if not refused[name]]
        if not able:
            problems |= {name: sentences[0].removesuffix(".") for name, sentences in refused.items()}
            raise Refusal(f"HOPPER_MOE_KERNEL=auto: no kernel here serves this layer, {_passed_over(problems)}.")
    timed = [name for name in able if REGISTRY[name].capturable]  # the reference is never in a race
    if layer is not None and device_name is not None and len(timed) > 1:
        measured = MeasuredLayer(
            sku_of(device_name),
            layer.hidden_size,
            layer.intermediate_size,
            max(layer.num_experts // layer.ep_size, 1),
            layer.top_k,
            layer.ep_size,
        )
        verdict = fastest(timed, measured, tokens)
        if verdict is not None:
            return Choice(REGISTRY[verdict[0]], verdict[1])
        return Choice(REGISTRY[timed[0]], f"the first of {', '.join(timed)}, which no measurement compares on {device_name}")
    better = {name: why for name, why in problems.items() if why and KERNELS.index(name) < KERNELS.index(able[0])}
    passed_over = f"; passed over: {_passed_over(better)}" if better else ""
    return Choice(REGISTRY[able[0]], f"the best that runs on {_device(capability)}{passed_over}")


def _passed_over(problems: dict[str, str | None]) -> str:
    """Kernels and why not, those with the same reason together."""
    kernels: dict[str, list[str]] = {}
    for name, problem in problems.items():
        kernels.setdefault(str(problem).replace(f"which {name} needs", "which it needs"), []).append(name)
    return ", ".join(f"{', '.join(names)} ({reason})" for reason, names in kernels.items())


def layer_refusals(spec: KernelSpec, layer: LayerShape) -> list[str]:
    """Every reason why `spec` cannot serve a layer of this shape, one sentence each; empty: it can."""
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
    elif layer.ep_size < 1 or layer.num_experts % layer.ep_size:
        found.append(
            f"{layer.num_experts} experts do not divide into {layer.ep_size} expert-parallel ranks: "
            "choose a size that divides them."
        )
    if spec.max_experts is not None and layer.num_experts > spec.max_experts:
        found.append(
            f"{layer.num_experts} experts are above the {spec.max_experts} that {spec.name} routes: use another MoE backend."
        )
    most = min(spec.max_top_k, max(layer.num_experts, 1))
    if not 1 <= layer.top_k <= most:
        found.append(
            f"top_k {layer.top_k} is outside 1..{most}, the most that {spec.name} routes here: choose another checkpoint."
        )
    if layer.expert_dtype != spec.expert_dtype:
        expand = (
            f" (or set {EXPAND_FP4}=1 to expand them at load)"
            if (layer.expert_dtype, spec.expert_dtype) == ("fp4", "fp8")
            else ""
        )
        found.append(
            f"the checkpoint's experts are {layer.expert_dtype}, but {spec.name} serves {spec.expert_dtype}: "
            f"choose another kernel or checkpoint{expand}."
        )
    return found


def create_runner(name: str) -> ExpertRunner:
    """A new runner of kernel `name`, for one layer. Imports the kernel's module; raises `Refusal` when it is not built."""
    spec = REGISTRY.get(name)
    if spec is None:
        raise Refusal(f"{name!r} is not a kernel: use one of {', '.join(REGISTRY)}.")
    if spec.factory is None:
        raise Refusal(f"kernel {name} is not built in this release: use one of {', '.join(_built())}.")
    module, attribute = spec.factory.split(":")
    return getattr(importlib.import_module(module), attribute)()


def _problem(spec: KernelSpec, settings: Settings, capability: tuple[int, int] | None) -> str | None:
    if spec.factory is None:
        return "not built in this release"
    if spec.capability is not None and capability != spec.capability:
        return f"needs compute capability {spec.capability[0]}.{spec.capability[1]}, here is {_device(capability)}"
    if spec.package is not None and importlib.util.find_spec(spec.package) is None:
        return f"needs {spec.package}, which is not installed (pip install 'sglang-hopper-moe[sglang]')"
    missing = [name for name in ("fp8_combine", "fp4_dispatch") if getattr(settings, name) and name not in spec.options]
    if missing:
        return " and ".join(f"has no {name} in this release (set by {_origin(settings, name)})" for name in missing)
    return None


def _origin(settings: Settings, field: str) -> str:
    source = settings.sources[field]
    return f"HOPPER_MOE_{field.upper()}=1" if source == "environment" else f"{source}=1"


def _advice(settings: Settings, capability: tuple[int, int] | None) -> str:
    set_options = [name for name in ("fp8_combine", "fp4_dispatch") if getattr(settings, name)]
    if set_options:
        return f"unset {' and '.join(_origin(settings, name).removesuffix('=1') for name in set_options)}."
    runs = [name for name in _built() if REGISTRY[name].capability in (None, capability)]
    return f"here runs: {', '.join(runs)}."


def _built() -> list[str]:
    return [spec.name for spec in REGISTRY.values() if spec.factory is not None]


def _device(capability: tuple[int, int] | None) -> str:
    return "a machine without a CUDA device" if capability is None else f"compute capability {capability[0]}.{capability[1]}"
