"""Random experts with the statistics of a trained layer, in a checkpoint's types: for measuring without a checkpoint.

Every matrix is drawn from a normal distribution and quantised as checkpoints are: FP4 per group of 32 to E2M1 with UE8M0 scales,
FP8 per 128 x 128 block to E4M3 with float32 scales. Tokens of RMS 1 leave an expert with RMS 1: with weights of standard
deviation 1/sqrt(H) gate and up are standard normal, silu(gate) * up has RMS `SWIGLU_RMS`, and the weights of w2 have standard
deviation 1/(SWIGLU_RMS sqrt(I)). (A swiglu_limit below about 3 clips and makes it less.)

An expert's values depend on seed, layer, expert and matrix only, so every rank that holds it, or a slice of it, holds the same
model. CPU and GPU draw different numbers.
"""

from __future__ import annotations

import hashlib

import torch

from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import encode_e4m3, pack_nibbles, power_of_two

SWIGLU_RMS = 0.5965
"""sqrt(E[silu(g)^2] E[u^2]) of standard normal g and u."""

_MIDDLES = tuple((low + high) / 2 for low, high in zip(layout.E2M1_VALUES, layout.E2M1_VALUES[1:], strict=False))


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator whose seed follows from `key`, in every process alike."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def random_matrix(
    shard: str, hidden_size: int, intermediate_size: int, is_fp4: bool, source: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, scale) of an expert's w1, w2 or w3 on the generator's device.

    FP4: int8 [N, K/2], float8_e8m0fnu [N, K/32]; K is a multiple of 32. FP8: float8_e4m3fn [N, K], float32
    [ceil(N/128), ceil(K/128)].
    """
    rows, columns = (hidden_size, intermediate_size) if shard == "w2" else (intermediate_size, hidden_size)
    std = columns**-0.5 / (SWIGLU_RMS if shard == "w2" else 1.0)
    # Named, because torch's default is BF16 while SGLang builds a model.
    values = torch.randn(rows, columns, generator=source, device=source.device, dtype=torch.float32).mul_(std)
    return _to_mxfp4(values) if is_fp4 else _to_fp8(values)


def _to_mxfp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exponent of a group is ceil(log2(amax / 6)), so nothing clips. In float32: `codecs.quantize_mxfp4` tries two exponents
    in float64, which takes too long for a whole model."""
    groups = values.view(values.shape[0], -1, layout.MXFP4_GROUP)
    _, exponents = torch.frexp(groups.abs().amax(-1) / layout.E2M1_VALUES[-1])
    steps = power_of_two(-exponents, torch.float32).unsqueeze(-1)
    middles = torch.tensor(_MIDDLES, dtype=torch.float32, device=values.device)
    codes = torch.bucketize((groups.abs() * steps), middles, out_int32=True).to(torch.uint8)
    codes += groups.signbit().to(torch.uint8) * 8
    scale = (exponents + layout.UE8M0_BIAS).to(torch.uint8)
    return pack_nibbles(codes.flatten(-2)).view(torch.int8), scale.view(torch.float8_e8m0fnu)


def _to_fp8(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = values.shape
    block = layout.FP8_BLOCK
    padded = torch.nn.functional.pad(values, (0, -columns % block, 0, -rows % block))
    tiles = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))
    scale = tiles.abs().amax((1, 3)) / layout.E4M3_MAX
    limit = float(layout.E4M3_MAX)
    codes = encode_e4m3((tiles / scale[:, None, :, None]).clamp_(-limit, limit))  # a rounded quotient may be above the limit
    return codes.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scale
