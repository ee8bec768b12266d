"""New weights for experts that are packed already: each expert is staged, checked, and stored over the old one.

The storage stays where it is, so pointers in CUDA graphs and EPLB's list of parameters stay valid. What arrives between two calls
of SGLang's `process_weights_after_loading` is one refresh. It brings all experts of a layer that this rank holds, or none. From
its first tensor to its end, and after a failure until a whole refresh, the layer is not served.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.layer_backend import CheckpointExperts
from hopper_moe.quantization.sglang_checks import CHECKPOINT_PARAMETERS, EXPERT_TENSORS, Arrival, TensorCheck

if TYPE_CHECKING:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    from hopper_moe.quantization.expert_tensors import ExpertTensors

StagingShapes = dict[str, tuple[tuple[int, ...], torch.dtype, dict[str, Any]]]


def staging_shapes(layer: FusedMoE) -> StagingShapes:
    """Of one expert's checkpoint parameters: shape on this rank, dtype, and what SGLang's loader reads from a parameter. Taken
    before the layer is packed."""
    found = {name: getattr(layer, name) for name in CHECKPOINT_PARAMETERS}
    return {
        name: (tuple(param.shape[1:]), param.dtype, {key: value for key, value in vars(param).items() if key != "weight_loader"})
        for name, param in found.items()
    }


class RefreshLedger:
    """Wraps the `_weight_loader_impl` of a packed layer.

    Args:
        layer: FusedMoE whose four checkpoint parameters exist by name.
        check: of this layer.
        shapes: `staging_shapes`.
        experts: what the kernel reads, changed in place.
        require_fit: `LayerBackend.require_fit`.
    """

    def __init__(
        self,
        layer: FusedMoE,
        check: TensorCheck,
        shapes: StagingShapes,
        experts: ExpertTensors | CheckpointExperts,
        require_fit: Callable[[CheckpointExperts, str], bool],
    ) -> None:
        self._num_experts, self._check, self._shapes = layer.num_local_experts, check, shapes
        self._experts, self._require_fit = experts, require_fit
        self._device = getattr(experts, fields(experts)[0].name).device
        self._lock = threading.Lock()  # SGLang loads from a thread pool
        self._reason: str | None = None  # why the layer is not served
        self.begin()
        self._copy = layer._weight_loader_impl
        layer._weight_loader_impl = self.load
        for name in CHECKPOINT_PARAMETERS:
            getattr(layer, name).weight_loader = layer.weight_loader

    def begin(self) -> None:
        """Forget a refresh that was not ended. What it stored stays, and so does the reason why the layer is not served."""
        self._arrived: set[tuple[str, str, int]] = set()
        self._staged: dict[int, dict[str, torch.nn.Parameter]] = {}
        self._stored: set[int] = set()
        self._is_open = self._is_compared = self._has_failed = False

    def load(
        self, param: torch.nn.Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int
    ) -> None:
        """Stage one tensor of local expert `expert_id`; store the expert if it was the last of the six.

        Raises `Refusal` naming tensor or expert; neither it nor the expert is stored then, and the layer is not served.
        """
        with self._lock:
            self._is_open = True
            self._reason = self._reason or f"{self._check.prefix}: its weights are being updated, which has not ended"
        try:
            arrivals = self._check.checked_or_rounded(param, loaded_weight, weight_name, shard_id, expert_id)
            with self._lock:
                for arrival in arrivals:
                    self._stage(arrival)
                if all((*tensor, expert_id) in self._arrived for tensor in EXPERT_TENSORS):
                    self._store(expert_id)
        except Refusal as refusal:
            with self._lock:
                self._has_failed = True
                self._reason = f"{self._check.prefix}: an update of its weights failed ({str(refusal).rstrip('.')})"
            raise

    def _stage(self, arrival: Arrival) -> None:
        if arrival.key in self._arrived:
            raise Refusal(f"{arrival.name} came twice in one weight update: send each tensor once, or begin another update.")
        staged = self._staged.setdefault(arrival.expert, {})
        if arrival.parameter not in staged:
            shape, dtype, attributes = self._shapes[arrival.parameter]
            target = torch.nn.Parameter(torch.empty((1, *shape), dtype=dtype, device=self._device), requires_grad=False)
            vars(target).update(attributes)
            staged[arrival.parameter] = target
        self._copy(  # SGLang's own loader cuts this rank's slice
            param=staged[arrival.parameter],
            loaded_weight=arrival.data,
            weight_name=arrival.parameter,
            shard_id=arrival.shard,
            expert_id=0,
        )
        self._arrived.add(arrival.key)

    def _store(self, expert: int) -> None:
        staged = self._staged.pop(expert)
        given = CheckpointExperts(*(staged[name].data for name in CHECKPOINT_PARAMETERS))
        name = self._check.expert_name(expert)
        is_exact = self._require_fit(given, name)
        tensors = tuple(tensor[0] for tensor in given.tensors)
        try:
            self._experts.store(expert, *tensors)
        except Refusal as refusal:
            raise Refusal(f"{name}: {refusal}") from None
        self._stored.add(expert)
        if is_exact and not self._is_compared:
            self._is_compared = True  # one expert of each layer and refresh: unpacking takes longer than packing
            if not self._experts.holds(expert, *tensors):
                raise Refusal(f"{name} reads back other values than were sent: this machine computes something else, restart it.")

    def end(self) -> None:
        """All tensors were sent: the layer is served again if every expert was stored and none refused. Without a tensor nothing
        changes.

        Raises `Refusal` naming what was refused, or an expert that came in part or not at all.
        """
        if not self._is_open:
            return
        missing = self._missing()
        if not self._has_failed:
            ended = f"{self._check.prefix}: an update of its weights ended in the middle ({missing})"
            self._reason = None if missing is None else ended
        self.begin()
        self.require_whole()

    def _missing(self) -> str | None:
        """What has not come in this refresh; None: nothing."""
        parts = [(*tensor, expert) for expert in sorted(self._staged) for tensor in EXPERT_TENSORS]
        parts = [key for key in parts if key not in self._arrived]
        if parts:
            return f"{self._check.name(*parts[0])} did not come, {len(parts)} tensors of {len(self._staged)} experts are missing"
        absent = [expert for expert in range(self._num_experts) if expert not in self._stored]
        if absent:
            name = self._check.expert_name(absent[0])
            return f"{name} did not come, {len(absent)} of {self._num_experts} experts of this rank are missing"
        return None

    def lose(self) -> None:
        """The memory of the weights was released and its contents are gone."""
        self.begin()
        self._reason = f"{self._check.prefix}: its weights were released from memory"

    def require_whole(self) -> None:
        """Raises `Refusal` unless every expert is of one checkpoint."""
        if self._reason is not None:
            raise Refusal(f"{self._reason}; it is served again after one weight update that brings every expert.")
