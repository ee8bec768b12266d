"""Fit the scales of a row into the octaves of a packed format (`kernels/CONTRACT.md` section 3), without changing values
where possible. CPU and CUDA.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch

from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import decode_e2m1, encode_e2m1, pack_nibbles, power_of_two, unpack_nibbles

_ROWS_AT_ONCE = 1024  # bounds the temporary FP64 values of rows that are re-encoded
_LARGEST = layout.UE8M0_NAN - 1


class RowKind(IntEnum):
    """What a row needs to be packed, cheapest first. An all-zero group has no non-zero code."""

    PLAIN = 0  # nothing: its scales span at most `layout.MAX_DELTA` octaves
    ZERO_GROUPS = 1  # all-zero groups left out; the others span at most `layout.MAX_DELTA` octaves
    REENCODED = 2  # groups stored at another scale, which changes no value
    WIDE = 3  # the wide format: up to `layout.WIDE_MAX_DELTA` octaves after that
    BEYOND = 4  # rounding, or the reference


class ScaleLimits(NamedTuple):
    """The scales that one row of a packed format may have: base .. base + max_delta, base at most max_base."""

    max_delta: int
    max_base: int


E4M3_LIMITS = ScaleLimits(layout.MAX_DELTA, layout.MAX_BASE)
E5M2_LIMITS = ScaleLimits(layout.WIDE_MAX_DELTA, layout.WIDE_MAX_BASE)
# Error bounds of a rounded row: at most 2**(base + ERROR_EXPONENT) and, since the row's largest weight is at least
# 4 * 2**(base + max_delta - 127), at most 2**RELATIVE_ERROR_EXPONENT of that weight.
ERROR_EXPONENT = -2 - layout.UE8M0_BIAS
RELATIVE_ERROR_EXPONENT = -2 - layout.WIDE_MAX_DELTA - 2


def _times(magnitude: float, factor: float) -> int:
    """How often an E2M1 magnitude can be multiplied by `factor` and remain an E2M1 magnitude; unlimited for zero."""
    if magnitude == 0:
        return _LARGEST
    count = 0
    while magnitude * factor in layout.E2M1_VALUES:
        magnitude, count = magnitude * factor, count + 1
    return count


_RISES = tuple(_times(magnitude, 0.5) for magnitude in layout.E2M1_VALUES)  # 0: any, then 0 1 0 2 1 3 2
_FALLS = tuple(_times(magnitude, 2.0) for magnitude in layout.E2M1_VALUES)  # 0: any, then 3 2 2 1 1 0 0


def exact_scales(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and the largest scale byte under which a group's codes can be written without changing a value, int32 [N, G].

    weight: uint8 [N, K/2]; scale: uint8 [N, G], G = K/32. An all-zero group has 0 .. 254.
    """
    magnitudes = (unpack_nibbles(weight) & 7).int().unflatten(-1, (-1, layout.MXFP4_GROUP))
    rises, falls = (torch.tensor(table, device=weight.device)[magnitudes].amin(-1).int() for table in (_RISES, _FALLS))
    return (scale.int() - falls).clamp_min(0), (scale.int() + rises).clamp_max(_LARGEST)


class RowFit(NamedTuple):
    """Rows that satisfy `ScaleLimits`."""

    weight: torch.Tensor  # uint8 [N, K/2]
    scale: torch.Tensor  # uint8 [N, K/32], each base .. base + max_delta
    base: torch.Tensor  # uint8 [N]


def plain_base(scale: torch.Tensor, limits: ScaleLimits) -> tuple[torch.Tensor, torch.Tensor]:
    """(base if a row is stored unchanged, whether it can be) for scale bytes uint8 [.., G]."""
    base = scale.amin(-1).clamp_max(limits.max_base)
    return base, scale.amax(-1) - base <= limits.max_delta


