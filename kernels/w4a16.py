"""MXFP4 experts with BF16 activations: FlashInfer's SM90 mixed-input `cutlass_fused_moe`. Meaning: `reference.w4a16`.

FlashInfer compiles the library on the spot (minutes); `build` does it ahead of time. Which of its tiles runs is measured once per
shape (`tune`), so the last bits of a result may differ between two starts of a server; nothing else depends on it.
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

from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.quantization import layout

if TYPE_CHECKING:
    from hopper_moe.quantization.packing_w4a16 import InterleavedExperts

logger = logging.getLogger("hopper_moe")

MAX_TUNED_TOKENS = 8192  # FlashInfer's own default: larger batches use the tile of this size


def require_flashinfer() -> None:
    """Raises Refusal when FlashInfer is not installed."""
    if importlib.util.find_spec("flashinfer") is None:
        raise Refusal("w4a16 runs FlashInfer's kernel, which is not installed: pip install 'sglang-hopper-moe[sglang]'.")


def _jit_spec():
    """FlashInfer's recipe of the library."""
    if not torch.cuda.is_available():  # FlashInfer asks the GPU at its import which architecture to compile for
        os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    from flashinfer.jit.fused_moe import gen_cutlass_fused_moe_sm90_module

    return gen_cutlass_fused_moe_sm90_module()


def library_path() -> Path:
    """Where FlashInfer's compiled library is, or will be. Raises Refusal without FlashInfer."""
    require_flashinfer()
    return Path(_jit_spec().get_library_path())


def build() -> Path:
    """Compiles FlashInfer's library unless it is there (nvcc, tens of minutes of one core; needs no GPU); returns its path."""
    require_flashinfer()
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

    def __init__(
        self,
        *,
        num_tokens_capacity: int,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        num_local_experts: int | None = None,
        first_expert: int = 0,
        swiglu_limit: float | None,
        device: torch.device | str = "cuda",
        fused_finalize: bool = False,
    ) -> None:
        """Checks the shape; loads nothing.

        Args:
            num_tokens_capacity: most tokens one call may bring.
            num_experts: size of the id space of `topk_ids`; this object computes `first_expert .. + num_local_experts - 1`
                (default: all).
            fused_finalize: sum the slots with atomics in the second GEMM, in another order in every run. What SGLang 0.5.17 does;
                for comparison.

        Raises:
            Refusal: sizes that the kernel does not take, FlashInfer missing, or a device that is no SM90 GPU.
        """
        layout.check_shape(hidden_size, intermediate_size, num_experts, top_k)
        num_local_experts = num_experts if num_local_experts is None else num_local_experts
        if num_experts % num_local_experts or first_expert % num_local_experts or not 0 <= first_expert < num_experts:
            raise Refusal(
                f"experts {first_expert}..{first_expert + num_local_experts - 1} of {num_experts} are not one of equal shares, "
                "which is all that w4a16 can hold: use another kernel."
            )
        require_flashinfer()
        self.device = torch.device(device)
        if self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) != (9, 0):
            raise Refusal(f"device {device} is no SM90 GPU (H20, H100, H200): use HOPPER_MOE_KERNEL=reference there.")
        self.hidden_size, self.intermediate_size, self.top_k = hidden_size, intermediate_size, top_k
        self.num_experts, self.num_local_experts, self.first_expert = num_experts, num_local_experts, first_expert
        self.capacity, self._fused_finalize, self._is_tuned = num_tokens_capacity, fused_finalize, False
        self._limit = None
        if swiglu_limit is not None:
            self._limit = torch.full((num_local_experts,), swiglu_limit, dtype=torch.float32, device=self.device)

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
        if num_tokens > self.capacity:
            raise Refusal(f"{num_tokens} tokens are above the capacity {self.capacity}: raise HOPPER_MOE_MAX_TOKENS_PER_RANK.")
        y = torch.empty_like(hidden_states) if out is None else out
        if num_tokens == 0:
            return y
        # FlashInfer counts an expert once per token: a second slot's row would be whatever lies there.
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
            ep_size=self.num_experts // self.num_local_experts,
            ep_rank=self.first_expert // self.num_local_experts,
            output=y,
            use_w4_group_scaling=True,
            use_fused_finalize=self._fused_finalize,
            tune_max_num_tokens=min(self.capacity, MAX_TUNED_TOKENS),
        )
        return y

    def tune(self, experts: InterleavedExperts) -> None:
        """Let FlashInfer measure its tiles for batch sizes up to the capacity: seconds. A second call does nothing."""
        from flashinfer import autotune

        if self._is_tuned:
            return
        started = time.monotonic()
        batch = tuning_batch(
            min(self.capacity, MAX_TUNED_TOKENS), self.hidden_size, self.top_k, self.num_experts, self.device
        )
        with autotune(True):
            self(*batch, experts)
        torch.cuda.synchronize(self.device)
        self._is_tuned = True
        logger.info("w4a16: FlashInfer measured its tiles in %.0f s", time.monotonic() - started)
