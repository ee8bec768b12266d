"""DeepSeek-V4's forward pass for training on short sequences: transformers' arithmetic, a tenth of its kernel launches.

What makes it short, and what it therefore cannot do: whole sequences without cache, at most 127 tokens (so the ratio-128 layer
has no compressed entry and the indexer selects every entry), only the active heads, every expert computed for every token and
the unselected ones weighted zero. No host synchronisation, so a training step can be a CUDA graph.
`tests/test_gpu_model.py` compares it with transformers' model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hopper_moe.eval.gpu_model import fake_quant
from hopper_moe.eval.gpu_model.config import ACTIVE_HEADS_PER_GROUP, CONFIG
from hopper_moe.quantization.layout import FP8_BLOCK, H_GROUP

H, HEAD, ROPE = CONFIG["hidden_size"], CONFIG["head_dim"], CONFIG["qk_rope_head_dim"]
GROUPS, HEADS = CONFIG["o_groups"], CONFIG["o_groups"] * ACTIVE_HEADS_PER_GROUP
EPS, HC, RATIO = 1e-6, CONFIG["hc_mult"], 4

Parameters = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Rope:
    """cos and sin, FP32 [positions, ROPE / 2], of the compressed layers' rotary embedding."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of_length(cls, length: int, device: torch.device | str) -> Rope:
        exponents = torch.arange(0, ROPE, 2, device=device, dtype=torch.float32) / ROPE
        angles = torch.outer(
            torch.arange(length, device=device, dtype=torch.float32), CONFIG["compress_rope_theta"] ** -exponents
        )
        return cls(angles.cos(), angles.sin())

    def rotate(self, x: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
        """Turn the last ROPE features of x [..., positions, features] in adjacent pairs."""
        pairs = x[..., -ROPE:].float().unflatten(-1, (-1, 2))
        a, b = pairs[..., 0], pairs[..., 1]
        sin = -self.sin if inverse else self.sin
        turned = torch.stack((a * self.cos - b * sin, a * sin + b * self.cos), -1).flatten(-2)
        return torch.cat((x[..., :-ROPE], turned.to(x.dtype)), -1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _unit(x.float()) * weight


class _Linears:
    """The model's matrices, quantised on the way if asked, and the types that products run in."""

    def __init__(self, parameters: Parameters, quantised: bool, dtype: torch.dtype) -> None:
        self.p, self.quantised, self.dtype = parameters, quantised, dtype

    def fp8(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x [..., K] times an FP8 matrix."""
        w = self.p[f"{name}.weight"]
        if self.quantised:
            x, w = fake_quant.activations(x, FP8_BLOCK), fake_quant.fp8_blocks(w)
        return F.linear(x.to(self.dtype), w.to(self.dtype))

    def plain(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x [..., K] times a BF16 matrix."""
        return F.linear(x.to(self.dtype), self.p[f"{name}.weight"].to(self.dtype))

    def expert(self, name: str) -> torch.Tensor:
        w = self.p[name]
        return (fake_quant.mxfp4(w) if self.quantised else w).to(self.dtype)

    def routed_input(self, x: torch.Tensor, group: int) -> torch.Tensor:
        return (fake_quant.activations(x, group) if self.quantised else x).to(self.dtype)

    def cached(self, kv: torch.Tensor) -> torch.Tensor:
        """Keys, which are the values too, as SGLang's cache keeps them: E4M3 per 64 features, the rotated ones in BF16."""
        if self.quantised:
            kv = torch.cat((fake_quant.activations(kv[..., :-ROPE], 64), kv[..., -ROPE:]), -1)
        return kv.to(self.dtype)


def _mix(x: torch.Tensor, p: Parameters, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hyper-connection of x [B, T, HC, H]: (post [B, T, HC], comb [B, T, HC, HC], collapsed [B, T, H])."""
    mixes = F.linear(_unit(x.flatten(2)), p[f"{name}.fn"])
    scale, base = p[f"{name}.scale"], p[f"{name}.base"]
    pre = torch.sigmoid(mixes[..., :HC] * scale[0] + base[:HC]) + EPS
    post = 2 * torch.sigmoid(mixes[..., HC : 2 * HC] * scale[1] + base[HC : 2 * HC])
    comb = torch.softmax((mixes[..., 2 * HC :] * scale[2] + base[2 * HC :]).unflatten(-1, (HC, HC)), -1) + EPS
    comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    for _ in range(CONFIG["hc_sinkhorn_iters"] - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + EPS)
        comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    return post, comb, (pre.unsqueeze(-1) * x).sum(2)


def _spread(x: torch.Tensor, y: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """Streams x [B, T, HC, H] after a block's output y [B, T, H]."""
    return post.unsqueeze(-1) * y.float().unsqueeze(2) + torch.matmul(comb.transpose(-1, -2), x)


def _compressed(x: torch.Tensor, w: _Linears, name: str) -> torch.Tensor:
    """Entries [B, T / 4, HEAD] of a ratio-4 layer: each pools its own four tokens and, in other features, the four before."""
    kv, gate = (w.plain(x, f"{name}.{part}").float().unflatten(1, (-1, RATIO)) for part in ("kv_proj", "gate_proj"))
    gate = gate + w.p[f"{name}.position_bias"]

    def overlap(t: torch.Tensor, fill: float) -> torch.Tensor:
        before = F.pad(t[:, :-1, :, :HEAD], (0, 0, 0, 0, 1, 0), value=fill)
        return torch.cat((before, t[..., HEAD:]), 2)

    pooled = (overlap(kv, 0.0) * overlap(gate, -1e9).softmax(2)).sum(2)
    windows = Rope.of_length(x.shape[1], x.device)
    windows = Rope(windows.cos[::RATIO], windows.sin[::RATIO])
    return windows.rotate(_norm(pooled, w.p[f"{name}.kv_norm.weight"]))


def _attention(x: torch.Tensor, w: _Linears, name: str, ratio: int, rope: Rope) -> torch.Tensor:
    """x [B, T, H] -> [B, T, H]."""
    p, (batch, length, _) = w.p, x.shape
    device = x.device
    latent = _norm(w.fp8(x, f"{name}.q_a_proj"), p[f"{name}.q_a_norm.weight"])
    q = w.fp8(latent, f"{name}.q_b_proj").view(batch, length, HEADS, HEAD).transpose(1, 2)
    q_norm = torch.rsqrt((q * q).mean(-1, keepdim=True, dtype=torch.float32) + EPS)  # of every head; applied to the scores
    kv = w.cached(rope.rotate(_norm(w.fp8(x, f"{name}.kv_proj"), p[f"{name}.kv_norm.weight"])))
    rows = torch.arange(length, device=device).unsqueeze(1)
    visible = torch.arange(length, device=device) <= rows
    if ratio == RATIO:
        kv = torch.cat((kv, w.cached(_compressed(x, w, f"{name}.compressor"))), 1)
        visible = torch.cat((visible, torch.arange(length // RATIO, device=device) < (rows + 1) // RATIO), 1)
    queries = rope.rotate(q).reshape(batch, HEADS * length, HEAD)
    scores = torch.bmm(queries, kv.transpose(1, 2)).view(batch, HEADS, length, -1).float()
    scores = (scores * (q_norm * HEAD**-0.5)).masked_fill(~visible, -torch.inf)
    sinks = p[f"{name}.sinks"].view(1, -1, 1, 1).expand(batch, -1, length, 1)
    shares = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1].to(w.dtype)
    out = torch.bmm(shares.reshape(batch, HEADS * length, -1), kv).view(batch, HEADS, length, HEAD)
    out = rope.rotate(out, inverse=True).unflatten(1, (GROUPS, -1)).permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
    o_a = p[f"{name}.o_a_proj.weight"]
    if w.quantised:
        out, o_a = fake_quant.activations(out, FP8_BLOCK), fake_quant.fp8_blocks(o_a)
    out = torch.bmm(out.to(w.dtype), o_a.to(w.dtype).unflatten(0, (GROUPS, -1)).transpose(1, 2))
    return w.fp8(out.transpose(0, 1).reshape(batch, length, -1), f"{name}.o_b_proj")


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    limit = CONFIG["swiglu_limit"]
    return F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)


def _route(x: torch.Tensor, ids: torch.Tensor, p: Parameters, name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights [N, E] with zeros where not selected, selected experts [N, K]) of x [N, H], ids [N]."""
    scores = F.softplus(F.linear(x.to(dtype), p[f"{name}.weight"].to(dtype)).float()).sqrt()
    if f"{name}.tid2eid" in p:
        chosen = p[f"{name}.tid2eid"][ids]
    else:
        chosen = (scores.detach() + p[f"{name}.e_score_correction_bias"]).topk(CONFIG["num_experts_per_tok"], -1).indices
    picked = scores.gather(1, chosen)
    picked = picked / (picked.sum(-1, keepdim=True) + 1e-20) * CONFIG["routed_scaling_factor"]
    return torch.zeros_like(scores).scatter(1, chosen, picked), chosen


def _experts(x: torch.Tensor, ids: torch.Tensor, w: _Linears, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(x [B, T, H] -> [B, T, H], selected experts [N, K])."""
    flat, p = x.flatten(0, 1), w.p
    weights, chosen = _route(flat, ids.flatten(), p, f"{name}.gate", w.dtype)
    gate_up = w.expert(f"{name}.experts.gate_up_proj")  # [E, 2I, H], gate rows first
    num_experts = gate_up.shape[0]
    gate, up = F.linear(w.routed_input(flat, H), gate_up.flatten(0, 1)).unflatten(-1, (num_experts, 2, -1)).unbind(2)
    hidden = w.routed_input(_swiglu(gate, up).to(w.dtype), H_GROUP) * weights.unsqueeze(-1).to(w.dtype)
    down = w.expert(f"{name}.experts.down_proj")  # [E, H, I]
    y = F.linear(hidden.flatten(1), down.permute(1, 0, 2).flatten(1))
    shared = f"{name}.shared_experts"
    inner = _swiglu(w.fp8(flat, f"{shared}.gate_proj"), w.fp8(flat, f"{shared}.up_proj"))
    return (y + w.fp8(inner, f"{shared}.down_proj")).unflatten(0, x.shape[:2]), chosen


def forward(
    p: Parameters, ids: torch.Tensor, *, quantised: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits FP32 [B, T, vocab], selected experts [B * T, K] by router name).

    Args:
        p: FP32 parameters and buffers under transformers' names, active heads only (`state.initial_state`).
        ids: int64 [B, T], T a multiple of 4 and at most 124; positions after a sequence's end do not disturb it.
        quantised: weights and activations as the checkpoint and the kernels hold them, gradients straight through.
        dtype: of the matrix products.
    """
    w, rope = _Linears(p, quantised, dtype), Rope.of_length(ids.shape[1], ids.device)
    embedding = p["model.embed_tokens.weight"]
    # As a product with one-hot rows: the gradient of an indexed read needs a sort that synchronises with the host.
    one_hot = (ids.unsqueeze(-1) == torch.arange(embedding.shape[0], device=ids.device)).to(dtype)
    x = (one_hot @ embedding.to(dtype)).float().unsqueeze(2).expand(-1, -1, HC, -1)
    chosen: dict[str, torch.Tensor] = {}
    for layer, ratio in enumerate(CONFIG["compress_ratios"]):
        name = f"model.layers.{layer}"
        post, comb, y = _mix(x, p, f"{name}.attn_hc")
        y = _attention(_norm(y, p[f"{name}.input_layernorm.weight"]), w, f"{name}.self_attn", ratio, rope)
        x = _spread(x, y, post, comb)
        post, comb, y = _mix(x, p, f"{name}.ffn_hc")
        y, chosen[f"{name}.mlp.gate"] = _experts(_norm(y, p[f"{name}.post_attention_layernorm.weight"]), ids, w, f"{name}.mlp")
        x = _spread(x, y, post, comb)
    mixes = F.linear(_unit(x.flatten(2)), p["model.hc_head.hc_fn"])
    pre = torch.sigmoid(mixes * p["model.hc_head.hc_scale"] + p["model.hc_head.hc_base"]) + EPS
    x = _norm((pre.unsqueeze(-1) * x).sum(2), p["model.norm.weight"])
    return w.plain(x, "lm_head").float(), chosen
