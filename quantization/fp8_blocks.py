"""MXFP4 matrices as 128 x 128 block-scaled E4M3, the format of DeepSeek-V3 checkpoints and of DeepGEMM: twice the bytes."""

from __future__ import annotations

import torch

from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import as_bytes, decode_e2m1, power_of_two, unpack_nibbles

_HEADROOM = 6  # 6 * 2**6 = 384 is the largest E2M1 value times a power of two that E4M3 (448) holds


def expand_mxfp4(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One matrix, exactly: (float8_e4m3fn [N, K], float32 [N/128, K/128], powers of two).

    weight: int8 or uint8 [N, K/2]; scale: uint8 or float8_e8m0fnu [N, K/32]. Raises Refusal for sizes that are no multiple of 128
    and for values that E4M3 cannot hold under the largest scale of their block (more than 14 octaves below it).
    """
    codes, exponents = unpack_nibbles(as_bytes(weight)), as_bytes(scale).to(torch.int32) - layout.UE8M0_BIAS
    rows, columns = codes.shape
    layout.check_dims(rows, columns)
    block, groups = layout.FP8_BLOCK, layout.FP8_BLOCK // layout.MXFP4_GROUP
    largest = exponents.view(rows // block, block, columns // block, groups).amax((1, 3)) - _HEADROOM
    relative = exponents - largest.repeat_interleave(block, 0).repeat_interleave(groups, 1)
    values = decode_e2m1(codes).view(rows, -1, layout.MXFP4_GROUP) * power_of_two(relative, torch.float32).unsqueeze(-1)
    values = values.view(rows, columns)
    q = values.to(torch.float8_e4m3fn)
    lost = int((q.float() != values).sum())
    if lost:
        raise Refusal(f"{lost} weights are too far below the largest of their 128 x 128 block for E4M3: keep these experts FP4.")
    return q, power_of_two(largest, torch.float32)
