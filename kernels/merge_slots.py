"""Slots of a token that name the same expert become one slot: for kernels that take distinct ids only. One Triton launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def merge_repeated(topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first slot of an expert gets the sum of its weights (ascending k), its later slots become -1.

    topk_ids int32 [num_tokens, top_k], topk_weights float32 of the same shape, both contiguous on the GPU; returns fresh tensors.
    Weights of slots below 0 are not read into any sum.
    """
    num_tokens, top_k = topk_ids.shape
    ids, weights = torch.empty_like(topk_ids), torch.empty_like(topk_weights)
    block = 64
    grid = (triton.cdiv(num_tokens, block),)
    _merge[grid](topk_ids, topk_weights, ids, weights, num_tokens, top_k, block)
    return ids, weights


@triton.jit
def _merge(ids_in, weights_in, ids_out, weights_out, num_tokens, top_k: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0) * block + tl.arange(0, block)
    inside = token < num_tokens
    for k in tl.static_range(top_k):
        mine = tl.load(ids_in + token * top_k + k, mask=inside, other=-1)
        total = tl.zeros((block,), tl.float32)
        is_first = mine >= 0
        for j in tl.static_range(top_k):
            same = inside & (mine >= 0) & (tl.load(ids_in + token * top_k + j, mask=inside, other=-1) == mine)
            if j < k:
                is_first = is_first & (same == 0)
            total += tl.load(weights_in + token * top_k + j, mask=same, other=0.0)
        tl.store(ids_out + token * top_k + k, tl.where(is_first, mine, -1), mask=inside)
        tl.store(weights_out + token * top_k + k, total, mask=inside)
