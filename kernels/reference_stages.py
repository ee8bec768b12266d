"""The three stages of the fused MoE kernel in plain torch, each usable alone, over simulated ranks (`kernels/CONTRACT.md`).

    expert_hidden   (dispatched tokens, w13) -> hq, its scales          one row per (token, slot)
    expert_slots    (hq, w2, topk_weights)   -> c                       one row per (token, slot)
    combine_slots   (c, topk_ids)            -> y                       one row per token

With `compute_dtype=torch.float64` a token's result is the same bit for bit whatever else is in the batch, on however many ranks,
in whatever chunks: a dot product over one 128-wide k block of these formats needs at most 43 bits (18 for E4M3, 18 for the
weight, 7 for the sum) and so is exact in FP64 in any order, and everything else is elementwise or summed in a fixed order.
`torch.float32` is for speed on small machines: sums over k are then rounded by the BLAS library, so bits may depend on the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hopper_moe.kernels.reference_weights import Experts, Matrix, as_source
from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import dequantize_activations, quantize_activations

_CHUNK_ROWS = 8192  # rows of an expert worked on at once: bounds the FP64 temporaries, changes no bit


@dataclass(frozen=True)
class DispatchedTokens:
    """One rank's tokens after pre-dispatch. P (padded) rows, of which the first `num_tokens` are real."""

    x_q: torch.Tensor  # float8_e4m3fn [P, H]
    x_scale: torch.Tensor  # float32 [P, 1]
    topk_ids: torch.Tensor  # int32 [P, K], global expert ids; -1: skipped
    topk_weights: torch.Tensor  # float32 [P, K], the routed scaling factor multiplied in
    num_tokens: int


@dataclass(frozen=True)
class HiddenStage:
    """The quantised intermediate of one rank's tokens. Rows of skipped slots are zeros with scale 0."""

    hq: torch.Tensor  # float8_e4m3fn [P, K, I]
    h_scale: torch.Tensor  # float32 [P, K, ceil(I/128)]


def swiglu(gate: torch.Tensor, up: torch.Tensor, swiglu_limit: float | None) -> torch.Tensor:
    """silu(min(gate, L)) * clamp(up, -L, L); no clamp for None."""
    if swiglu_limit is not None:
        gate, up = gate.clamp(max=swiglu_limit), up.clamp(-swiglu_limit, swiglu_limit)
    return gate / (1 + torch.exp(-gate)) * up


