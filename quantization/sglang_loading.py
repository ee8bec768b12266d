"""From SGLang's checkpoint loader to packed parameters: tensors are checked on arrival, counted, then packed in place.

SGLang's loader decides which expert belongs to this rank (EP, TP and EPLB) and cuts the slice.
"""

from __future__ import annotations

import threading
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.expert_tensors import ExpertTensors
from hopper_moe.quantization.packing import PackedExperts
from hopper_moe.quantization.sglang_checks import CHECKPOINT_PARAMETERS, EXPERT_TENSORS, TensorCheck

if TYPE_CHECKING:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

PACKED_PARAMETERS = tuple(field.name for field in fields(PackedExperts))


class LoadLedger:
    """Wraps a layer's `_weight_loader_impl`, the last step of every load, and records which tensors have arrived.

    Args:
        layer: FusedMoE with the four checkpoint parameters created.
        check: of this layer.
    """

    def __init__(self, layer: FusedMoE, check: TensorCheck) -> None:
        self._layer, self._check = layer, check
        self._loaded: set[tuple[str, str, int]] = set()
        self._lock = threading.Lock()  # SGLang loads from a thread pool
        self._store = layer._weight_loader_impl
        layer._weight_loader_impl = self.load

    def load(
        self, param: torch.nn.Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int
    ) -> None:
        """Check one tensor of local expert `expert_id`, record it, and store it with SGLang's loader.

        Raises `Refusal` naming tensor, expert and value.
        """
        for arrival in self._check.checked(param, loaded_weight, weight_name, shard_id, expert_id):
            with self._lock:
                if arrival.key in self._loaded:
                    raise Refusal(f"{arrival.name} is in the checkpoint twice: remove one of the two files that hold it.")
                self._loaded.add(arrival.key)
            self._store(param=param, loaded_weight=arrival.data, weight_name=weight_name, shard_id=shard_id, expert_id=expert_id)

    def require_complete(self) -> None:
        """Raises `Refusal` with the name of the first missing tensor and the number of missing ones."""
        every = [(*tensor, expert) for expert in range(self._layer.num_local_experts) for tensor in EXPERT_TENSORS]
        missing = [key for key in every if key not in self._loaded]
        if missing:
            raise Refusal(
                f"{self._check.name(*missing[0])} is not in the checkpoint ({len(missing)} of {len(every)} expert tensors of "
                "this rank are missing): fetch the checkpoint again."
            )

    def close(self) -> None:
        """Remove the ledger from the loader."""
        del self._layer._weight_loader_impl


def pack_layer(layer: FusedMoE, experts_type: type[ExpertTensors] = PackedExperts) -> ExpertTensors:
    """Convert the layer's checkpoint parameters expert by expert, register the new ones, free the originals.

    Every tensor of `experts_type` becomes a Parameter with dim 0 = local expert, because that is what SGLang's EPLB moves.
    The caller checks exactness. At the peak this layer, and no other, exists twice.
    """
    w13, w13_scale, w2, w2_scale = (getattr(layer, name).data for name in CHECKPOINT_PARAMETERS)
    packed = experts_type.empty(layer.num_local_experts, w2.shape[1], w13.shape[1] // 2, w13.device)
    for expert in range(layer.num_local_experts):
        packed.store(expert, w13[expert], w13_scale[expert], w2[expert], w2_scale[expert])
    for field in fields(experts_type):
        layer.register_parameter(field.name, torch.nn.Parameter(getattr(packed, field.name), requires_grad=False))
    for name in CHECKPOINT_PARAMETERS:
        # Kept by name but empty, for a refresh: SGLang would silently skip a missing name.
        setattr(layer, name, torch.nn.Parameter(torch.empty(0, dtype=getattr(layer, name).dtype), requires_grad=False))
    if w13.is_cuda:
        del w13, w13_scale, w2, w2_scale
        torch.cuda.empty_cache()
    return packed
