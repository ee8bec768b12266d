"""Every place where this plugin touches SGLang, pinned: dotted name -> parameter names, per SGLang version.

`check` resolves each name in the installed SGLang and compares. A difference means that SGLang changed under us: the plugin then
refuses to register (launcher seams) or to build a layer (worker seams), because half-working hooks would serve wrong answers.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping

from packaging.version import Version

from hopper_moe.moe_backends.errors import Refusal

Table = Mapping[str, str]

_RUN_MEGA = (
    "experts hidden_states topk_ids topk_weights hidden_size intermediate_size top_k num_tokens activation_clamp "
    "routed_scaling_factor "
    "activation num_shared_experts shared_l1_weights shared_l2_weights routing_in_buffer"
)

# Looked at when the plugin registers, in every SGLang process.
LAUNCHER: Mapping[str, Table] = {
    "0.5.23": {
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
    },
    "0.5.17": {
        "sglang.srt.plugins.hook_registry.HookRegistry.register": "target hook hook_type source",
        "sglang.srt.server_args.add_moe_runner_backend_choices": "choices",
        "sglang.srt.server_args.ServerArgs.__post_init__": "self",
        "sglang.srt.server_args.ServerArgs.get_model_config": "self",
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
        "sglang.srt.layers.quantization.base_config.FusedMoEMethodBase.apply": "self layer dispatch_output",
    },
}

# Looked at in a worker, when the first layer is built: importing these takes seconds that a launcher should not spend.
WORKER: Mapping[str, Table] = {
    "0.5.23": {
        "sglang.srt.layers.moe.fused_moe_triton.FusedMoE._weight_loader_impl": "self param loaded_weight weight_name shard_id "
        "expert_id",
        "sglang.srt.layers.moe.token_dispatcher.standard.StandardDispatcher.dispatch": "self hidden_states topk_output",
        "sglang.srt.layers.moe.token_dispatcher.StandardCombineInput": "hidden_states",
        "sglang.srt.layers.moe.mega_moe.is_mega_moe_experts_ready": "experts",
        "sglang.srt.layers.moe.mega_moe.run_mega_routed_experts": _RUN_MEGA,
        "sglang.srt.layers.moe.mega_moe.should_use_mega_moe": "moe hidden_states",
        "sglang.srt.layers.moe.mega_moe.forward_mega_moe": "moe hidden_states forward_batch input_ids_global",
    },
    "0.5.17": {
        "sglang.srt.layers.moe.fused_moe_triton.FusedMoE._weight_loader_impl": "self param loaded_weight weight_name shard_id "
        "expert_id",
        "sglang.srt.layers.moe.token_dispatcher.standard.StandardDispatcher.dispatch": "self hidden_states topk_output",
        "sglang.srt.layers.moe.token_dispatcher.StandardCombineInput": "hidden_states",
        "sglang.srt.layers.moe.mega_moe.should_use_mega_moe": "moe hidden_states",
        "sglang.srt.layers.moe.mega_moe._run_mega_routed": "moe hidden_states forward_batch input_ids_global num_tokens",
        "sglang.srt.layers.moe.mega_moe.forward_mega_moe": "moe hidden_states forward_batch input_ids_global",
        "sglang.srt.eplb.expert_location_dispatch.ExpertLocationDispatchInfo.init_new": "layer_id",
        "sglang.srt.distributed.parallel_state.get_moe_ep_group": "",
    },
}

VERSIONS = tuple(LAUNCHER)


def pinned_version(installed: str) -> str:
    """The table for an installed SGLang: its own, the newest table for anything newer. Raises `Refusal` for anything else."""
    if installed in LAUNCHER:
        return installed
    newest = max(VERSIONS, key=Version)
    if Version(installed) > Version(newest):
        return newest
    raise Refusal(f"SGLang {installed} is not supported by hopper_moe: install sglang=={' or '.join(VERSIONS)}.")


def check(table: Table) -> list[str]:
    """One line for each seam that is missing or has other parameters; empty: all as pinned. Imports the seams' modules."""
    problems = []
    for dotted, wanted in table.items():
        try:
            found = " ".join(inspect.signature(resolve(dotted)).parameters)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            problems.append(f"{dotted} is missing ({type(error).__name__}: {error})")
            continue
        if found != wanted:
            problems.append(f"{dotted} takes ({found}), not ({wanted})")
    return problems


def resolve(dotted: str) -> object:
    """The object behind a dotted name, importing what is needed."""
    module_or_class, _, attribute = dotted.rpartition(".")
    return getattr(pkgutil.resolve_name(module_or_class), attribute)