def block_matmul(x: torch.Tensor, x_scale: torch.Tensor, group: int, w: Matrix) -> torch.Tensor:
    """sum over k of x[m, k] * x_scale[m, k // group] * w[n, k] in w's type, promoted every 128 k in ascending order -> [M, N].

    x float8_e4m3fn [M, K], x_scale FP32 [M, ceil(K/group)], group a multiple of 128.
    """
    dtype = w.values.dtype
    total = torch.zeros(x.shape[0], w.values.shape[0], dtype=dtype, device=x.device)
    for block, start in enumerate(range(0, x.shape[1], layout.UNIT_K)):
        columns = slice(start, start + layout.UNIT_K)
        partial = x[:, columns].to(dtype) @ w.values[:, columns].T
        partial *= x_scale[:, start // group, None].to(dtype)
        if w.block_scale is not None:
            partial *= w.block_scale[None, :, block]
        total += partial
    return total


def expert_hidden(
    inputs: Sequence[DispatchedTokens],
    experts: Sequence[Experts],
    *,
    num_experts: int,
    swiglu_limit: float | None,
    compute_dtype: torch.dtype = torch.float64,
) -> list[HiddenStage]:
    """hq of every (token, slot) of every rank. `experts[r]` holds the global ids r * E_local ... of rank r.

    Raises ValueError when ranks, experts, sizes or ids do not belong together.
    """
    _check_layer(inputs, experts, num_experts)
    hidden_size, size = experts[0].hidden_size, experts[0].intermediate_size
    x_q = torch.cat([tokens.x_q.view(torch.uint8) for tokens in inputs])
    x_scale = torch.cat([tokens.x_scale for tokens in inputs])
    topk_ids = torch.cat([tokens.topk_ids for tokens in inputs])
    if x_q.shape[1] != hidden_size:
        raise ValueError(f"tokens of {x_q.shape[1]} features were given to experts of hidden_size {hidden_size}.")
    if x_scale.shape[1] != 1:
        raise ValueError(
            f"x_scale is {list(x_scale.shape)}, but a token has one scale: quantise whole rows, as `pre_dispatch` does."
        )
    top_k = topk_ids.shape[1]
    hq = torch.zeros(topk_ids.numel(), size, dtype=torch.uint8, device=x_q.device)
    h_scale = torch.zeros(topk_ids.numel(), layout.h_groups(size), dtype=torch.float32, device=x_q.device)
    for source, expert, slots in _routes(topk_ids, experts):
        w13 = source.w13(expert, compute_dtype)
        for chunk in slots.split(_CHUNK_ROWS):
            rows = chunk // top_k
            gate_up = block_matmul(x_q[rows].view(torch.float8_e4m3fn), x_scale[rows], hidden_size, w13)
            h = swiglu(gate_up[:, :size], gate_up[:, size:], swiglu_limit)
            q, scale = quantize_activations(h.to(torch.bfloat16).float(), layout.H_GROUP)
            hq[chunk], h_scale[chunk] = q.view(torch.uint8), scale
    lengths = [tokens.topk_ids.shape[0] for tokens in inputs]
    per_rank_q = hq.view(-1, top_k, size).view(torch.float8_e4m3fn).split(lengths)
    per_rank_scale = h_scale.view(-1, top_k, layout.h_groups(size)).split(lengths)
    return [HiddenStage(q, scale) for q, scale in zip(per_rank_q, per_rank_scale, strict=True)]


def expert_slots(
    inputs: Sequence[DispatchedTokens],
    hidden: Sequence[HiddenStage],
    experts: Sequence[Experts],
    *,
    num_experts: int,
    fp8_combine: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:
    """c of every (token, slot): bf16 [P, K, H] per rank, zeros for skipped slots. Give any `hidden`: the kernel's own, to test L2
    alone.

    With `fp8_combine` a slot travels as quant_e4m3(its BF16 value, group 128 along H), and c is FP32, dequantised.
    """
    _check_layer(inputs, experts, num_experts)
    hidden_size, size = experts[0].hidden_size, experts[0].intermediate_size
    topk_ids = torch.cat([tokens.topk_ids for tokens in inputs])
    weights = torch.cat([tokens.topk_weights for tokens in inputs]).flatten()
    hq = torch.cat([stage.hq.view(torch.uint8) for stage in hidden]).view(-1, size)
    h_scale = torch.cat([stage.h_scale for stage in hidden]).view(-1, layout.h_groups(size))
    slot_dtype = torch.float32 if fp8_combine else torch.bfloat16
    c = torch.zeros(topk_ids.numel(), hidden_size, dtype=slot_dtype, device=hq.device)
    for source, expert, slots in _routes(topk_ids, experts):
        w2 = source.w2(expert, compute_dtype)
        for chunk in slots.split(_CHUNK_ROWS):
            total = block_matmul(hq[chunk].view(torch.float8_e4m3fn), h_scale[chunk], layout.H_GROUP, w2)
            value = (weights[chunk, None].to(compute_dtype) * total).float().to(torch.bfloat16)
            if fp8_combine:
                value = dequantize_activations(
                    *quantize_activations(value.float(), layout.COMBINE_GROUP), layout.COMBINE_GROUP, torch.float32
                )
            c[chunk] = value.to(slot_dtype)
    lengths = [tokens.topk_ids.shape[0] for tokens in inputs]
    return list(c.view(-1, topk_ids.shape[1], hidden_size).split(lengths))


def combine_slots(slots: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """y = bf16(FP32 sum over ascending k of slots[:, k]), ids below 0 skipped. slots [P, K, H], ids [P, K] -> bf16 [P, H]."""
    total = torch.zeros(slots.shape[0], slots.shape[2], dtype=torch.float32, device=slots.device)
    for k in range(slots.shape[1]):
        total += slots[:, k].float().masked_fill(topk_ids[:, k, None] < 0, 0.0)
    return total.to(torch.bfloat16)


def _check_layer(inputs: Sequence[DispatchedTokens], experts: Sequence[Experts], num_experts: int) -> None:
    if len(inputs) != len(experts) or not experts:
        raise ValueError(f"{len(inputs)} ranks of tokens and {len(experts)} ranks of experts were given, not one of each.")
    per_rank = [shard.num_experts for shard in experts]
    if len(set(per_rank)) != 1 or sum(per_rank) != num_experts:
        raise ValueError(
            f"ranks hold {per_rank} experts, which are not equal shares of num_experts {num_experts}: check the sharding."
        )
    for rank, tokens in enumerate(inputs):
        if tokens.topk_ids.numel() and int(tokens.topk_ids.max()) >= num_experts:
            found = int(tokens.topk_ids.max())
            raise ValueError(
                f"rank {rank} routes a token to expert {found}, above the last expert {num_experts - 1}: check topk_ids."
            )


def _routes(topk_ids: torch.Tensor, experts: Sequence[Experts]) -> Iterator[tuple]:
    """(source, local expert, ascending flat slot indices) of every expert that has at least one slot."""
    flat = topk_ids.flatten().long()
    used = set(flat.unique().tolist())
    first = 0
    for shard in experts:
        source = as_source(shard)
        for expert in range(shard.num_experts):
            if first + expert in used:
                yield source, expert, (flat == first + expert).nonzero().flatten()
        first += shard.num_experts
