"""Block-scaled FP8 experts <-> packed weights in swizzled units (`kernels/CONTRACT.md` section 5). CPU and CUDA, bit for bit,
one expert at a time. Weight bytes and scales are only permuted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from hopper_moe.quantization import layout
from hopper_moe.quantization.fp8_blocks import expand_mxfp4
from hopper_moe.quantization.packing import interleave_rows

_CHUNKS = layout.UNIT_K // 16  # 16-byte chunks of a row


@dataclass(frozen=True)
class PackedFp8Experts:
    """The experts of one layer on one rank (`ExpertTensors`). Contiguous per expert."""

    holds_every_row: ClassVar[bool] = True  # FP8 as it is; FP4 is expanded exactly or refused by `store`
    library: ClassVar[str] = "fp8_mega"  # the compiled kernel that reads this format (kernels/jit.py)

    w13_packed: torch.Tensor  # uint8 [E, 2I/128, H/128, 2, 8192]
    w13_scale: torch.Tensor  # float32 [E, I/128, H/128, 4]: gate's, up's, 0, 0
    w2_packed: torch.Tensor  # uint8 [E, H/128, I/128, 2, 8192]
    w2_scale: torch.Tensor  # float32 [E, H/128, I/128, 4]: the block's twice, 0, 0

    def __post_init__(self) -> None:
        shapes = _shapes(self.num_experts, self.hidden_size, self.intermediate_size)
        for (name, (dtype, shape)), tensor in zip(shapes.items(), self.tensors, strict=True):
            if tensor.dtype is not dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, not a contiguous {dtype} {list(shape)}: "
                    "make it with pack_fp8_experts."
                )

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The four tensors in the order of the fields."""
        return self.w13_packed, self.w13_scale, self.w2_packed, self.w2_scale

    @property
    def num_experts(self) -> int:
        """Experts held here (local)."""
        return self.w2_scale.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w2_scale.shape[1] * layout.FP8_BLOCK

    @property
    def intermediate_size(self) -> int:
        return self.w13_scale.shape[1] * layout.FP8_BLOCK

    @property
    def device(self) -> torch.device:
        return self.w2_scale.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the four tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)

    @classmethod
    def empty(cls, num_experts: int, hidden_size: int, intermediate_size: int, device: torch.device | str) -> PackedFp8Experts:
        """Uninitialised tensors of the right shapes, to be filled with `store`. Refuses sizes that are no multiple
        of 128.
        """
        layout.check_dims(hidden_size, intermediate_size)
        shapes = _shapes(num_experts, hidden_size, intermediate_size).values()
        return cls(*(torch.empty(shape, dtype=dtype, device=device) for dtype, shape in shapes))

    def store(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> None:
        """Pack one expert's checkpoint tensors (no expert dim, rows `[w1; w3]`) into slot `expert`: FP8 with FP32 block
        scales, or FP4, which is expanded. Raises Refusal for FP4 values that E4M3 cannot represent exactly
        (`fp8_blocks.expand_mxfp4`).
        """
        w13, w13_scale, w2, w2_scale = _as_fp8(w13, w13_scale, w2, w2_scale)
        rows = interleave_rows(self.intermediate_size, w13.device)
        self.w13_packed[expert].copy_(pack_fp8_matrix(w13.view(torch.uint8)[rows].view(torch.float8_e4m3fn)))
        self.w2_packed[expert].copy_(pack_fp8_matrix(w2))
        gate, up = w13_scale.chunk(2)
        for scale, low, high in ((self.w13_scale[expert], gate, up), (self.w2_scale[expert], w2_scale, w2_scale)):
            scale.zero_()
            scale[..., 0], scale[..., 1] = low, high

    def holds(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> bool:
        """Whether slot `expert` unpacks to these tensors bit for bit; of FP4 ones, to what they expand to."""
        read = (*unpack_fp8_w13(self, expert), *unpack_fp8_w2(self, expert))
        wanted = _as_fp8(w13, w13_scale, w2, w2_scale)
        return all(torch.equal(got.view(torch.uint8), given.view(torch.uint8)) for got, given in zip(read, wanted, strict=True))


def _as_fp8(
    w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One expert as FP8; FP4 is expanded."""
    if w13.dtype is torch.float8_e4m3fn:
        return w13, w13_scale, w2, w2_scale
    return (*expand_mxfp4(w13, w13_scale), *expand_mxfp4(w2, w2_scale))


def _shapes(num_experts: int, hidden_size: int, intermediate_size: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    h, i = hidden_size // layout.FP8_BLOCK, intermediate_size // layout.FP8_BLOCK
    return {
        "w13_packed": (torch.uint8, (num_experts, 2 * i, h, layout.UNITS_PER_BLOCK, layout.FP8_UNIT_BYTES)),
        "w13_scale": (torch.float32, (num_experts, i, h, layout.FP8_SCALES_PER_BLOCK)),
        "w2_packed": (torch.uint8, (num_experts, h, i, layout.UNITS_PER_BLOCK, layout.FP8_UNIT_BYTES)),
        "w2_scale": (torch.float32, (num_experts, h, i, layout.FP8_SCALES_PER_BLOCK)),
    }


# ---- one matrix


def pack_fp8_matrix(weight: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn [N, K], rows in packed order -> uint8 [N/128, K/128, 2, 8192]."""
    num_rows, num_k = weight.shape
    units = weight.contiguous().view(torch.uint8).view(num_rows // layout.UNIT_ROWS, layout.UNIT_ROWS, num_k // layout.UNIT_K, -1)
    blocks, units_k = num_rows // layout.ROW_BLOCK, num_k // layout.UNIT_K
    swizzled = _swizzle(units.transpose(1, 2)[..., _order(weight.device)])
    swizzled = swizzled.view(blocks, layout.UNITS_PER_BLOCK, units_k, layout.FP8_UNIT_BYTES)
    return swizzled.transpose(1, 2).contiguous()


def unpack_fp8_matrix(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_fp8_matrix`: float8_e4m3fn [N, K], rows in packed order."""
    blocks, units_k = packed.shape[:2]
    units = packed.transpose(1, 2).reshape(blocks * layout.UNITS_PER_BLOCK, units_k, layout.UNIT_ROWS, layout.UNIT_K)
    natural = _swizzle(units)[..., _order(packed.device).argsort()]
    return natural.transpose(1, 2).reshape(blocks * layout.ROW_BLOCK, -1).view(torch.float8_e4m3fn)


def _order(device: torch.device) -> torch.Tensor:
    """int64 [128]: the k at every position of a row."""
    return torch.tensor([layout.wgmma_position(k) for k in range(layout.UNIT_K)], device=device).argsort()


def _swizzle(units: torch.Tensor) -> torch.Tensor:
    """Exchange 16-byte chunk c of row r with chunk c ^ r % 8 in every unit [.., 64, 128]; its own inverse."""
    chunks = units.reshape(*units.shape[:-1], _CHUNKS, -1)
    rows = torch.arange(layout.UNIT_ROWS, device=units.device)[:, None]
    return chunks[..., rows, torch.arange(_CHUNKS, device=units.device) ^ rows % _CHUNKS, :].reshape(units.shape)


# ---- one expert, one layer


def unpack_fp8_w13(packed: PackedFp8Experts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(w13 float8_e4m3fn [2I, H], w13_scale FP32 [2I/128, H/128]) of one expert, rows `[w1; w3]` as in the checkpoint."""
    w13 = torch.empty(2 * packed.intermediate_size, packed.hidden_size, dtype=torch.uint8, device=packed.device)
    w13[interleave_rows(packed.intermediate_size, packed.device)] = unpack_fp8_matrix(packed.w13_packed[expert]).view(torch.uint8)
    scale = packed.w13_scale[expert]
    return w13.view(torch.float8_e4m3fn), torch.cat((scale[..., 0], scale[..., 1]))


def unpack_fp8_w2(packed: PackedFp8Experts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(w2 float8_e4m3fn [H, I], w2_scale FP32 [H/128, I/128]) of one expert."""
    return unpack_fp8_matrix(packed.w2_packed[expert]), packed.w2_scale[expert, ..., 0].clone()


def check_fp8_shapes(
    w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
) -> tuple[int, int, int]:
    """(num_experts, hidden_size, intermediate_size) of a layer's checkpoint tensors. Raises ValueError if types or shapes do not
    belong together, `Refusal` if a size is no multiple of 128.
    """
    if w13.dim() != 3:
        raise ValueError(f"w13 has shape {list(w13.shape)}, not [experts, rows, columns]: stack the experts.")
    num_experts, hidden_size, intermediate_size = w13.shape[0], w13.shape[2], w13.shape[1] // 2
    layout.check_dims(hidden_size, intermediate_size)
    block = layout.FP8_BLOCK
    wanted = {
        "w13": (w13, torch.float8_e4m3fn, (num_experts, 2 * intermediate_size, hidden_size)),
        "w13_scale": (w13_scale, torch.float32, (num_experts, 2 * intermediate_size // block, hidden_size // block)),
        "w2": (w2, torch.float8_e4m3fn, (num_experts, hidden_size, intermediate_size)),
        "w2_scale": (w2_scale, torch.float32, (num_experts, hidden_size // block, intermediate_size // block)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype is not dtype or tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, but {num_experts} FP8 experts of hidden_size {hidden_size} and "
                f"intermediate_size {intermediate_size} (read from w13) need {dtype} {list(shape)}."
            )
    return num_experts, hidden_size, intermediate_size


def pack_fp8_experts(w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> PackedFp8Experts:
    """Pack a layer's checkpoint tensors, which are not modified.

    w13 float8_e4m3fn [E, 2I, H] (rows `[w1; w3]`), w13_scale FP32 [E, 2I/128, H/128], w2 float8_e4m3fn [E, H, I], w2_scale FP32
    [E, H/128, I/128]. Raises as `check_fp8_shapes`.
    """
    packed = PackedFp8Experts.empty(*check_fp8_shapes(w13, w13_scale, w2, w2_scale), w13.device)
    for expert in range(packed.num_experts):
        packed.store(expert, w13[expert], w13_scale[expert], w2[expert], w2_scale[expert])
    return packed
