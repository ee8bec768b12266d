"""Baseline `marlin`: SGLang's `fused_marlin_moe` on MXFP4 experts, one rank, weights repacked by SGLang's own helpers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from hopper_moe.eval.layer_bench.baselines.checkpoint_experts import require_one_rank
from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import as_bytes

if TYPE_CHECKING:
    from hopper_moe.kernels.shard import ExpertShard

_TILE = 16  # k of one Marlin tile; its int32 words hold 8 codes


@dataclass(frozen=True)
class MarlinExperts:
    """`ExpertTensors` in Marlin's order: int32 weights, float8_e8m0fnu scales."""

    holds_every_row: ClassVar[bool] = True

    w13: torch.Tensor  # [E, H/16, 4I]
    w13_scale: torch.Tensor  # [E, H/32, 2I]
    w2: torch.Tensor  # [E, I/16, 2H]
    w2_scale: torch.Tensor  # [E, I/32, H]

    @classmethod
    def empty(cls, num_experts: int, hidden_size: int, intermediate_size: int, device: torch.device | str) -> MarlinExperts:
        """Uninitialised tensors, to be filled with `store`."""
        layout.check_dims(hidden_size, intermediate_size)

        def matrix(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
            weight = torch.empty(num_experts, columns // _TILE, rows * _TILE // 8, dtype=torch.int32, device=device)
            scale = torch.empty(num_experts, columns // layout.MXFP4_GROUP, rows, dtype=torch.float8_e8m0fnu, device=device)
            return weight, scale

        return cls(*matrix(2 * intermediate_size, hidden_size), *matrix(hidden_size, intermediate_size))

    def store(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> None:
        """Repacks one expert's checkpoint tensors (rows of w13 `[w1; w3]`, as Marlin's layer wants them) into slot `expert`."""
        from sglang.kernels.ops.quantization.gptq_marlin_repack import gptq_marlin_repack
        from sglang.srt.layers.quantization.marlin_utils import marlin_permute_scales
        from sglang.srt.layers.quantization.marlin_utils_fp4 import mxfp4_marlin_process_scales

        for name, weight, scale in (("w13", w13, w13_scale), ("w2", w2, w2_scale)):
            size_n, size_k = weight.shape[0], weight.shape[1] * 2
            words = as_bytes(weight).contiguous().view(torch.int32).T.contiguous()
            no_permutation = torch.empty(0, dtype=torch.int, device=weight.device)
            packed = gptq_marlin_repack(b_q_weight=words, perm=no_permutation, size_k=size_k, size_n=size_n, num_bits=4)
            values = as_bytes(scale).view(torch.float8_e8m0fnu).to(torch.bfloat16).T.contiguous()
            scales = marlin_permute_scales(s=values, size_k=size_k, size_n=size_n, group_size=layout.MXFP4_GROUP)
            getattr(self, name)[expert].copy_(packed)
            getattr(self, f"{name}_scale")[expert].view(torch.uint8).copy_(
                mxfp4_marlin_process_scales(scales, input_dtype=torch.bfloat16).view(torch.uint8)
            )


class MarlinRunner:
    """`ExpertRunner` over SGLang's `fused_marlin_moe`. One rank: every id has to be local."""

    experts_type = MarlinExperts

    def prepare(self, experts: MarlinExperts, shard: ExpertShard) -> None:
        """See `ExpertRunner.prepare`."""
        require_one_rank("marlin", shard)
        self._experts, self._limit = experts, shard.swiglu_limit

    def run(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """See `ExpertRunner.run`; ids are all valid."""
        from sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe import fused_marlin_moe

        if not hidden_states.shape[0]:
            return torch.empty_like(hidden_states)
        return fused_marlin_moe(
            hidden_states,
            self._experts.w13,
            self._experts.w2,
            self._experts.w13_scale,
            self._experts.w2_scale,
            topk_weights,  # stands for the router's logits, of which only the number of rows is read
            topk_weights,
            topk_ids,
            num_bits=4,
            clamp_limit=self._limit,
        )


def create() -> MarlinRunner:
    """A runner for one layer."""
    return MarlinRunner()
