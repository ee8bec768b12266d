"""Pinned APIs of SGLang that this plugin calls or patches: dotted name -> parameter names.

`check` resolves each name in the installed SGLang and compares. If one differs the plugin refuses to register (launcher seams) or
to build a layer (worker seams), because partly working hooks could serve wrong answers.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from packaging.version import Version

from hopper_moe.quantization.errors import Refusal

Table = Mapping[str, str]

_RUN_MEGA = (
    "experts hidden_states topk_ids topk_weights hidden_size intermediate_size top_k num_tokens activation_clamp "
    "routed_scaling_factor "
    "activation num_shared_experts shared_l1_weights shared_l2_weights routing_in_buffer"
)

_STAGES = "sglang.srt.managers.scheduler_pp_mixin.SchedulerPPMixin"
_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"

VERSION = "0.5.23"
"""The SGLang version of the tables. A newer one is supported as long as no seam differs."""

# Checked when the plugin registers, in every SGLang process.
LAUNCHER: Table = {
    "sglang.srt.plugins.hook_registry.HookRegistry.register": "target hook hook_type source",
    "sglang.srt.arg_groups.choices.add_moe_runner_backend_choices": "iterable",
    "sglang.srt.arg_groups.resolution_hooks.register_resolution_hook": "name",
    "sglang.srt.arg_groups.overrides.declare_resolution": "server_args source fields",
    "sglang.srt.arg_groups.overrides.resolving_view": "server_args",
    "sglang.srt.arg_groups.overrides.model_config_of": "server_args",
    "sglang.srt.arg_groups.mega_moe_hook.handle_mega_moe": "server_args",
    "sglang.srt.arg_groups.mega_moe_hook.validate_mega_moe_token_budget_for_model": "server_args",
    "sglang.srt.layers.moe.utils.register_moe_runner_backend_name": "name",
    "sglang.srt.layers.moe.utils.get_moe_runner_backend": "",
    "sglang.srt.layers.moe.utils.get_moe_a2a_backend": "",
    "sglang.srt.layers.quantization.utils.is_layer_skipped": "prefix ignored_layers fused_mapping",
    "sglang.srt.layers.quantization.fp8.Fp8Config.get_quant_method": "self layer prefix",
    "sglang.srt.layers.quantization.fp8.Fp8MoEMethod.create_weights": (
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype with_bias extra_weight_attrs"
    ),
    "sglang.srt.layers.quantization.base_config.FusedMoEMethodBase.create_weights": (
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype extra_weight_attrs"
    ),
    "sglang.srt.layers.quantization.base_config.FusedMoEMethodBase.create_moe_runner": "self layer moe_runner_config",
    "sglang.srt.layers.quantization.base_config.FusedMoEMethodBase.get_moe_runner_backend": "self layer",
    "sglang.srt.layers.quantization.base_config.FusedMoEMethodBase.apply": "self layer dispatch_output",
}

# Checked in a worker, when the first layer is built: importing these modules takes seconds, too long for a launcher.
WORKER: Table = {
    "sglang.srt.model_loader.loader.initialize_dummy_weights": "model low high seed",
    "sglang.srt.layers.moe.fused_moe_triton.FusedMoE.weight_loader": "self param loaded_weight weight_name shard_id expert_id",
    "sglang.srt.layers.moe.fused_moe_triton.FusedMoE._weight_loader_impl": "self param loaded_weight weight_name shard_id "
    "expert_id",
    "sglang.srt.layers.moe.token_dispatcher.standard.StandardDispatcher.dispatch": "self hidden_states topk_output",
    "sglang.srt.layers.moe.token_dispatcher.StandardCombineInput": "hidden_states",
    "sglang.srt.layers.moe.token_dispatcher.deepep.DeepEPNormalDispatchOutput": (
        "hidden_states hidden_states_scale topk_ids topk_weights num_recv_tokens_per_expert"
    ),
    "sglang.srt.layers.moe.token_dispatcher.deepep.DeepEPNormalCombineInput": "hidden_states topk_ids topk_weights",
    "sglang.srt.layers.moe.token_dispatcher.deepep.DeepEPLLDispatchOutput": (
        "hidden_states hidden_states_scale topk_ids topk_weights masked_m expected_m"
    ),
    "sglang.srt.layers.moe.token_dispatcher.deepep.DeepEPLLCombineInput": "hidden_states topk_ids topk_weights",
    "sglang.srt.layers.moe.token_dispatcher.base.DispatchOutputFormat.is_deepep_ll": "self",
    "sglang.srt.layers.moe.ep_moe.layer.DeepEPMoE.forward_impl": "self hidden_states topk_output",
    "sglang.srt.layers.moe.utils.get_deepep_output_dtype": "self",
    "sglang.srt.layers.moe.mega_moe.is_mega_moe_experts_ready": "experts",
    "sglang.srt.layers.moe.mega_moe.run_mega_routed_experts": _RUN_MEGA,
    "sglang.srt.layers.moe.mega_moe.should_use_mega_moe": "moe hidden_states",
    "sglang.srt.layers.moe.mega_moe.forward_mega_moe": "moe hidden_states forward_batch input_ids_global",
    "sglang.srt.layers.quantization.base_config.QuantizeMethodBase.restore_weights_before_loading": "self layer",
    f"{_WEIGHTS}.update_weights_from_disk": "self recv_req",
    f"{_WEIGHTS}.update_weights_from_tensor": "self recv_req",
    f"{_WEIGHTS}.update_weights_from_distributed": "self recv_req",
    f"{_WEIGHTS}.update_weights_from_ipc": "self recv_req",
    f"{_WEIGHTS}.end_weight_update": "self recv_req",
    f"{_WEIGHTS}.resume_memory_occupation": "self recv_req",
    f"{_WEIGHTS}._select_runners": "self selector",
    f"{_STAGES}.event_loop_pp": "self",
    f"{_STAGES}.event_loop_pp_disagg_prefill": "self",
    f"{_STAGES}.event_loop_pp_disagg_decode": "self",
}


def require_supported(installed: str) -> None:
    """Raises `Refusal` for an SGLang older than the tables."""
    if Version(installed) < Version(VERSION):
        raise Refusal(f"SGLang {installed} is not supported by hopper_moe: install sglang>={VERSION}.")


def check(table: Table) -> list[str]:
    """One line for each seam that is missing or has other parameters; empty: all as pinned. Imports the seams' modules."""
    problems = []
    for dotted, wanted in table.items():
        try:
            seam: Any = resolve(dotted)  # whatever stands there: `signature` refuses what is no callable
            found = " ".join(inspect.signature(seam).parameters)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            problems.append(f"{dotted} is missing ({type(error).__name__}: {error})")
            continue
        if found != wanted:
            problems.append(f"{dotted} takes ({found}), not ({wanted})")
    return problems


def difference(installed: str, problems: list[str]) -> str:
    """The sentence for an SGLang that is not as pinned."""
    return (
        f"SGLang {installed} differs from {VERSION} where hopper_moe hooks in, so it cannot run there: {'; '.join(problems)}. "
        f"Install sglang=={VERSION}."
    )


def resolve(dotted: str) -> object:
    """The object behind a dotted name, importing what is needed."""
    module_or_class, _, attribute = dotted.rpartition(".")
    return getattr(pkgutil.resolve_name(module_or_class), attribute)
