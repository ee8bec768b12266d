"""Baseline `humming`: SGLang's fused function over the Humming kernels, the layer converted by SGLang's own helper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hopper_moe.eval.layer_bench.baselines.checkpoint_experts import CheckpointExperts, require_one_rank

if TYPE_CHECKING:
    from hopper_moe.kernels.shard import ExpertShard


def checkpoint_layer(experts: CheckpointExperts, shard: ExpertShard) -> torch.nn.Module:
    """What SGLang's `Mxfp4HummingMoEMethod` converts: a layer with the checkpoint's tensors and all that the helper reads."""
    layer: Any = torch.nn.Module()
    layer.layer_name, layer.with_bias, layer.params_dtype = "experts", False, torch.bfloat16
    layer.num_local_experts, layer.hidden_size = shard.num_local_experts, shard.hidden_size
    layer.intermediate_size_per_partition = shard.intermediate_size
    for name in ("w13", "w2"):
        weight, scale = getattr(experts, name).view(torch.int8), getattr(experts, f"{name}_scale").view(torch.float8_e8m0fnu)
        layer.register_parameter(f"{name}_weight", torch.nn.Parameter(weight, requires_grad=False))
        layer.register_parameter(f"{name}_weight_scale", torch.nn.Parameter(scale, requires_grad=False))
    return layer


class HummingRunner:
    """`ExpertRunner` over SGLang's fused function for Humming. One rank: every id has to be local."""

    experts_type = CheckpointExperts

    def prepare(self, experts: CheckpointExperts, shard: ExpertShard) -> None:
        """See `ExpertRunner.prepare`."""
        from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
        from sglang.srt.layers.quantization.humming_utils import prepare_humming_moe_layer

        require_one_rank("humming", shard)
        self._layer = checkpoint_layer(experts, shard)
        prepare_humming_moe_layer(self._layer, {"quant_method": "mxfp4"})
        self._config = MoeRunnerConfig(
            num_experts=shard.num_experts,
            num_local_experts=shard.num_local_experts,
            hidden_size=shard.hidden_size,
            intermediate_size_per_partition=shard.intermediate_size,
            top_k=shard.top_k,
            params_dtype=torch.bfloat16,
            swiglu_limit=shard.swiglu_limit,
            layer=self._layer,
        )

    def run(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """See `ExpertRunner.run`; ids are all valid."""
        from sglang.srt.layers.moe.moe_runner.humming import HummingMoeQuantInfo, fused_experts_none_to_humming
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        if not hidden_states.shape[0]:
            return torch.empty_like(hidden_states)
        routed = StandardTopKOutput(topk_weights, topk_ids, topk_weights)  # the last one stands for logits that nobody reads
        given = StandardDispatchOutput(hidden_states, None, routed)
        return fused_experts_none_to_humming(given, HummingMoeQuantInfo(layer=self._layer), self._config).hidden_states


def create() -> HummingRunner:
    """A runner for one layer."""
    return HummingRunner()
