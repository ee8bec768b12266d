"""Number formats in plain torch: E2M1, UE8M0, E4M3, and the quantisers of `kernels/CONTRACT.md`. CPU and CUDA, torch >= 2.8.

E2M1: bit 3 sign, magnitudes 0 .5 1 1.5 2 3 4 6; two values a byte, low nibble = even index. UE8M0: byte s is 2**(s - 127), 255 is
NaN.
"""

import torch

from hopper_moe.quantization import layout
from hopper_moe.quantization.errors import Refusal


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8. Takes int8, uint8, float8_e8m0fnu and float8_e4m3fn; raises ValueError for anything wider."""
    if tensor.dtype is torch.uint8:
        return tensor
    if tensor.element_size() != 1:
        raise ValueError(f"a tensor of {tensor.dtype} was given where bytes are needed: use int8, uint8 or float8_e8m0fnu.")
    return tensor.view(torch.uint8)


# ---- E2M1


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 code (uint8 0..15) of each value, ties to the even code, magnitudes above 6 become 6; the sign of zero is
    kept.
    """
    magnitudes = torch.tensor(layout.E2M1_VALUES, dtype=torch.float64, device=values.device)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    exact = values.abs().double()
    below = torch.bucketize(exact, middles)  # a tie goes to the lower code ...
    above = torch.bucketize(exact, middles, right=True)  # ... or to the upper one
    code = torch.where(below % 2 == 0, below, above)
    return (code + 8 * torch.signbit(values)).to(torch.uint8)


