"""What may be stored in an expert: every tensor that SGLang's loader brings is checked first, at the first load and at a refresh.

Tensors that would be stored wrongly are refused: `Tensor.copy_` converts a uint8 scale to a *number* when the parameter is
float8_e8m0fnu.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import quantize_mxfp4
from hopper_moe.quantization.errors import Refusal

if TYPE_CHECKING:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

WEIGHTS = ("w13_weight", "w2_weight")
SCALES = ("w13_weight_scale_inv", "w2_weight_scale_inv")
CHECKPOINT_PARAMETERS = (WEIGHTS[0], SCALES[0], WEIGHTS[1], SCALES[1])
SHARDS = {"w13_weight": ("w1", "w3"), "w2_weight": ("w2",), "w13_weight_scale_inv": ("w1", "w3"), "w2_weight_scale_inv": ("w2",)}
EXPERT_TENSORS = tuple((parameter, shard) for parameter in CHECKPOINT_PARAMETERS for shard in SHARDS[parameter])
"""The six tensors of one expert."""

_SCALE_OF = dict(zip(WEIGHTS, SCALES, strict=True))
_PACKED_E2M1 = (torch.int8, torch.uint8) + ((torch.float4_e2m1fn_x2,) if hasattr(torch, "float4_e2m1fn_x2") else ())


@dataclass(frozen=True)
class CheckpointShape:
    """Sizes of one expert in the checkpoint, before tensor parallelism."""

    hidden_size: int
    intermediate_size: int
    is_fp4: bool

    def of(self, shard: str, is_scale: bool) -> tuple[int, int]:
        """Shape of one stored tensor. FP4: two E2M1 values a byte, a scale per 32 values. FP8: a scale per 128 x 128 values."""
        rows, values = (self.hidden_size, self.intermediate_size) if shard == "w2" else (self.intermediate_size, self.hidden_size)
        if self.is_fp4:
            return rows, values // (layout.MXFP4_GROUP if is_scale else 2)
        return (-(-rows // layout.FP8_BLOCK), -(-values // layout.FP8_BLOCK)) if is_scale else (rows, values)


class Arrival(NamedTuple):
    """One checked tensor of a local expert, before tensor parallelism."""

    parameter: str  # of CHECKPOINT_PARAMETERS
    shard: str  # w1, w2 or w3
    expert: int  # local
    name: str  # in messages
    data: torch.Tensor  # in the parameter's type

    @property
    def key(self) -> tuple[str, str, int]:
        return self.parameter, self.shard, self.expert


class TensorCheck:
    """Checks the tensors of one layer's experts.

    Args:
        layer: FusedMoE with the four checkpoint parameters created.
        prefix: the layer's name in messages.
        first_expert: global id of local expert 0.
    """

    def __init__(self, layer: FusedMoE, prefix: str, first_expert: int) -> None:
        self._layer, self.prefix, self._first = layer, prefix, first_expert
        self._shape = CheckpointShape(
            layer.hidden_size, layer.intermediate_size_per_partition * layer.moe_tp_size, layer.w13_weight.dtype is torch.int8
        )

    def checked(
        self, param: torch.nn.Parameter, tensor: torch.Tensor, weight_name: str, shard: str, expert: int
    ) -> tuple[Arrival, ...]:
        """The tensor as it may be stored in `param`. Raises `Refusal` naming tensor, expert and value."""
        parameter = self._parameter(param, weight_name, shard)
        name, is_scale = self.name(parameter, shard, expert), parameter in SCALES
        self._require_shape(name, tensor, self._shape.of(shard, is_scale))
        if self._shape.is_fp4:
            data = _scale_bytes(name, tensor) if is_scale else _weight_bytes(name, tensor)
        else:
            data = _fp8_scales(name, tensor) if is_scale else _fp8_weights(name, tensor)
        return (Arrival(parameter, shard, expert, name, data),)

    def checked_or_rounded(
        self, param: torch.nn.Parameter, tensor: torch.Tensor, weight_name: str, shard: str, expert: int
    ) -> tuple[Arrival, ...]:
        """`checked`, but a BF16 matrix of an FP4 layer is rounded by `codecs.quantize_mxfp4`, which gives weight and scales."""
        parameter = self._parameter(param, weight_name, shard)
        if not self._shape.is_fp4 or parameter in SCALES or tensor.dtype is not torch.bfloat16:
            return self.checked(param, tensor, weight_name, shard, expert)
        name, scale = self.name(parameter, shard, expert), _SCALE_OF[parameter]
        rows, packed_columns = self._shape.of(shard, is_scale=False)
        self._require_shape(name, tensor, (rows, 2 * packed_columns))
        try:
            weight, scales = quantize_mxfp4(tensor)
        except Refusal as refusal:
            raise Refusal(f"{name}: {refusal}") from None
        return (
            Arrival(parameter, shard, expert, name, weight.view(torch.int8)),
            Arrival(scale, shard, expert, self.name(scale, shard, expert), scales.view(torch.float8_e8m0fnu)),
        )

    def expert_name(self, expert: int) -> str:
        return f"{self.prefix}.{self._first + expert}"

    def name(self, parameter: str, shard: str, expert: int) -> str:
        return f"{self.expert_name(expert)}.{shard}.{'scale' if parameter in SCALES else 'weight'}"

    def _parameter(self, param: torch.nn.Parameter, weight_name: str, shard: str) -> str:
        parameter = next((name for name in CHECKPOINT_PARAMETERS if getattr(self._layer, name) is param), None)
        if parameter is None or shard not in SHARDS[parameter]:
            raise Refusal(
                f"{self.prefix}: {weight_name} ({shard}) belongs to no expert tensor: this checkpoint is not DeepSeek-V4's."
            )
        return parameter

    @staticmethod
    def _require_shape(name: str, tensor: torch.Tensor, wanted: tuple[int, int]) -> None:
        if tuple(tensor.shape) != wanted:
            raise Refusal(
                f"{name} has shape {list(tensor.shape)}, not {list(wanted)}: the checkpoint does not fit its config.json."
            )


def _weight_bytes(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in _PACKED_E2M1:
        raise Refusal(
            f"{name} is {tensor.dtype}, not packed FP4 (int8, two values a byte): serve this checkpoint with "
            "--moe-runner-backend auto."
        )
    return tensor.view(torch.int8)


def _scale_bytes(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The scales as float8_e8m0fnu, bit for bit; wider floats only if every one is a power of two within UE8M0's range."""
    if tensor.dtype in (torch.uint8, torch.float8_e8m0fnu):
        data = tensor.view(torch.uint8)
    elif tensor.dtype in (torch.float32, torch.bfloat16):
        values = tensor.float()
        mantissa, exponent = torch.frexp(values)
        byte = exponent - 1 + layout.UE8M0_BIAS
        bad = (mantissa != 0.5) | (byte < 0) | (byte >= layout.UE8M0_NAN)
        if bool(bad.any()):
            raise Refusal(
                f"{name} holds {values[bad][0].item()}, which is no power of two between 2**-127 and 2**127: UE8M0 cannot hold "
                "it."
            )
        data = byte.to(torch.uint8)
    else:
        raise Refusal(
            f"{name} is {tensor.dtype}, not UE8M0 scales (one byte each): the checkpoint is damaged or of another format."
        )
    if bool((data == layout.UE8M0_NAN).any()):
        row, group = (data == layout.UE8M0_NAN).nonzero()[0].tolist()
        raise Refusal(
            f"{name} holds {layout.UE8M0_NAN} (NaN) at row {row}, group {group}: the checkpoint is damaged, fetch it again."
        )
    return data.view(torch.float8_e8m0fnu)


def _fp8_weights(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype is not torch.float8_e4m3fn:
        raise Refusal(f"{name} is {tensor.dtype}, not float8_e4m3fn: serve this checkpoint with --moe-runner-backend auto.")
    return tensor


def _fp8_scales(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Block scales as float32 numbers; UE8M0 is widened exactly, bytes without a type are refused."""
    if tensor.dtype not in (torch.float32, torch.float8_e8m0fnu):
        raise Refusal(
            f"{name} is {tensor.dtype}, not float32 or UE8M0 block scales: the checkpoint is damaged or of another format."
        )
    scales = tensor.float()
    if not bool(scales.isfinite().all()):
        raise Refusal(f"{name} holds {scales[~scales.isfinite()][0].item()}: the checkpoint is damaged, fetch it again.")
    return scales
