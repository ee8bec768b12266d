"""From SGLang's checkpoint loader to packed parameters: what is loaded is checked as it comes, counted, then packed in place.

SGLang's own loader decides which expert belongs to this rank (EP, TP and EPLB) and cuts the slice; we see every tensor it is
about to store, and refuse what it would store wrongly: `Tensor.copy_` turns a uint8 scale into a *number* when the parameter is
float8_e8m0fnu.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields

import torch

from hopper_moe.moe_backends.base import ExpertTensors
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.quantization import layout
from hopper_moe.quantization.packing import PackedExperts

WEIGHTS = ("w13_weight", "w2_weight")
SCALES = ("w13_weight_scale_inv", "w2_weight_scale_inv")
CHECKPOINT_PARAMETERS = (WEIGHTS[0], SCALES[0], WEIGHTS[1], SCALES[1])
PACKED_PARAMETERS = tuple(field.name for field in fields(PackedExperts))

_SHARDS = {"w13_weight": ("w1", "w3"), "w2_weight": ("w2",), "w13_weight_scale_inv": ("w1", "w3"), "w2_weight_scale_inv": ("w2",)}
_PACKED_E2M1 = (torch.int8, torch.uint8) + ((torch.float4_e2m1fn_x2,) if hasattr(torch, "float4_e2m1fn_x2") else ())


@dataclass(frozen=True)
class CheckpointShape:
    """Sizes of one expert in the checkpoint: before tensor parallelism divides them."""

    hidden_size: int
    intermediate_size: int
    is_fp4: bool

    def of(self, shard: str, is_scale: bool) -> tuple[int, int]:
        """Shape of one stored tensor. FP4: two E2M1 values a byte, a scale per 32 values. FP8: a scale per 128 x 128 values."""
        rows, values = (self.hidden_size, self.intermediate_size) if shard == "w2" else (self.intermediate_size, self.hidden_size)
        if self.is_fp4:
            return rows, values // (layout.MXFP4_GROUP if is_scale else 2)
        return (-(-rows // layout.FP8_BLOCK), -(-values // layout.FP8_BLOCK)) if is_scale else (rows, values)


class LoadLedger:
    """Stands before a layer's `_weight_loader_impl`, the last step of every load, and keeps the books.

    Args:
        layer: FusedMoE with the four checkpoint parameters created.
        prefix: the layer's name in messages.
        first_expert: global id of local expert 0.
    """

    def __init__(self, layer: torch.nn.Module, prefix: str, first_expert: int) -> None:
        self._layer, self._prefix, self._first = layer, prefix, first_expert
        self._shape = CheckpointShape(
            layer.hidden_size, layer.intermediate_size_per_partition * layer.moe_tp_size, layer.w13_weight.dtype is torch.int8
        )
        self._loaded: set[tuple[str, str, int]] = set()
        self._lock = threading.Lock()  # SGLang loads from a thread pool
        self._store = layer._weight_loader_impl
        layer._weight_loader_impl = self.load

    def load(
        self, param: torch.nn.Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int
    ) -> None:
        """Check one tensor of local expert `expert_id`, note it, and store it as SGLang would.

        Raises `Refusal` naming tensor, expert and value.
        """
        parameter = next((name for name in CHECKPOINT_PARAMETERS if getattr(self._layer, name) is param), None)
        if parameter is None or shard_id not in _SHARDS[parameter]:
            raise Refusal(
                f"{self._prefix}: {weight_name} ({shard_id}) belongs to no expert tensor: this checkpoint is not DeepSeek-V4's."
            )
        name = self._name(parameter, shard_id, expert_id)
        is_scale = parameter in SCALES
        wanted = self._shape.of(shard_id, is_scale)
        if tuple(loaded_weight.shape) != wanted:
            raise Refusal(
                f"{name} has shape {list(loaded_weight.shape)}, not {list(wanted)}: the checkpoint does not fit its config.json."
            )
        if self._shape.is_fp4:
            data = _scale_bytes(name, loaded_weight) if is_scale else _weight_bytes(name, loaded_weight)
        else:
            data = _fp8_scales(name, loaded_weight) if is_scale else _fp8_weights(name, loaded_weight)
        with self._lock:
            if (parameter, shard_id, expert_id) in self._loaded:
                raise Refusal(f"{name} is in the checkpoint twice: remove one of the two files that hold it.")
            self._loaded.add((parameter, shard_id, expert_id))
        self._store(param=param, loaded_weight=data, weight_name=weight_name, shard_id=shard_id, expert_id=expert_id)

    def require_complete(self) -> None:
        """Raises `Refusal` naming the first tensor that no file held, and how many are missing."""
        every = [(p, s, e) for e in range(self._layer.num_local_experts) for p in CHECKPOINT_PARAMETERS for s in _SHARDS[p]]
        missing = [key for key in every if key not in self._loaded]
        if missing:
            raise Refusal(
                f"{self._name(*missing[0])} is not in the checkpoint ({len(missing)} of {len(every)} expert tensors of this "
                "rank are missing): "
                "fetch the checkpoint again."
            )

    def close(self) -> None:
        """Take the ledger out of the loader's way."""
        del self._layer._weight_loader_impl

    def _name(self, parameter: str, shard: str, expert: int) -> str:
        return f"{self._prefix}.{self._first + expert}.{shard}.{'scale' if parameter in SCALES else 'weight'}"


def _weight_bytes(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dtype not in _PACKED_E2M1:
        raise Refusal(
            f"{name} is {tensor.dtype}, not packed FP4 (int8, two values a byte): serve this checkpoint with "
            "--moe-runner-backend auto."
        )
    return tensor.view(torch.int8)


def _scale_bytes(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The scales as float8_e8m0fnu, bit for bit; wider floats only if every one is a power of two that the byte can hold."""
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


# ---- packing


def pack_layer(layer: torch.nn.Module, experts_type: type[ExpertTensors] = PackedExperts) -> ExpertTensors:
    """Convert the layer's checkpoint parameters expert by expert, register the new ones, free the originals.

    Every tensor of `experts_type` becomes a Parameter with dim 0 = local expert, because that is what SGLang's EPLB moves.
    Exactness is the caller's to check. At the peak the layer exists twice, no other layer does.
    """
    w13, w13_scale, w2, w2_scale = (getattr(layer, name).data for name in CHECKPOINT_PARAMETERS)
    packed = experts_type.empty(layer.num_local_experts, w2.shape[1], w13.shape[1] // 2, w13.device)
    for expert in range(layer.num_local_experts):
        packed.store(expert, w13[expert], w13_scale[expert], w2[expert], w2_scale[expert])
    for field in fields(experts_type):
        layer.register_parameter(field.name, torch.nn.Parameter(getattr(packed, field.name), requires_grad=False))
    for name in CHECKPOINT_PARAMETERS:
        # Kept by name but empty: a later reload finds it and is refused, where SGLang would skip a missing name in silence.
        setattr(layer, name, torch.nn.Parameter(torch.empty(0, dtype=getattr(layer, name).dtype), requires_grad=False))
    if w13.is_cuda:
        del w13, w13_scale, w2, w2_scale
        torch.cuda.empty_cache()
    return packed


def refuse_reload(layer: torch.nn.Module, prefix: str) -> None:
    """From now on loading into the checkpoint parameters is refused: the packed copy would go stale."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise Refusal(f"{prefix}: weights cannot be reloaded into packed experts: restart the server with the new checkpoint.")

    for name in CHECKPOINT_PARAMETERS:
        getattr(layer, name).weight_loader = refuse
