"""Checkpoint MXFP4 experts <-> packed weights (`kernels/CONTRACT.md` section 3). CPU and CUDA, bit for bit, one
expert at a time.

A packed expert has as many bytes as in the checkpoint plus one base byte per row. Rows that cannot be represented exactly are
found first (`check_exact`) and refused, unless rounding is allowed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import as_bytes, dequantize_mxfp4
from hopper_moe.quantization.exactness import check_exact
from hopper_moe.quantization.row_scales import E4M3_LIMITS, E5M2_LIMITS, RowKind, ScaleLimits, fit_rows


@dataclass(frozen=True)
class PackedExperts:
    """The experts of one layer on one rank (`ExpertTensors`). Contiguous per expert; all uint8."""

    holds_every_row: ClassVar[bool] = False  # see `check_exact`
    limits: ClassVar[ScaleLimits] = E4M3_LIMITS  # of a row's scales
    library: ClassVar[str] = "mxfp4_mega"  # the compiled kernel that reads this format (kernels/jit.py)

    w13_packed: torch.Tensor  # [E, 2I/128, H/128, 2, 4352]
    w13_base: torch.Tensor  # [E, 2I], packed row order (gate and up in eights)
    w2_packed: torch.Tensor  # [E, H/128, I/128, 2, 4352]
    w2_base: torch.Tensor  # [E, H]

    def __post_init__(self) -> None:
        wanted = {
            "w13_packed": layout.w13_packed_shape(self.num_experts, self.hidden_size, self.intermediate_size),
            "w13_base": (self.num_experts, 2 * self.intermediate_size),
            "w2_packed": layout.w2_packed_shape(self.num_experts, self.hidden_size, self.intermediate_size),
            "w2_base": (self.num_experts, self.hidden_size),
        }
        for name, shape in wanted.items():
            tensor = getattr(self, name)
            if tensor.dtype is not torch.uint8 or tuple(tensor.shape) != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, not a contiguous torch.uint8 {list(shape)}: "
                    "make it with pack_experts."
                )

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The four tensors in the order of the fields."""
        return self.w13_packed, self.w13_base, self.w2_packed, self.w2_base

    @property
    def num_experts(self) -> int:
        """Experts held here (local)."""
        return self.w2_base.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w2_base.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.w13_base.shape[1] // 2

    @property
    def device(self) -> torch.device:
        return self.w2_base.device

    @property
    def num_bytes(self) -> int:
        """Bytes of the four tensors."""
        return sum(t.numel() for t in self.tensors)

    @classmethod
    def empty(cls, num_experts: int, hidden_size: int, intermediate_size: int, device: torch.device | str) -> Self:
        """Uninitialised tensors of the right shapes, to be filled with `pack_expert_into`. Refuses sizes that are no multiple of
        128.
        """
        layout.check_dims(hidden_size, intermediate_size)

        def bytes_of(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.uint8, device=device)

        return cls(
            bytes_of(*layout.w13_packed_shape(num_experts, hidden_size, intermediate_size)),
            bytes_of(num_experts, 2 * intermediate_size),
            bytes_of(*layout.w2_packed_shape(num_experts, hidden_size, intermediate_size)),
            bytes_of(num_experts, hidden_size),
        )

    def store(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> None:
        """`pack_expert_into` for this object."""
        pack_expert_into(self, expert, w13, w13_scale, w2, w2_scale)

    def holds(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> bool:
        """Whether slot `expert` unpacks to the values of these checkpoint tensors."""
        read = (unpack_w13(self, expert), unpack_w2(self, expert))
        wanted = ((w13, w13_scale), (w2, w2_scale))
        return all(
            torch.equal(dequantize_mxfp4(*got, torch.float32), dequantize_mxfp4(*given, torch.float32))
            for got, given in zip(read, wanted, strict=True)
        )


@dataclass(frozen=True)
class WidePackedExperts(PackedExperts):
    """The same layout with scales over more octaves per row, decoded by another build of the kernel."""

    limits: ClassVar[ScaleLimits] = E5M2_LIMITS
    library: ClassVar[str] = "mxfp4_wide"


def choose_format(rows: Sequence[int], *, may_round: bool = False) -> type[PackedExperts] | None:
    """The format for a layer of so many rows of every `RowKind` (`ExactnessReport.rows`, summed over all ranks that exchange
    tokens or experts); None: no format holds it, and `may_round` is False.
    """
    if rows[RowKind.BEYOND] and not may_round:
        return None
    return WidePackedExperts if rows[RowKind.WIDE] or rows[RowKind.BEYOND] else PackedExperts


def interleave_rows(intermediate_size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """int64 [2I]: for each packed row of w13 the checkpoint row in `[w1; w3]` that it holds (contract: rows in eights, gate
    first).
    """
    packed_row = torch.arange(2 * intermediate_size, device=device)
    eight = layout.GATE_UP_INTERLEAVE
    feature = packed_row // (2 * eight) * eight + packed_row % eight
    return feature + packed_row // eight % 2 * intermediate_size


# ---- one matrix


def pack_matrix(
    weight: torch.Tensor, scale: torch.Tensor, limits: ScaleLimits = E4M3_LIMITS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Checkpoint bytes of one matrix, already in packed row order -> (uint8 [N/128, K/128, 2, 4352], base uint8 [N]).

    weight: int8 or uint8 [N, K/2]; scale: uint8 or float8_e8m0fnu [N, K/32]. The caller checks exactness.
    """
    data, scale_bytes, base = fit_rows(as_bytes(weight).contiguous(), as_bytes(scale), limits)
    num_rows, num_k = data.shape[0], data.shape[1] * 2
    blocks, units_k = num_rows // layout.ROW_BLOCK, num_k // layout.UNIT_K
    packed = torch.empty(layout.packed_shape(num_rows, num_k), dtype=torch.uint8, device=data.device)
    rows = _regroup_signs(data).view(blocks, layout.UNITS_PER_BLOCK, layout.UNIT_ROWS, units_k, -1)
    packed[..., : layout.UNIT_NIBBLE_BYTES] = rows.permute(0, 3, 1, 2, 4).reshape(blocks, units_k, layout.UNITS_PER_BLOCK, -1)

    deltas = (scale_bytes - base.unsqueeze(-1)).view(blocks, layout.UNITS_PER_BLOCK, layout.UNIT_ROWS, units_k, -1)
    packed[..., layout.UNIT_NIBBLE_BYTES :] = deltas.permute(0, 3, 1, 2, 4).reshape(blocks, units_k, layout.UNITS_PER_BLOCK, -1)
    return packed, base


def unpack_matrix(packed: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack_matrix`: (uint8 [N, K/2], scale bytes uint8 [N, K/32]), rows in packed order. A row that was packed
    with other scales comes back with these: the same values in other codes.
    """
    blocks, units_k = packed.shape[:2]
    num_rows = blocks * layout.ROW_BLOCK
    units = packed.transpose(1, 2).reshape(num_rows // layout.UNIT_ROWS, units_k, layout.UNIT_BYTES)
    nibbles = units[..., : layout.UNIT_NIBBLE_BYTES].reshape(-1, units_k, layout.UNIT_ROWS, layout.UNIT_K // 2)
    weight = _restore_signs(nibbles.transpose(1, 2).reshape(num_rows, -1))

    deltas = units[..., layout.UNIT_NIBBLE_BYTES :].reshape(-1, units_k, layout.UNIT_ROWS, layout.UNIT_K // layout.MXFP4_GROUP)
    scale = deltas.transpose(1, 2).reshape(num_rows, -1) + base.unsqueeze(-1)
    return weight, scale


_SIGN_BITS = tuple((4 * j + first, 8 * j + moved) for j in range(4) for first, moved in ((3, 7), (19, 3)))
"""(bit in the checkpoint, bit in the packed format) of the signs of a 32-bit word of eight nibbles: the kernel wants those of the
first four j = 0..3 in bit 8j+7, those of the second four in bit 8j+3."""


def _regroup_signs(nibbles: torch.Tensor) -> torch.Tensor:
    """Checkpoint nibbles [N, K/2] with the sign bits of every eight moved to the kernel's positions. Magnitudes stay in place."""
    return _move_signs(nibbles, _SIGN_BITS)


def _restore_signs(nibbles: torch.Tensor) -> torch.Tensor:
    """The inverse of `_regroup_signs`."""
    return _move_signs(nibbles, [(packed, stored) for stored, packed in _SIGN_BITS])


def _move_signs(nibbles: torch.Tensor, bits: Iterable[tuple[int, int]]) -> torch.Tensor:
    word = nibbles.view(torch.int32)
    moved = word & 0x77777777
    for source, target in bits:
        moved |= ((word >> source) & 1) << target
    return moved.view(torch.uint8)


# ---- one expert, one layer


def pack_expert_into(
    packed: PackedExperts, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
) -> None:
    """Pack one expert's checkpoint tensors (no expert dim, rows `[w1; w3]`) into slot `expert`. The caller checks exactness."""
    rows = interleave_rows(packed.intermediate_size, w13.device)
    tiles, base = pack_matrix(as_bytes(w13)[rows], as_bytes(w13_scale)[rows], packed.limits)
    packed.w13_packed[expert].copy_(tiles)
    packed.w13_base[expert].copy_(base)
    tiles, base = pack_matrix(w2, w2_scale, packed.limits)
    packed.w2_packed[expert].copy_(tiles)
    packed.w2_base[expert].copy_(base)


def unpack_w13(packed: PackedExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(w13 [2I, H/2], w13_scale [2I, H/32]) of one expert, uint8, rows `[w1; w3]` as in the checkpoint."""
    rows = interleave_rows(packed.intermediate_size, packed.device)
    weight, scale = unpack_matrix(packed.w13_packed[expert], packed.w13_base[expert])
    w13, w13_scale = torch.empty_like(weight), torch.empty_like(scale)
    w13[rows], w13_scale[rows] = weight, scale
    return w13, w13_scale


def unpack_w2(packed: PackedExperts, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(w2 [H, I/2], w2_scale [H, I/32]) of one expert, uint8."""
    return unpack_matrix(packed.w2_packed[expert], packed.w2_base[expert])


def check_checkpoint_shapes(
    w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor
) -> tuple[int, int, int]:
    """(num_experts, hidden_size, intermediate_size) of a layer's checkpoint tensors. Raises ValueError if they do not
    belong together.
    """
    for name, tensor in (("w13", w13), ("w13_scale", w13_scale), ("w2", w2), ("w2_scale", w2_scale)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, not [experts, rows, columns]: stack the experts.")
        as_bytes(tensor)
    num_experts, hidden_size, intermediate_size = w13.shape[0], w13.shape[2] * 2, w13.shape[1] // 2
    group = layout.MXFP4_GROUP
    wanted = {
        "w13": (w13, (num_experts, 2 * intermediate_size, hidden_size // 2)),
        "w13_scale": (w13_scale, (num_experts, 2 * intermediate_size, hidden_size // group)),
        "w2": (w2, (num_experts, hidden_size, intermediate_size // 2)),
        "w2_scale": (w2_scale, (num_experts, hidden_size, intermediate_size // group)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, but {num_experts} experts of hidden_size {hidden_size} and "
                f"intermediate_size {intermediate_size} (read from w13) need {list(shape)}."
            )
    return num_experts, hidden_size, intermediate_size


def pack_experts(
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    experts_type: type[PackedExperts] | None = None,
    *,
    may_round: bool = False,
) -> PackedExperts:
    """Pack a layer's checkpoint tensors, which are not modified.

    Args:
        w13: int8 or uint8 [E, 2I, H/2], rows `[w1; w3]`.
        w13_scale: uint8 or float8_e8m0fnu [E, 2I, H/32].
        w2: [E, H, I/2].
        w2_scale: [E, H, I/32].
        experts_type: a format that holds every row; default: `choose_format`.
        may_round: round rows that no format represents exactly instead of refusing them.

    Raises:
        ValueError: shapes that do not belong together.
        Refusal: sizes that are not multiples of 128, NaN scales, and rows that cannot be represented exactly.
    """
    num_experts, hidden_size, intermediate_size = check_checkpoint_shapes(w13, w13_scale, w2, w2_scale)
    layout.check_dims(hidden_size, intermediate_size)
    report = check_exact(w13, w13_scale, w2, w2_scale)
    if report.has_nan or not may_round:
        report.require_exact()
    needed = choose_format(report.rows, may_round=may_round)
    assert needed is not None  # `require_exact` has refused rows that no format holds
    if experts_type is not None and not issubclass(experts_type, needed):
        raise ValueError(f"the layer has rows that {experts_type.__name__} cannot hold: pack them as {needed.__name__}")
    packed = (experts_type or needed).empty(num_experts, hidden_size, intermediate_size, w13.device)
    for expert in range(num_experts):
        pack_expert_into(packed, expert, w13[expert], w13_scale[expert], w2[expert], w2_scale[expert])
    return packed


def unpack_experts(packed: PackedExperts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `pack_experts`, bit for bit (but see `unpack_matrix`): (w13, w13_scale, w2, w2_scale), all uint8."""
    experts = [(*unpack_w13(packed, expert), *unpack_w2(packed, expert)) for expert in range(packed.num_experts)]
    if not experts:
        raise ValueError("there are 0 experts to unpack: give a layer with at least one expert on this rank.")
    w13, w13_scale, w2, w2_scale = (torch.stack(tensors) for tensors in zip(*experts, strict=True))
    return w13, w13_scale, w2, w2_scale