def fit_rows(weight: torch.Tensor, scale: torch.Tensor, limits: ScaleLimits) -> RowFit:
    """Rows as the packed format stores them: unchanged where all of a row's scales fit, otherwise `_move_groups`.

    weight: uint8 [N, K/2]; scale: uint8 [N, K/32]. Rows that cannot be represented exactly are rounded; the caller checks for
    them first (`exactness.check_exact`).
    """
    base, fits = plain_base(scale, limits)
    others = (~fits).nonzero().flatten()
    if not others.numel():
        return RowFit(weight, scale, base)
    weight, scale = weight.clone(), scale.clone()
    for rows in others.split(_ROWS_AT_ONCE):
        weight[rows], scale[rows], base[rows] = _move_groups(weight[rows], scale[rows], limits)
    return RowFit(weight, scale, base)


def _move_groups(weight: torch.Tensor, scale: torch.Tensor, limits: ScaleLimits) -> RowFit:
    """Every group at the scale nearest to its own within base .. base + max_delta. The base is the row's smallest scale, or
    higher if its largest values need that. All-zero groups do not affect the base unless there are no others."""
    low, high = exact_scales(weight, scale)
    is_zero = high - low == _LARGEST
    smallest = scale.int().masked_fill(is_zero & ~is_zero.all(-1, keepdim=True), _LARGEST).amin(-1)
    base = torch.maximum(smallest, low.amax(-1) - limits.max_delta).clamp_max(limits.max_base)
    moved = torch.minimum(torch.maximum(scale.int(), base[:, None]), base[:, None] + limits.max_delta)
    codes = unpack_nibbles(weight).unflatten(-1, (-1, layout.MXFP4_GROUP))
    values = decode_e2m1(codes, torch.float64) * power_of_two(scale.int() - moved).unsqueeze(-1)
    return RowFit(pack_nibbles(encode_e2m1(values).flatten(-2)), moved.to(torch.uint8), base.to(torch.uint8))


def row_kinds(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int64 [N]: the `RowKind` of each row of uint8 [N, K/2], [N, K/32]."""
    low, high = exact_scales(weight, scale)
    is_zero = high - low == _LARGEST
    largest, smallest = scale.int().masked_fill(is_zero, 0).amax(-1), scale.int().masked_fill(is_zero, _LARGEST).amin(-1)
    span = needed_span(low, high)
    kinds = torch.full(span.shape, RowKind.BEYOND, device=weight.device)
    kinds[span <= layout.WIDE_MAX_DELTA] = RowKind.WIDE
    kinds[span <= layout.MAX_DELTA] = RowKind.REENCODED
    kinds[largest - smallest <= layout.MAX_DELTA] = RowKind.ZERO_GROUPS
    kinds[plain_base(scale, E4M3_LIMITS)[1]] = RowKind.PLAIN
    return kinds


def needed_span(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """int32 [N]: the octaves that a row needs once every group is moved as far as `exact_scales` allows."""
    return (low.amax(-1) - high.amin(-1)).clamp_min(0)


class Rounding(NamedTuple):
    """Effect of packing rows in the wide format."""

    num_values: int  # changed weights
    largest_base: int  # of the rows


def rounding_of(weight: torch.Tensor, scale: torch.Tensor) -> Rounding:
    """For rows of `RowKind.BEYOND`, at least one."""
    num_values = largest_base = 0
    for codes, scales in zip(weight.split(_ROWS_AT_ONCE), scale.split(_ROWS_AT_ONCE), strict=True):
        fitted = _move_groups(codes, scales, E5M2_LIMITS)
        moved = power_of_two(fitted.scale.int() - scales.int()).unsqueeze(-1)  # octaves by which each group's scale rose
        now, before = (
            decode_e2m1(unpack_nibbles(data), torch.float64).unflatten(-1, (-1, layout.MXFP4_GROUP))
            for data in (fitted.weight, codes)
        )
        num_values += int((now * moved != before).sum())
        largest_base = max(largest_base, int(fitted.base.max()))
    return Rounding(num_values, largest_base)
