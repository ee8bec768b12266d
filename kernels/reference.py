"""The executable definition of every kernel (`kernels/CONTRACT.md`): plain torch, FP64 accumulation, CPU and GPU, no state.

`pre_dispatch` + `mega_moe` are what the CUDA kernel computes; `moe_layer` is both for one rank. `fp8_mega` is the same for
block-scaled FP8 experts, `w4a16` the same weights with activations that are not quantised, `exact` the layer without any rounding
after the weights.
"""

from collections.abc import Sequence

import torch

from hopper_moe.kernels.reference_stages import (
    DispatchedTokens,
    combine_slots,
    expert_hidden,
    expert_slots,
    swiglu,
)
from hopper_moe.kernels.reference_weights import Experts, Fp8BlockExperts, as_source
from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import (
    decode_e2m1,
    power_of_two,
    quantize_activations,
    quantize_mxfp4_activations,
    unpack_nibbles,
)
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts


def pre_dispatch(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    routed_scaling_factor: float = 1.0,
    num_padded_tokens: int | None = None,
    fp4: bool = False,
) -> DispatchedTokens:
    """Quantises one rank's tokens and multiplies the routed scaling factor into the weights, once.

    Args:
        x: bf16 (or float32) [M, H].
        topk_ids: int32 or int64 [M, K], global expert ids; below 0: skipped.
        topk_weights: float [M, K].
        num_padded_tokens: rows of the result, at least M; the rows beyond M are zeros with ids -1 and weights 0. None: M.
        fp4: activations travel as E2M1 with a UE8M0 scale per 32 features (see `fp4_as_e4m3`) instead of E4M3.

    Raises:
        ValueError: shapes that do not belong together, or fewer padded rows than tokens.
    """
    num_tokens, top_k = _check_tokens(x, topk_ids, topk_weights)
    rows = num_tokens if num_padded_tokens is None else num_padded_tokens
    if rows < num_tokens:
        raise ValueError(f"num_padded_tokens {rows} is below the {num_tokens} tokens given: pad to at least as many.")
    padded = torch.zeros(rows, x.shape[1], dtype=x.dtype, device=x.device)
    padded[:num_tokens] = x
    x_q, x_scale = fp4_as_e4m3(padded) if fp4 else quantize_activations(padded, x.shape[1])
    ids = torch.full((rows, top_k), -1, dtype=torch.int32, device=x.device)
    ids[:num_tokens] = topk_ids.to(torch.int32).clamp_min(-1)
    weights = torch.zeros(rows, top_k, dtype=torch.float32, device=x.device)
    weights[:num_tokens] = topk_weights.float() * torch.tensor(routed_scaling_factor, dtype=torch.float32, device=x.device)
    return DispatchedTokens(x_q, x_scale, ids, weights, num_tokens)


