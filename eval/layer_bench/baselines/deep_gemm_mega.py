"""Baseline `deep_gemm_mega`: DeepGEMM's FP8 MegaMoE for SM90 (`sgl-deep-gemm`), one rank, called as SGLang calls it."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from hopper_moe.eval.layer_bench.baselines.checkpoint_experts import require_one_rank
from hopper_moe.quantization import layout
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.fp8_blocks import expand_mxfp4
from hopper_moe.quantization.packing import interleave_rows

if TYPE_CHECKING:
    from hopper_moe.kernels.shard import ExpertShard


_SIZE_MULTIPLE = 512  # a row's FP32 scales, one per 128 values, fill whole 16-byte units


@dataclass(frozen=True)
class DeepGemmExperts:
    """`ExpertTensors`: block-scaled E4M3. Rows of w13 are gate and up in eights; its scales keep `[w1; w3]`."""

    holds_every_row: ClassVar[bool] = True  # `store` refuses what E4M3 cannot hold

    w13: torch.Tensor  # float8_e4m3fn [E, 2I, H]
    w13_scale: torch.Tensor  # float32 [E, 2I/128, H/128]
    w2: torch.Tensor  # float8_e4m3fn [E, H, I]
    w2_scale: torch.Tensor  # float32 [E, H/128, I/128]

    @classmethod
    def empty(cls, num_experts: int, hidden_size: int, intermediate_size: int, device: torch.device | str) -> DeepGemmExperts:
        """Uninitialised tensors, to be filled with `store`."""
        layout.check_dims(hidden_size, intermediate_size)

        def matrix(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
            blocks = (rows // layout.FP8_BLOCK, columns // layout.FP8_BLOCK)
            return (
                torch.empty(num_experts, rows, columns, dtype=torch.float8_e4m3fn, device=device),
                torch.empty(num_experts, *blocks, dtype=torch.float32, device=device),
            )

        return cls(*matrix(2 * intermediate_size, hidden_size), *matrix(hidden_size, intermediate_size))

    def store(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> None:
        """Expands one expert's MXFP4 checkpoint tensors, exactly, into slot `expert`; raises Refusal where that cannot be."""
        q, scale = expand_mxfp4(w13, w13_scale)
        rows = interleave_rows(q.shape[0] // 2, q.device)
        self.w13[expert].view(torch.uint8).copy_(q.view(torch.uint8)[rows])
        self.w13_scale[expert].copy_(scale)
        q, scale = expand_mxfp4(w2, w2_scale)
        self.w2[expert].copy_(q)
        self.w2_scale[expert].copy_(scale)


@functools.cache
def _one_rank():
    """A process group of this process alone, which DeepGEMM's symmetric buffer asks for."""
    import torch.distributed as dist

    if not dist.is_initialized():
        store = dist.FileStore(tempfile.NamedTemporaryFile(prefix="hopper-moe-", delete=False).name, 1)
        dist.init_process_group(
            "nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", torch.cuda.current_device())
        )
    return dist.group.WORLD


@functools.cache
def _buffer(shard: ExpertShard):
    """One exchange buffer for all layers of a shape."""
    import deep_gemm

    return deep_gemm.get_symm_buffer_for_sm90_mega_moe(
        _one_rank(), shard.num_experts, shard.max_tokens_per_rank, shard.top_k, shard.hidden_size, shard.intermediate_size
    )


class DeepGemmMegaRunner:
    """`ExpertRunner` over `deep_gemm.fp8_mega_moe`. One rank, which holds all experts; activations E4M3 per 128."""

    experts_type = DeepGemmExperts

    def prepare(self, experts: DeepGemmExperts, shard: ExpertShard) -> None:
        """See `ExpertRunner.prepare`. Takes the exchange buffer of the shape."""
        import deep_gemm

        if not hasattr(deep_gemm, "fp8_mega_moe"):
            raise Refusal("the installed deep_gemm has no fp8_mega_moe: pip install 'sgl-deep-gemm>=0.1.5'.")
        require_one_rank("deep_gemm_mega", shard)
        for name in ("hidden_size", "intermediate_size"):
            if getattr(shard, name) % _SIZE_MULTIPLE:
                raise Refusal(f"deep_gemm_mega takes {name} in multiples of {_SIZE_MULTIPLE}, not {getattr(shard, name)}.")
        self._experts, self._limit, self._buffer = experts, shard.swiglu_limit, _buffer(shard)

    def run(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """See `ExpertRunner.run`."""
        import deep_gemm

        num_tokens, buffer, experts = hidden_states.shape[0], self._buffer, self._experts
        y = torch.empty_like(hidden_states)
        if not num_tokens:
            return y
        deep_gemm.mega_moe_pre_dispatch_sm90(
            hidden_states,
            topk_ids,
            topk_weights,
            buffer.x,
            buffer.x_sf,
            buffer.topk_idx,
            buffer.topk_weights,
            num_tokens=num_tokens,
            group_size=layout.FP8_BLOCK,
        )
        deep_gemm.fp8_mega_moe(
            y,
            (experts.w13, experts.w13_scale),
            (experts.w2, experts.w2_scale),
            buffer,
            activation_clamp=self._limit,
        )
        return y


def create() -> DeepGemmMegaRunner:
    """A runner for one layer."""
    return DeepGemmMegaRunner()
