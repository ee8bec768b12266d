"""Attention of the CPU host: the one shared key-value head is read in place; transformers' eager function copies it per head."""

from __future__ import annotations

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "hopper_moe_shared_key"


def shared_key_attention(
    module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float, **_
) -> tuple[torch.Tensor, None]:
    """query [B, heads, T, D], key and value [B, 1, S, D], mask [B or 1, 1, T, S] or None -> ([B, T, heads, D], None)."""
    batch, heads, length, width = query.shape
    key, value = key.squeeze(1), value.squeeze(1)
    scores = torch.bmm(query.reshape(batch, heads * length, width), key.transpose(1, 2)).view(batch, heads, length, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    sinks = module.sinks.view(1, -1, 1, 1).expand(batch, -1, length, 1)
    shares = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    out = torch.bmm(shares.reshape(batch, heads * length, -1), value).view(batch, heads, length, width)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, shared_key_attention)
AttentionMaskInterface.register(NAME, eager_mask)