def decode_e2m1(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of E2M1 codes (0..15)."""
    magnitudes = layout.E2M1_VALUES
    table = torch.tensor(magnitudes + tuple(-v for v in magnitudes), dtype=dtype, device=codes.device)
    return table[codes.to(torch.int32)]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes [..., K] -> uint8 [..., K/2], low nibble = even k."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """int8 or uint8 [..., K/2] -> uint8 codes [..., K]."""
    data = as_bytes(packed)
    return torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)


# ---- UE8M0


def power_of_two(exponents: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """2**e of integer exponents -1022..1023, exactly (built from bits: exp2, pow and ldexp are not exact on every device)."""
    return ((exponents.to(torch.int64) + 1023) << 52).view(torch.float64).to(dtype)


def decode_ue8m0(scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """2**(s - 127) of each byte s (uint8 or float8_e8m0fnu), exactly, subnormal 2**-127 included; 255 becomes NaN."""
    data = as_bytes(scale).to(torch.int32)
    values = power_of_two(data - layout.UE8M0_BIAS)
    return torch.where(data == layout.UE8M0_NAN, torch.nan, values).to(dtype)


def ceil_exponent(values: torch.Tensor) -> torch.Tensor:
    """Smallest int32 e with 2**e >= value, for positive values; exact (frexp, no logarithm)."""
    mantissa, exponent = torch.frexp(values.double())
    return (exponent - (mantissa == 0.5).to(exponent.dtype)).to(torch.int32)


def encode_ue8m0(exponents: torch.Tensor) -> torch.Tensor:
    """Integer exponents -127..127 -> UE8M0 bytes. Raises Refusal outside that range."""
    if exponents.numel() and (int(exponents.min()) < -127 or int(exponents.max()) > 127):
        found = f"{int(exponents.min())}..{int(exponents.max())}"
        raise Refusal(f"scale exponents {found} leave the UE8M0 range -127..127: rescale the tensor first.")
    return (exponents + layout.UE8M0_BIAS).to(torch.uint8)


# ---- E4M3


def encode_e4m3(values: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn nearest to each FP32 value, ties to even; |value| must be at most 448, which the quantisers ensure."""
    return values.to(torch.float8_e4m3fn)


def quantize_activations(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quant_e4m3` of the contract: x [..., N] of any float type -> (float8_e4m3fn [..., N], FP32 scale [..., ceil(N/group)]).

    All in FP32 with IEEE rounding: amax = max(max|v|, 2**-100); scale = amax / 448; q = e4m3(v * (448 / amax)). The last group
    may be short.
    """
    num_features = x.shape[-1]
    num_groups = -(-num_features // group)
    padded = torch.nn.functional.pad(x.float(), (0, num_groups * group - num_features))
    grouped = padded.unflatten(-1, (num_groups, group))
    amax = grouped.abs().amax(-1).clamp_min(2.0**layout.AMAX_FLOOR_EXPONENT)
    # Divide by tensors: torch may turn a division by a Python number into a multiplication by its rounded inverse.
    limit = torch.full_like(amax, float(layout.E4M3_MAX))
    scale = amax / limit
    q = encode_e4m3(grouped * (limit / amax).unsqueeze(-1))
    return q.flatten(-2)[..., :num_features].contiguous(), scale


def dequantize_activations(q: torch.Tensor, scale: torch.Tensor, group: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Value * scale of its group, in `dtype`. q [..., N], scale [..., ceil(N/group)]."""
    wide = scale.to(dtype).repeat_interleave(group, dim=-1)[..., : q.shape[-1]]
    return q.to(dtype) * wide


# ---- MXFP4


def dequantize_mxfp4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """packed [..., K/2] bytes, scale [..., K/32] bytes -> [..., K]; exact in FP64, FP32 and (normal range) BF16."""
    values = decode_e2m1(unpack_nibbles(packed), dtype).unflatten(-1, (-1, layout.MXFP4_GROUP))
    return (values * decode_ue8m0(scale, dtype).unsqueeze(-1)).flatten(-2)


def quantize_mxfp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [..., K] of any float type -> (uint8 [..., K/2], UE8M0 bytes uint8 [..., K/32]). Raises ValueError for K % 32 != 0 and
    `Refusal` for values that are not finite.

    Per group of 32 the exponent is ceil(log2(amax/6)) or one less, whichever gives the smaller squared error (the lower one clips
    to 6). A group of zeros takes the largest scale of its row, so that it does not widen the row's span of scales.
    """
    if w.shape[-1] % layout.MXFP4_GROUP:
        raise ValueError(f"{w.shape[-1]} columns are not a multiple of {layout.MXFP4_GROUP}, the MXFP4 group: pad the tensor.")
    if not bool(torch.isfinite(w).all()):
        raise Refusal("a weight to quantise is NaN or infinite: MXFP4 has no such value, so repair the tensor first.")
    grouped = w.double().unflatten(-1, (-1, layout.MXFP4_GROUP))
    amax = grouped.abs().amax(-1)
    no_clip = ceil_exponent(amax.clamp_min(2.0**-120) / layout.E2M1_VALUES[-1])
    codes, error = _e2m1_at(grouped, no_clip)
    lower_codes, lower_error = _e2m1_at(grouped, no_clip - 1)
    better = lower_error < error
    best_codes = torch.where(better.unsqueeze(-1), lower_codes, codes)
    exponents = torch.where(better, no_clip - 1, no_clip)
    row_max = exponents.masked_fill(amax == 0, -121).amax(-1, keepdim=True)
    exponents = torch.where(amax == 0, row_max, exponents)
    return pack_nibbles(best_codes.flatten(-2)), encode_ue8m0(exponents)


def _e2m1_at(grouped: torch.Tensor, exponent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of `grouped` [..., G, 32] at the scale 2**exponent [..., G], and the squared error of each group [..., G]."""
    step = power_of_two(exponent).unsqueeze(-1)
    codes = encode_e2m1(grouped / step)
    return codes, (decode_e2m1(codes, torch.float64) * step - grouped).square().sum(-1)


def quantize_mxfp4_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP4 dispatch: x [..., N], N % 32 == 0 -> (uint8 [..., N/2], UE8M0 bytes [..., N/32]).

    Per group of 32: exponent = ceil(log2(max(amax, 2**-100) / 6)), so nothing clips; values to nearest, ties to even.
    """
    if x.shape[-1] % layout.MXFP4_GROUP:
        raise ValueError(f"{x.shape[-1]} features are not a multiple of {layout.MXFP4_GROUP}, the FP4 group: use FP8 dispatch.")
    grouped = x.double().unflatten(-1, (-1, layout.MXFP4_GROUP))
    amax = grouped.abs().amax(-1).clamp_min(2.0**layout.AMAX_FLOOR_EXPONENT)
    exponents = ceil_exponent(amax / layout.E2M1_VALUES[-1])
    step = power_of_two(exponents).unsqueeze(-1)
    return pack_nibbles(encode_e2m1(grouped / step).flatten(-2)), encode_ue8m0(exponents)


# ---- block-scaled E4M3


def quantize_fp8_blocks(w: torch.Tensor, block: int = layout.FP8_BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """w [N, K] -> (float8_e4m3fn [N, K], UE8M0 bytes [ceil(N/block), ceil(K/block)]); exponent = ceil(log2(amax/448)), nothing
    clips.
    """
    if not bool(torch.isfinite(w).all()):
        raise Refusal("a weight to quantise is NaN or infinite: repair the tensor first.")
    num_rows, num_cols = w.shape
    padded = torch.nn.functional.pad(w.double(), (0, -num_cols % block, 0, -num_rows % block))
    tiles = padded.unflatten(0, (-1, block)).unflatten(2, (-1, block))  # [rows, block, cols, block]
    exponents = ceil_exponent(tiles.abs().amax((1, 3)).clamp_min(2.0**-110) / layout.E4M3_MAX)
    step = power_of_two(exponents)
    q = encode_e4m3((tiles / step[:, None, :, None]).float())
    return q.flatten(2).flatten(0, 1)[:num_rows, :num_cols].contiguous(), encode_ue8m0(exponents)


def dequantize_fp8_blocks(
    q: torch.Tensor, scale: torch.Tensor, block: int = layout.FP8_BLOCK, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """q float8_e4m3fn [N, K], scale FP32 or UE8M0 bytes [ceil(N/block), ceil(K/block)] -> [N, K] in `dtype`."""
    factors = scale.to(dtype) if scale.is_floating_point() and scale.element_size() > 1 else decode_ue8m0(scale, dtype)
    wide = factors.repeat_interleave(block, 0)[: q.shape[0]].repeat_interleave(block, 1)[:, : q.shape[1]]
    return q.to(dtype) * wide
