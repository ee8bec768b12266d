"""SGLang's API as this plugin uses it. Imports SGLang lazily, inside functions."""

from __future__ import annotations

import functools
import os
from typing import Any

from hopper_moe.moe_backends.sglang.launch_view import LaunchView
from hopper_moe.moe_backends.sglang.plan import BACKEND, ServingPlan
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.model_facts import ModelFacts


@functools.cache
def installed_version() -> str:
    from sglang.version import __version__

    return __version__


# ---- arguments


def view(server_args: Any) -> LaunchView:
    """The arguments in the middle of their resolution."""
    from sglang.srt.arg_groups.overrides import resolving_view

    return LaunchView(resolving_view(server_args), is_resolved=True)


def declare(server_args: Any, **fields: Any) -> None:
    """Set arguments that the user left to the backend."""
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, BACKEND, **fields)


def model_facts(server_args: Any) -> ModelFacts:
    """The model as SGLang has read it. Like us, it takes the expert type from the header of the first expert tensor."""
    from sglang.srt.arg_groups.overrides import model_config_of

    config = model_config_of(server_args)
    hf = config.hf_config
    stored = "nvfp4" if config.nvfp4_moe_meta is not None else "fp4" if config.is_fp4_experts else "fp8"
    blocks = (config.hf_quant_config or {}).get("weight_block_size")
    return ModelFacts(
        architecture=hf.architectures[0],
        quantization=config.quantization,
        expert_dtype=stored,
        weight_block_size=tuple(blocks) if blocks else None,
        hidden_size=hf.hidden_size,
        intermediate_size=getattr(hf, "moe_intermediate_size", 0),
        num_experts=getattr(hf, "n_routed_experts", 0),
        top_k=getattr(hf, "num_experts_per_tok", 0),
        swiglu_limit=getattr(hf, "swiglu_limit", None),
        num_moe_layers=hf.num_hidden_layers,
        model_type=getattr(hf, "model_type", None),
    )


def capability() -> tuple[int, int] | None:
    """Compute capability of the first CUDA device, as SGLang determines it; None: no CUDA device."""
    from sglang.srt.runtime_context import get_platform

    platform = get_platform()
    return tuple(platform.device_capability) if platform.is_cuda else None


# ---- names


def register_choice() -> None:
    """Add the backend's name to the choices of the command line. Last step of registration."""
    from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES, add_moe_runner_backend_choices

    if BACKEND not in MOE_RUNNER_BACKEND_CHOICES:
        add_moe_runner_backend_choices([BACKEND])


def register_name() -> None:
    """Register the backend's name in the enumeration that workers use."""
    from sglang.srt.layers.moe.utils import register_moe_runner_backend_name

    register_moe_runner_backend_name(BACKEND)


def active_plan() -> ServingPlan | None:
    """In a worker: the plan if the layer that is being built runs on this backend, else None."""
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    if get_moe_runner_backend().value != BACKEND:
        return None
    plan = ServingPlan.read(os.environ)
    if plan is None:
        raise Refusal(
            f"--moe-runner-backend {BACKEND} reached this worker without resolved arguments: start it with `sglang serve` or "
            "sglang.Engine."
        )
    return plan


# ---- layers


def exchange_is_megamoe() -> bool:
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    return get_moe_a2a_backend().is_megamoe()


def require_deepep() -> None:
    """Raises `Refusal` in a worker where SGLang could not import deep_ep, or would not call a quant method with DeepEP's rows."""
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe.token_dispatcher import deepep

    if not deepep.use_deepep:
        problem = str(deepep._deepep_import_error).strip().splitlines()
        raise Refusal(
            f"--moe-a2a-backend deepep cannot start, because deep_ep does not load here ({problem[0] if problem else 'no reason'}"
            "): mend its installation, or use --pp-size instead."
        )
    if not deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM:
        raise Refusal("--moe-a2a-backend deepep cannot start, because deep_gemm does not load here: reinstall sgl-deep-gemm.")


def ep_process_group() -> Any:
    """torch.distributed group of the expert-parallel ranks."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().moe_ep_group.device_group


def replica_rank() -> int:
    """Number of this worker's replica (--dp-size), or of its attention data-parallel group; 0 without either."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().dp_rank or 0


def has_redundant_experts() -> bool:
    """Whether EPLB moves experts between layers' slots."""
    from sglang.srt.runtime_context import get_exec

    moe = get_exec().moe
    return bool(moe.enable_eplb or moe.ep_num_redundant_experts)
