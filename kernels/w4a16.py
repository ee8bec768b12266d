"""MXFP4 experts with BF16 activations: FlashInfer's SM90 mixed-input `cutlass_fused_moe`. Meaning: `reference.w4a16`.

FlashInfer compiles the library at first use (minutes); `build` does it ahead of time. Its tiles are measured once per shape
(`tune`), so the last bits of a result may differ between two starts of a server.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hopper_moe.kernels import jit
from hopper_moe.kernels.device import require_sm90
from hopper_moe.quantization import layout
from hopper_moe.quantization.errors import Refusal

if TYPE_CHECKING:
    from hopper_moe.kernels.shard import ExpertShard
    from hopper_moe.quantization.packing_w4a16 import InterleavedExperts

logger = logging.getLogger("hopper_moe")

MAX_TUNED_TOKENS = 8192  # FlashInfer's own default: larger batches use the tile of this size


def require_flashinfer() -> None:
    """Raises Refusal when FlashInfer is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        raise Refusal("w4a16 runs FlashInfer's kernel, which is not installed: pip install 'sglang-hopper-moe[sglang]'.")


def _jit_spec():
    """FlashInfer's build specification of the library. Raises Refusal if its import needs a home folder that is missing."""
    if "FLASHINFER_WORKSPACE_BASE" not in os.environ and not os.path.isabs(os.path.expanduser("~")):
        raise Refusal("FlashInfer keeps its library in the home folder, and this user has none: set FLASHINFER_WORKSPACE_BASE.")
    if not torch.cuda.is_available():  # FlashInfer reads the architecture to compile for from the GPU, at import
        os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module

    return gen_cutlass_fused_moe_sm90_module()


def library_path() -> Path:
    """Where FlashInfer's compiled library is, or will be. Raises Refusal without FlashInfer."""
    require_flashinfer()
    return Path(_jit_spec().get_library_path())


def require_library() -> None:
    """Raises Refusal when FlashInfer would have to compile its library without nvcc, which would otherwise fail during a
    request."""
    path = library_path()
    if not path.exists() and jit.nvcc_if_any() is None:
        raise Refusal(
            f"w4a16 needs FlashInfer's library {path}, which is not there, and there is no nvcc on PATH or under CUDA_HOME to "
            "compile it: install the CUDA 13 toolkit or FlashInfer's wheel of compiled kernels (flashinfer-jit-cache), or use "
            "HOPPER_MOE_KERNEL=mxfp4_mega, which needs no compiler once it is built."
        )


def build() -> Path:
    """Compiles FlashInfer's library unless it is there (nvcc, tens of minutes of one core; needs no GPU); returns its path.
    Raises Refusal without nvcc."""
    require_library()
    spec = _jit_spec()
    if not spec.is_compiled:
        takes_verbose = "verbose" in inspect.signature(spec.build).parameters  # 0.6 demands it, 0.7 has none
        spec.build(**({"verbose": False} if takes_verbose else {}))
    return Path(spec.get_library_path())


def tuning_batch(
    num_tokens: int, hidden_size: int, top_k: int, num_experts: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden_states, topk_ids, topk_weights) that use all experts alike. Types are named: while SGLang loads a model, torch's
    default is BF16."""
    x = torch.zeros(num_tokens, hidden_size, dtype=torch.bfloat16, device=device)
    ids = torch.arange(num_tokens * top_k, dtype=torch.int32, device=device).view(-1, top_k) % num_experts
    return x, ids, torch.ones(ids.shape, dtype=torch.float32, device=device)


class W4A16:
    """The layer for one shape; shared by all layers of a model. CUDA-graph capturable; takes its workspace per call."""

    def __init__(self, shard: ExpertShard, device: torch.device | str = "cuda") -> None:
        """Checks the shape; loads nothing.

        Raises:
            Refusal: sizes that the kernel does not take, FlashInfer missing, or a device that is no SM90 GPU.
        """
        layout.check_shape(shard.hidden_size, shard.intermediate_size, shard.num_experts, shard.top_k)
        first, share = shard.first_expert, shard.num_local_experts
        if shard.num_experts % share or first % share or not 0 <= first < shard.num_experts:
            raise Refusal(
                f"experts {first}..{first + share - 1} of {shard.num_experts} are not one of equal shares, which is all that "
                "w4a16 can hold: use another kernel."
            )
        require_flashinfer()
        self.device = require_sm90(device)
        require_library()
        self.shard, self._is_tuned = shard, False
        self._limit = None
        if shard.swiglu_limit is not None:
            self._limit = torch.full((share,), shard.swiglu_limit, dtype=torch.float32, device=self.device)
        self.kept_tensors = () if self._limit is None else (self._limit,)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        experts: InterleavedExperts,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Weighted sum of the local experts' outputs.

        Args:
            hidden_states: bf16 [num_tokens, hidden_size], contiguous.
            topk_ids: int32 [num_tokens, top_k], global ids; -1 or an id that is not local: skipped.
            topk_weights: float32 [num_tokens, top_k], the routed scaling factor already inside: FlashInfer multiplies a slot
                by it before the sum is rounded to BF16.

        Returns:
            bf16 [num_tokens, hidden_size]; rows without a local slot are exact zeros.
        """
        from flashinfer.fused_moe import cutlass_fused_moe

        from hopper_moe.kernels.merge_slots import merge_repeated

        num_tokens = hidden_states.shape[0]
        shard = self.shard
        if num_tokens > shard.max_tokens_per_rank:
            raise Refusal(
                f"{num_tokens} tokens are above the capacity {shard.max_tokens_per_rank}: raise HOPPER_MOE_MAX_TOKENS_PER_RANK."
            )
        y = torch.empty_like(hidden_states) if out is None else out
        if num_tokens == 0:
            return y
        # FlashInfer counts an expert once per token: a second slot would read an uninitialised row.
        topk_ids, topk_weights = merge_repeated(topk_ids, topk_weights)
        cutlass_fused_moe(
            input=hidden_states,
            token_selected_experts=topk_ids,
            token_final_scales=topk_weights,
            fc1_expert_weights=experts.w13_interleaved,
            fc2_expert_weights=experts.w2_interleaved,
            output_dtype=torch.bfloat16,
            quant_scales=[experts.w13_interleaved_scale.view(torch.int32), experts.w2_interleaved_scale.view(torch.int32)],
            swiglu_limit=self._limit,
            ep_size=shard.num_ranks,
            ep_rank=shard.first_expert // shard.num_local_experts,
            output=y,
            use_w4_group_scaling=True,
            use_fused_finalize=False,  # it sums slots with atomics, in another order in every run
            tune_max_num_tokens=min(shard.max_tokens_per_rank, MAX_TUNED_TOKENS),
        )
        return y

    def tune(self, experts: InterleavedExperts) -> None:
        """Let FlashInfer measure its tiles for batch sizes up to the capacity: seconds. A second call does nothing."""
        from flashinfer import autotune

        if self._is_tuned:
            return
        started, shard = time.monotonic(), self.shard
        num_tokens = min(shard.max_tokens_per_rank, MAX_TUNED_TOKENS)
        batch = tuning_batch(num_tokens, shard.hidden_size, shard.top_k, shard.num_experts, self.device)
        with autotune(True):
            self(*batch, experts)
        torch.cuda.synchronize(self.device)
        self._is_tuned = True
        logger.info("w4a16: FlashInfer measured its tiles in %.0f s", time.monotonic() - started)
