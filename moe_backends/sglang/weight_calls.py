"""The scheduler's calls that change or lose weights: what our layers refuse becomes the call's answer, on every rank alike.

In stock SGLang an exception of `update_weights_from_tensor`, `_from_disk` or `end_weight_update` leaves the scheduler and ends
the server, `update_weights_from_ipc` hides it, and only rank 0's answer is sent. A launch without layers of ours is left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.expert_tensors import MARK

if TYPE_CHECKING:
    from hopper_moe.quantization.sglang_refresh import RefreshLedger

MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
END, IPC, RESUME = "end_weight_update", "update_weights_from_ipc", "resume_memory_occupation"
CALLS = {  # name -> class of its answer in SGLang's io_struct
    "update_weights_from_disk": "UpdateWeightFromDiskReqOutput",
    "update_weights_from_tensor": "UpdateWeightsFromTensorReqOutput",
    "update_weights_from_distributed": "UpdateWeightsFromDistributedReqOutput",
    IPC: "UpdateWeightsFromIPCReqOutput",
    END: "EndWeightUpdateReqOutput",
}
IPC_WITH_DRAFT = (
    "update_weights_from_ipc would wait for ever: SGLang asks the sender again for the speculative draft, and checkpoint-engine "
    "sends once. Use update_weights_from_tensor or update_weights_from_disk, or serve without a draft."
)
_WITH_BARRIER = (END, "update_weights_from_tensor")  # calls that all ranks leave together


def answer(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Call `original`; `success` is False with the first sentence of any rank that refused. Collective over the TP ranks."""
    ledgers = list(_ledgers(manager))
    if not ledgers:
        return original(manager, request)
    name = original.__name__
    if name == IPC:  # opens no session
        if len(manager._select_runners("all")) > 1:
            return _output(name)(success=False, message=IPC_WITH_DRAFT)
        for ledger in ledgers:
            ledger.begin()
    try:
        result = original(manager, request)
        sentence = None if result.success else result.message
        if name == IPC and sentence is None:
            _require_whole(ledgers)
    except Refusal as refusal:
        sentence, result = str(refusal), None
        if name in _WITH_BARRIER:
            dist.barrier(group=manager.tp_cpu_group)
        if name == END:
            manager._session = None
    sentences: list[str | None] = [None] * dist.get_world_size(group=manager.tp_cpu_group)
    dist.all_gather_object(sentences, sentence, group=manager.tp_cpu_group)
    refused = next((found for found in sentences if found is not None), None)
    return result if refused is None else _output(name)(success=False, message=refused)


def resume(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Call `original`; layers whose weights were not backed up are not served until they are refreshed."""
    from sglang.srt.constants import GPU_MEMORY_TYPE_WEIGHTS
    from sglang.srt.runtime_context import get_exec

    result = original(manager, request)
    if request.tags and GPU_MEMORY_TYPE_WEIGHTS not in request.tags:
        return result
    features = get_exec().features
    if not manager.memory_saver_adapter.enabled or features.enable_weights_cpu_backup:
        return result
    for ledger in _ledgers(manager, "target" if features.enable_draft_weights_cpu_backup else "all"):
        ledger.lose()
    return result


def _ledgers(manager: Any, selector: str = "all") -> Iterator[RefreshLedger]:
    for _, runner in manager._select_runners(selector):
        for module in runner.model.modules():
            if getattr(module, MARK, False):
                yield module.quant_method.refresh


def _require_whole(ledgers: list[RefreshLedger]) -> None:
    for ledger in ledgers:
        ledger.require_whole()


@functools.cache
def _output(name: str) -> Any:
    from sglang.srt.managers import io_struct

    return getattr(io_struct, CALLS[name])
