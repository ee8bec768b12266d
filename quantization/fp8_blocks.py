"""MXFP4 matrices as 128 x 128 block-scaled E4M3, the format of DeepSeek-V3 checkpoints and of DeepGEMM: twice the bytes."""

from __future__ import annotations

import torch

from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import as_bytes, decode_e2m1, power_of_two, unpack_nibbles
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.row_scales import exact_scales

_HEADROOM = 6  # 6 * 2**6 = 384 is the largest E2M1 value times a power of two that E4M3 (448) holds
_MOST_RISES = 3  # octaves that a group's own scale may be above the scale that a block's values need (from .5 to 4)
_TOO_SMALL = -100  # powers of two


def expand_mxfp4(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One matrix, exactly: (float8_e4m3fn [N, K], float32 [N/128, K/128], powers of two).

    weight: int8 or uint8 [N, K/2]; scale: uint8 or float8_e8m0fnu [N, K/32]. The scale of a block is the largest that its values
    need, not the largest scale byte: all-zero groups are ignored, and groups of small codes need less. Raises Refusal for sizes
    that are not multiples of 128 and for values that E4M3 cannot represent under that scale (all fit up to 14 octaves below it).
    """
    data, scale_bytes = as_bytes(weight), as_bytes(scale)
    rows, columns = data.shape[0], 2 * data.shape[1]
    layout.check_dims(rows, columns)
    block, groups = layout.FP8_BLOCK, layout.FP8_BLOCK // layout.MXFP4_GROUP
    needed = exact_scales(data, scale_bytes)[0].view(rows // block, block, columns // block, groups).amax((1, 3))
    largest = needed - layout.UE8M0_BIAS - _HEADROOM
    relative = scale_bytes.int() - layout.UE8M0_BIAS - largest.repeat_interleave(block, 0).repeat_interleave(groups, 1)
    # Only all-zero groups exceed the upper end; values below the lower end remain too small for E4M3.
    factor = power_of_two(relative.clamp(_TOO_SMALL, _HEADROOM + _MOST_RISES), torch.float32).unsqueeze(-1)
    values = (decode_e2m1(unpack_nibbles(data)).view(rows, -1, layout.MXFP4_GROUP) * factor).view(rows, columns)
    q = values.to(torch.float8_e4m3fn)
    lost = int((q.float() != values).sum())
    if lost:
        raise Refusal(f"{lost} weights are too far below the largest of their 128 x 128 block for E4M3: keep these experts FP4.")
    return q, power_of_two(largest, torch.float32)
