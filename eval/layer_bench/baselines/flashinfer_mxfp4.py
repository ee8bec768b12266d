"""Baseline `flashinfer_mxfp4`: FlashInfer's `cutlass_fused_moe` on MXFP4 experts, converted and called as SGLang 0.5.23 does.

BF16 activations; with `precision="fp8"` those of `--flashinfer-mxfp4-moe-precision fp8`, quantised by the kernel itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch

from hopper_moe.eval.layer_bench.baselines.checkpoint_experts import CheckpointExperts, require_one_rank
from hopper_moe.kernels.w4a16 import MAX_TUNED_TOKENS, tuning_batch
from hopper_moe.quantization import layout

if TYPE_CHECKING:
    from hopper_moe.kernels.shard import ExpertShard

_RESIDUAL_GAIN = 64.0  # what FlashInfer's epilogue takes out again


class FlashInferMxfp4Runner:
    """`ExpertRunner` over FlashInfer's CUTLASS kernel. One rank: every id has to be local, and no token names one twice.

    `sizes`: batches to measure tiles for; None: FlashInfer's own 21 up to 8192. For one of two products of one precision these
    took 100 s (V4-Flash, 32 experts) and 200 s (V4.1-Flash, 48) on one H200.
    """

    experts_type = CheckpointExperts

    def __init__(self, precision: Literal["bf16", "fp8"] = "bf16", sizes: tuple[int, ...] | None = None) -> None:
        self._precision, self._sizes = precision, sizes

    def prepare(self, experts: CheckpointExperts, shard: ExpertShard) -> None:
        """See `ExpertRunner.prepare`. Lets FlashInfer measure its tiles, as SGLang does before it captures graphs."""
        require_one_rank("flashinfer_mxfp4", shard)
        up_first = (tensor.roll(shard.intermediate_size, 1) for tensor in (experts.w13, experts.w13_scale))
        convert = _fp8_matrix if self._precision == "fp8" else _bf16_matrix
        self._w13, w13_scales = convert(*up_first)
        self._w2, w2_scales = convert(experts.w2, experts.w2_scale)
        one = [torch.ones((), dtype=torch.float32, device=experts.w2.device)] if self._precision == "fp8" else []
        self._scales = [*w13_scales, *one, *w2_scales]
        self._limit = None
        if shard.swiglu_limit is not None:
            self._limit = torch.full((shard.num_experts,), shard.swiglu_limit, dtype=torch.float32, device=experts.w2.device)
        self._tuned_tokens = min(shard.max_tokens_per_rank, MAX_TUNED_TOKENS)
        self.tune(shard)

    def tune(self, shard: ExpertShard) -> None:
        """FlashInfer measures its tiles for batches up to the capacity, once a shape in a process."""
        from flashinfer import autotune
        from flashinfer.fused_moe.utils import map_to_hybrid_bucket

        # Where FlashInfer looks for the tile of each size.
        buckets = tuple(map_to_hybrid_bucket(size, self._tuned_tokens) for size in self._sizes) if self._sizes else None
        with autotune(True, tuning_buckets=buckets):
            self.run(*tuning_batch(self._tuned_tokens, shard.hidden_size, shard.top_k, shard.num_experts, self._w2.device))

    def arguments(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, output: torch.Tensor
    ) -> dict[str, Any]:
        """Of `cutlass_fused_moe`, those that SGLang 0.5.23 passes on SM90."""
        from flashinfer.fused_moe.core import ActivationType

        return {
            "input": hidden_states,
            "token_selected_experts": topk_ids.to(torch.int32),
            "token_final_scales": topk_weights,
            "fc1_expert_weights": self._w13,
            "fc2_expert_weights": self._w2,
            "output_dtype": torch.bfloat16,
            "quant_scales": self._scales,
            "input_sf": None,
            "fc1_expert_biases": None,
            "fc2_expert_biases": None,
            "swiglu_alpha": None,
            "swiglu_beta": None,
            "swiglu_limit": self._limit,
            "tp_size": 1,
            "tp_rank": 0,
            "ep_size": 1,
            "ep_rank": 0,
            "use_w4_group_scaling": True,
            "use_mxfp8_act_scaling": False,
            "activation_type": ActivationType.Swiglu,
            "tune_max_num_tokens": self._tuned_tokens,
            "output": output,
            "use_fused_finalize": False,
        } | ({"use_wfp4afp8_humming": True} if self._precision == "fp8" else {})

    def run(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """See `ExpertRunner.run`; ids are all valid."""
        from flashinfer.fused_moe import cutlass_fused_moe

        y = torch.empty_like(hidden_states)
        if hidden_states.shape[0]:
            cutlass_fused_moe(**self.arguments(hidden_states, topk_ids, topk_weights, y))
        return y


def _bf16_matrix(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(interleaved weights, their scales) for BF16 activations."""
    from flashinfer.fused_moe import interleave_moe_scales_for_sm90_mixed_gemm, interleave_moe_weights_for_sm90_mixed_gemm

    scale = interleave_moe_scales_for_sm90_mixed_gemm(scale, group_size=layout.MXFP4_GROUP)
    return interleave_moe_weights_for_sm90_mixed_gemm(weight.contiguous(), "fp4"), [scale.view(torch.int32)]


def _fp8_matrix(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(interleaved weights, their scales and one FP32 factor for each expert) for FP8 activations."""
    from flashinfer.fused_moe import preprocess_moe_weights_for_sm90_mixed_gemm_humming

    weight, scale, residual = preprocess_moe_weights_for_sm90_mixed_gemm_humming(weight.contiguous(), scale)
    return weight, [scale.view(torch.int32), (residual * _RESIDUAL_GAIN).contiguous()]


def create(sizes: tuple[int, ...] | None = None) -> FlashInferMxfp4Runner:
    """A runner for one layer. `sizes`: see the class."""
    return FlashInferMxfp4Runner(sizes=sizes)