def fp4_as_e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP4 activations in the operand format of the kernel: (float8_e4m3fn [M, H], FP32 scale [M, 1]).

    x is rounded to E2M1 with one UE8M0 scale per 32 features. For a token whose largest of these scales is 2**s, the E4M3 scale
    is 2**(s - 6) (the largest value, 6 * 2**6 = 384, still fits), and a value is exact as E4M3 if its own scale is at least
    2**(s - 14). Values further down round to the nearest multiple of 2**(s - 15).
    """
    packed, scale = quantize_mxfp4_activations(x)
    exponents = scale.to(torch.int32) - layout.UE8M0_BIAS
    token_exponent = exponents.amax(1, keepdim=True) - 6
    step = power_of_two(exponents - token_exponent).unsqueeze(-1)
    values = decode_e2m1(unpack_nibbles(packed), torch.float64).unflatten(1, (-1, layout.MXFP4_GROUP)) * step
    return values.flatten(1).float().to(torch.float8_e4m3fn), power_of_two(token_exponent, torch.float32)


def mega_moe(
    inputs: Sequence[DispatchedTokens],
    experts: Sequence[Experts],
    *,
    num_experts: int,
    swiglu_limit: float | None,
    fp8_combine: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:
    """The fused layer over simulated ranks: `inputs[r]` are rank r's tokens, `experts[r]` its experts (global ids r * E_local
    ...).

    Returns bf16 [num_tokens, H] per rank; a token without a valid slot gets exact zeros. In FP64 the bits do not depend on the
    number of ranks nor on the rest of the batch. Raises ValueError when ranks, experts, sizes or ids do not belong together.
    """
    hidden = expert_hidden(inputs, experts, num_experts=num_experts, swiglu_limit=swiglu_limit, compute_dtype=compute_dtype)
    slots = expert_slots(inputs, hidden, experts, num_experts=num_experts, fp8_combine=fp8_combine, compute_dtype=compute_dtype)
    outputs = [combine_slots(c, tokens.topk_ids) for c, tokens in zip(slots, inputs, strict=True)]
    return [y[: tokens.num_tokens] for y, tokens in zip(outputs, inputs, strict=True)]


def fp8_mega(
    inputs: Sequence[DispatchedTokens],
    experts: Sequence[Fp8BlockExperts | PackedFp8Experts],
    *,
    num_experts: int,
    swiglu_limit: float | None,
    fp8_combine: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:
    """`mega_moe` with E4M3 experts that have one FP32 scale per 128 x 128 block. Raises ValueError for any other experts."""
    for rank, shard in enumerate(experts):
        if not isinstance(shard, Fp8BlockExperts | PackedFp8Experts):
            raise ValueError(f"rank {rank} holds {type(shard).__name__}, but fp8_mega needs FP8 experts: use mega_moe for FP4.")
    return mega_moe(
        inputs, experts, num_experts=num_experts, swiglu_limit=swiglu_limit, fp8_combine=fp8_combine, compute_dtype=compute_dtype
    )


def moe_layer(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: Experts,
    *,
    swiglu_limit: float | None,
    first_expert: int = 0,
    routed_scaling_factor: float = 1.0,
    fp4: bool = False,
    fp8_combine: bool = False,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """One rank's share of the layer: pre-dispatch and the experts `first_expert ...` held here, ids being global.

    Ids below 0 and ids of experts that are not held here are skipped. Returns bf16 [M, H]; rows without a local expert are exact
    zeros.
    """
    tokens = pre_dispatch(
        x, _local_ids(topk_ids, first_expert, experts), topk_weights, routed_scaling_factor=routed_scaling_factor, fp4=fp4
    )
    (y,) = mega_moe(
        [tokens],
        [experts],
        num_experts=experts.num_experts,
        swiglu_limit=swiglu_limit,
        fp8_combine=fp8_combine,
        compute_dtype=compute_dtype,
    )
    return y


def w4a16(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: Experts,
    *,
    swiglu_limit: float | None,
    first_expert: int = 0,
    routed_scaling_factor: float = 1.0,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """The layer with activations that are not quantised: they keep x's type (bf16, float16 or float32) wherever they are stored.

    That is: h and each weighted slot are rounded to x.dtype, slots are summed over k ascending in FP32, and y [M, H] has x.dtype.
    Ids as in `moe_layer`. With float32 x and compute type it is the dequantised layer of other libraries up to the order of sums.
    """
    return _unquantized(
        x, topk_ids, topk_weights, experts, swiglu_limit, first_expert, routed_scaling_factor, compute_dtype, x.dtype
    ).to(x.dtype)


def exact(
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    experts: Experts,
    *,
    swiglu_limit: float | None,
    first_expert: int = 0,
    routed_scaling_factor: float = 1.0,
) -> torch.Tensor:
    """The layer in FP64 throughout, with the checkpoint's weights: what quantised activations are measured against. float64 [M,
    H].
    """
    wide = torch.float64
    return _unquantized(x, topk_ids, topk_weights, experts, swiglu_limit, first_expert, routed_scaling_factor, wide, wide)


def _unquantized(x, topk_ids, topk_weights, experts, swiglu_limit, first_expert, factor, compute_dtype, stored_dtype):
    _check_tokens(x, topk_ids, topk_weights)
    source, local = as_source(experts), _local_ids(topk_ids, first_expert, experts)
    weights = (topk_weights.float() * torch.tensor(factor, dtype=torch.float32, device=x.device)).to(compute_dtype)
    slots = torch.zeros(*topk_ids.shape, x.shape[1], dtype=stored_dtype, device=x.device)
    for expert in local.unique().tolist():
        if expert < 0:
            continue
        token, slot = (local == expert).nonzero(as_tuple=True)
        gate, up = (x[token].to(compute_dtype) @ _dense(source.w13(expert, compute_dtype)).T).chunk(2, dim=1)
        h = swiglu(gate, up, swiglu_limit).to(stored_dtype).to(compute_dtype)
        value = h @ _dense(source.w2(expert, compute_dtype)).T
        slots[token, slot] = (weights[token, slot, None] * value).to(stored_dtype)
    total = torch.zeros(x.shape, dtype=torch.promote_types(stored_dtype, torch.float32), device=x.device)
    for k in range(slots.shape[1]):
        total += slots[:, k]
    return total


def _dense(matrix) -> torch.Tensor:
    if matrix.block_scale is None:
        return matrix.values
    columns = matrix.values.shape[1]
    return matrix.values * matrix.block_scale.repeat_interleave(layout.FP8_BLOCK, 1)[:, :columns]


def _local_ids(topk_ids: torch.Tensor, first_expert: int, experts: Experts) -> torch.Tensor:
    """Ids of the experts held here counted from 0; -1 for every other id."""
    local = topk_ids.long() - first_expert
    return torch.where((local >= 0) & (local < experts.num_experts) & (topk_ids >= 0), local, -1)


def _check_tokens(x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> tuple[int, int]:
    """(num_tokens, top_k); raises ValueError when the three do not belong together."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}: give bf16 [num_tokens, hidden_size].")
    if topk_ids.dim() != 2 or topk_ids.shape[0] != x.shape[0] or topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids is {topk_ids.dtype} {list(topk_ids.shape)}: give int32 [{x.shape[0]}, top_k].")
    if topk_weights.shape != topk_ids.shape or not topk_weights.is_floating_point():
        raise ValueError(f"topk_weights is {topk_weights.dtype} {list(topk_weights.shape)}: give float32 {list(topk_ids.shape)}.")
    if topk_ids.shape[1] > layout.MAX_TOP_K:
        raise ValueError(f"top_k {topk_ids.shape[1]} is above {layout.MAX_TOP_K}, the limit of the fused kernel.")
    num_tokens, top_k = topk_ids.shape
    return num_tokens, top_k
