"""The expert weights that the reference computes with: one matrix of one expert at a time, dequantised when it is needed."""

from dataclasses import dataclass
from typing import Protocol

import torch

from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import as_bytes, dequantize_mxfp4
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import PackedExperts, check_checkpoint_shapes, unpack_w2, unpack_w13
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts, unpack_fp8_w2, unpack_fp8_w13


@dataclass(frozen=True)
class Matrix:
    """One expert's matrix: `values[n, k] * block_scale[n, k // 128]`."""

    values: torch.Tensor  # [N, K] in the compute type, exact
    block_scale: torch.Tensor | None = None  # [N, ceil(K/128)] in the compute type; None: the values are complete


class ExpertSource(Protocol):
    """A layer's local experts in some format. Rows of w13 are `[w1; w3]` (gate, then up)."""

    num_experts: int
    hidden_size: int
    intermediate_size: int

    def w13(self, expert: int, dtype: torch.dtype) -> Matrix: ...

    def w2(self, expert: int, dtype: torch.dtype) -> Matrix: ...


class Mxfp4Experts:
    """FP4 experts as the checkpoint has them: any span of scales, sizes in multiples of 32.

    w13 int8 or uint8 [E, 2I, H/2] (rows `[w1; w3]`), w13_scale uint8 or float8_e8m0fnu [E, 2I, H/32], w2 [E, H, I/2],
    w2_scale [E, H, I/32]. Raises ValueError for shapes or types that do not belong together, `Refusal` for NaN
    scales.
    """

    def __init__(self, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> None:
        shape = check_checkpoint_shapes(w13, w13_scale, w2, w2_scale)
        self.num_experts, self.hidden_size, self.intermediate_size = shape
        self._tensors = (w13, w13_scale, w2, w2_scale)
        for name, scale in (("w13", w13_scale), ("w2", w2_scale)):
            if bool((as_bytes(scale) == layout.UE8M0_NAN).any()):
                raise Refusal(f"{name} has a scale byte {layout.UE8M0_NAN} (NaN): the checkpoint is damaged, fetch it again.")

    def w13(self, expert: int, dtype: torch.dtype) -> Matrix:
        weight, scale = self._tensors[0][expert], self._tensors[1][expert]
        return Matrix(dequantize_mxfp4(weight, scale, dtype))

    def w2(self, expert: int, dtype: torch.dtype) -> Matrix:
        weight, scale = self._tensors[2][expert], self._tensors[3][expert]
        return Matrix(dequantize_mxfp4(weight, scale, dtype))


class Fp8BlockExperts:
    """Block-scaled E4M3 experts: one FP32 scale per 128 x 128 block.

    w13 float8_e4m3fn [E, 2I, H] (rows `[w1; w3]`), w13_scale FP32 [E, ceil(2I/128), ceil(H/128)], w2 float8_e4m3fn [E, H, I],
    w2_scale FP32 [E, ceil(H/128), ceil(I/128)]. Raises ValueError for anything else, `Refusal` for I % 128 != 0 (a block would
    mix w1 and w3).
    """

    def __init__(self, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> None:
        self.num_experts, self.hidden_size, self.intermediate_size = w2.shape
        if self.intermediate_size % layout.FP8_BLOCK:
            raise Refusal(
                f"intermediate_size {self.intermediate_size} is not a multiple of {layout.FP8_BLOCK}: "
                "a weight block would hold rows of both w1 and w3, so use another MoE backend."
            )
        rows, cols = 2 * self.intermediate_size, self.hidden_size
        for name, weight, scale, shape in (
            ("w13", w13, w13_scale, (rows, cols)),
            ("w2", w2, w2_scale, (self.hidden_size, self.intermediate_size)),
        ):
            blocks = tuple(-(-size // layout.FP8_BLOCK) for size in shape)
            if weight.dtype is not torch.float8_e4m3fn or tuple(weight.shape[1:]) != shape or weight.shape[0] != self.num_experts:
                wanted = [self.num_experts, *shape]
                raise ValueError(f"{name} is {weight.dtype} {list(weight.shape)}, not float8_e4m3fn {wanted}.")
            if scale.dtype is not torch.float32 or tuple(scale.shape) != (self.num_experts, *blocks):
                raise ValueError(f"{name}_scale is {scale.dtype} {list(scale.shape)}, not float32 {[self.num_experts, *blocks]}.")
        self._tensors = (w13, w13_scale, w2, w2_scale)

    def w13(self, expert: int, dtype: torch.dtype) -> Matrix:
        return self.matrix(self._tensors[0][expert], self._tensors[1][expert], dtype)

    def w2(self, expert: int, dtype: torch.dtype) -> Matrix:
        return self.matrix(self._tensors[2][expert], self._tensors[3][expert], dtype)

    @staticmethod
    def matrix(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> Matrix:
        """float8_e4m3fn [N, K] and FP32 [ceil(N/128), ceil(K/128)] in the compute type."""
        return Matrix(weight.to(dtype), scale.to(dtype).repeat_interleave(layout.FP8_BLOCK, 0)[: weight.shape[0]])


class PackedSource:
    """Packed experts, FP4 or FP8, read through the inverse of their packing."""

    def __init__(self, packed: PackedExperts | PackedFp8Experts) -> None:
        self._packed = packed
        self.num_experts = packed.num_experts
        self.hidden_size = packed.hidden_size
        self.intermediate_size = packed.intermediate_size

    def w13(self, expert: int, dtype: torch.dtype) -> Matrix:
        if isinstance(self._packed, PackedExperts):
            return Matrix(dequantize_mxfp4(*unpack_w13(self._packed, expert), dtype))
        return Fp8BlockExperts.matrix(*unpack_fp8_w13(self._packed, expert), dtype)

    def w2(self, expert: int, dtype: torch.dtype) -> Matrix:
        if isinstance(self._packed, PackedExperts):
            return Matrix(dequantize_mxfp4(*unpack_w2(self._packed, expert), dtype))
        return Fp8BlockExperts.matrix(*unpack_fp8_w2(self._packed, expert), dtype)


Experts = PackedExperts | PackedFp8Experts | ExpertSource  # the latter: Mxfp4Experts, Fp8BlockExperts or a source of the caller


def as_source(experts: Experts) -> ExpertSource:
    """Packed experts through their unpacking; any other source as it is."""
    return PackedSource(experts) if isinstance(experts, PackedExperts | PackedFp8Experts) else experts
