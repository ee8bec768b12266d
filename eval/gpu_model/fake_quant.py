"""Quantisers of `quantization/codecs.py` as differentiable FP32 operations: same values, the gradient passed straight through.

`tests/test_gpu_model.py` holds each against the codec that writes checkpoints.
"""

from __future__ import annotations

import torch

from hopper_moe.quantization.layout import E2M1_VALUES, E4M3_MAX, FP8_BLOCK, MXFP4_GROUP

_FLOOR = 2.0**-100


def _straight_through(x: torch.Tensor, quantised: torch.Tensor) -> torch.Tensor:
    return x + (quantised.to(x.dtype) - x).detach()


def _power_of_two_above(values: torch.Tensor) -> torch.Tensor:
    """Smallest power of two >= each positive FP32 value, exact (bits, no logarithm)."""
    bits = values.view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def _round_e2m1(scaled: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 value of each |x| (ties to the even code, above 6 becomes 6), without sign."""
    # Steps of 1/2 below 2, of 1 below 4, of 2 above: torch.round's ties to even are the format's.
    a = scaled.abs().clamp(max=E2M1_VALUES[-1])
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    return torch.round(a / step) * step


def mxfp4(w: torch.Tensor) -> torch.Tensor:
    """w [..., K] as MXFP4 holds it: per 32 values the exponent ceil(log2(amax/6)) or one less, whichever errs less."""
    with torch.no_grad():
        grouped = w.float().unflatten(-1, (-1, MXFP4_GROUP))
        high = _power_of_two_above(grouped.abs().amax(-1, keepdim=True).clamp_min(_FLOOR) / E2M1_VALUES[-1])
        candidates = [torch.copysign(_round_e2m1(grouped / s) * s, grouped) for s in (high, high / 2)]
        errors = [(c - grouped).square().sum(-1, keepdim=True) for c in candidates]
        best = torch.where(errors[1] < errors[0], candidates[1], candidates[0]).flatten(-2)
    return _straight_through(w, best)


def fp8_blocks(w: torch.Tensor) -> torch.Tensor:
    """w [N, K] (multiples of 128) as E4M3 in 128 x 128 blocks with power-of-two scales."""
    with torch.no_grad():
        tiles = w.float().unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))
        scale = _power_of_two_above(tiles.abs().amax((1, 3), keepdim=True).clamp_min(_FLOOR) / E4M3_MAX)
        best = ((tiles / scale).to(torch.float8_e4m3fn).float() * scale).flatten(2).flatten(0, 1)
    return _straight_through(w, best)


def activations(x: torch.Tensor, group: int) -> torch.Tensor:
    """x [..., N] as E4M3 with one FP32 scale per `group` values (the last group may be all there is)."""
    with torch.no_grad():
        grouped = x.float().unflatten(-1, (-1, min(group, x.shape[-1])))
        amax = grouped.abs().amax(-1, keepdim=True).clamp_min(_FLOOR)
        # The codec's operations: a quotient instead of the product, or torch's reciprocal (which a number divided by a tensor
        # becomes), falls on the other side of a border once in millions.
        limit = torch.full_like(amax, E4M3_MAX)
        best = ((grouped * (limit / amax)).to(torch.float8_e4m3fn).float() * (amax / limit)).flatten(-2)
    return _straight_through(x, best)
