"""Attention of the CPU host: reads the one shared key-value head in place; transformers' eager function copies it per head."""

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


def leave_out_empty_heads(model) -> None:
    """Remove attention heads whose output projection is zero, in place; models padded to a kernel's head count have them."""
    groups, width = model.config.o_groups, model.config.head_dim
    for layer in model.model.layers:
        attention = layer.self_attn
        out = attention.o_a_proj.weight.data.unflatten(1, (-1, width)).unflatten(0, (groups, -1))  # [groups, rank, heads, width]
        used = (out != 0).any(3).any(1).any(0)
        attention.o_a_proj.weight.data = out[:, :, used].flatten(2).flatten(0, 1)
        attention.q_b_proj.weight.data = attention.q_b_proj.weight.data.view(groups, len(used), width, -1)[:, used].flatten(0, 2)
        attention.sinks.data = attention.sinks.data.view(groups, -1)[:, used].flatten()
        attention.num_heads = attention.num_key_value_groups = attention.sinks.numel()
