"""The differences between the SGLang versions that we support, and nothing else. Imports SGLang lazily, inside functions.

0.5.17 (the newest for torch 2.11) has no registered runner names, no resolution hooks and no platform facts; its arguments are
one mutable dataclass, and its top-k never multiplies the routed scaling factor in for other people's quant methods.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

from hopper_moe.moe_backends.arguments import BACKEND, ModelFacts, ServingPlan
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.moe_backends.seams import pinned_version

if TYPE_CHECKING:
    import torch


@functools.cache
def installed_version() -> str:
    from sglang.version import __version__

    return __version__


def table_version() -> str:
    """Which pinned table describes the installed SGLang. Raises `Refusal` for versions that none describes."""
    return pinned_version(installed_version())


def is_legacy() -> bool:
    return table_version() == "0.5.17"


# ---- arguments


def view(server_args: Any) -> Any:
    """The arguments as they stand in the middle of their resolution."""
    if is_legacy():
        return server_args
    from sglang.srt.arg_groups.overrides import resolving_view

    return resolving_view(server_args)


def declare(server_args: Any, **fields: Any) -> None:
    """Decide arguments on the user's behalf."""
    if is_legacy():
        for name, value in fields.items():
            setattr(server_args, name, value)
        return
    from sglang.srt.arg_groups.overrides import declare_resolution

    declare_resolution(server_args, BACKEND, **fields)


def attn_dp_size(args: Any) -> int:
    """Ranks of attention data parallelism; 1 without it."""
    if is_legacy():
        return args.dp_size if args.enable_dp_attention else 1
    return args.attn_dp_size  # --enable-dp-attention --dp-size is folded into it before our first hook runs


def model_facts(server_args: Any) -> ModelFacts:
    if is_legacy():
        config = server_args.get_model_config()
    else:
        from sglang.srt.arg_groups.overrides import model_config_of

        config = model_config_of(server_args)
    hf = config.hf_config
    return ModelFacts(
        architecture=hf.architectures[0],
        quantization=config.quantization,
        is_fp4_experts=bool(config.is_fp4_experts),
        has_nvfp4_experts=config.nvfp4_moe_meta is not None,
        hidden_size=hf.hidden_size,
        moe_intermediate_size=getattr(hf, "moe_intermediate_size", 0),
        num_experts=getattr(hf, "n_routed_experts", 0),
        top_k=getattr(hf, "num_experts_per_tok", 0),
        swiglu_limit=getattr(hf, "swiglu_limit", None),
    )


def capability() -> tuple[int, int] | None:
    """Compute capability of the first CUDA device, asked the way SGLang asks; None: no CUDA device."""
    if is_legacy():
        from sglang.srt.utils import get_device_capability, is_cuda

        return get_device_capability() if is_cuda() else None
    from sglang.srt.runtime_context import get_platform

    platform = get_platform()
    return tuple(platform.device_capability) if platform.is_cuda else None


def device_name() -> str | None:
    """Name of the first CUDA device; None: no CUDA device."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


# ---- names


def register_choice() -> None:
    """Let the command line accept the name. Last step of registration."""
    if is_legacy():
        from sglang.srt.server_args import MOE_RUNNER_BACKEND_CHOICES as choices
        from sglang.srt.server_args import add_moe_runner_backend_choices
    else:
        from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES as choices
        from sglang.srt.arg_groups.choices import add_moe_runner_backend_choices

    if BACKEND not in choices:
        add_moe_runner_backend_choices([BACKEND])


def register_name() -> None:
    """Let workers turn the name into a backend. 0.5.17 cannot: there the workers see "auto" and the plan says the rest."""
    if is_legacy():
        return
    from sglang.srt.layers.moe.utils import register_moe_runner_backend_name

    register_moe_runner_backend_name(BACKEND)


RUNNER_FIELD_IN_WORKER = {"0.5.17": "auto", "0.5.23": BACKEND}


def active_plan() -> ServingPlan | None:
    """In a worker: the plan, if the layer that is being built was asked to run on this backend."""
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    if get_moe_runner_backend().value != RUNNER_FIELD_IN_WORKER[table_version()]:
        return None
    plan = ServingPlan.read(os.environ)
    if plan is None and not is_legacy():
        raise Refusal(
            f"--moe-runner-backend {BACKEND} reached this worker without resolved arguments: start it with `sglang serve` or "
            "sglang.Engine."
        )
    return plan


# ---- layers


def exchange_is_megamoe() -> bool:
    from sglang.srt.layers.moe.utils import get_moe_a2a_backend

    return get_moe_a2a_backend().is_megamoe()


def ep_process_group() -> Any:
    """torch.distributed group of the expert-parallel ranks."""
    if is_legacy():
        from sglang.srt.distributed.parallel_state import get_moe_ep_group

        return get_moe_ep_group().device_group
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().moe_ep_group.device_group


def keep_global_ids(layer: torch.nn.Module) -> None:
    """0.5.17 maps masked ids (-1) to the table's last entry, so its dispatcher is told to leave ids alone; 0.5.23 keeps -1 and is
    left as it is."""
    if is_legacy():
        layer.dispatcher.skip_local_expert_mapping = True


def has_redundant_experts() -> bool:
    """Whether EPLB moves experts between layers' slots."""
    from sglang.srt.runtime_context import get_exec

    moe = get_exec().moe
    return bool(moe.enable_eplb or moe.ep_num_redundant_experts)
