"""One expert layer behind stock SGLang's own weight updater and scheduler calls, as a server has them."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import stock
import torch

from hopper_moe.quantization.errors import Refusal

Tensors = dict[str, torch.Tensor]


class OneLayer(torch.nn.Module):
    """What a model is to SGLang's updaters; tensors are loaded by a pool of threads, as SGLang's DeepSeek-V4 does."""

    def __init__(self, experts: Any, threads: int = 1) -> None:
        super().__init__()
        self.experts, self._threads = experts, threads

    def load_weights(self, named: Any) -> None:
        with ThreadPoolExecutor(self._threads) as pool:
            for done in [pool.submit(stock.load, self.experts, {name: tensor}) for name, tensor in named]:
                done.result()


def updater(model: torch.nn.Module, config: Any = None) -> Any:
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    return WeightUpdater(
        tp_rank=0,
        device="cpu",
        gpu_id=0,
        model_config=config,
        custom_weight_loaders={},
        get_model=lambda: model,
        update_model_fields=lambda *_args, **_kwargs: None,
        recapture_cuda_graph=lambda: None,
        get_model_runner=lambda: None,
    )


class Server:
    """SGLang's scheduler calls for one layer. Groups must be joined. Every call returns `(success, message)`."""

    def __init__(self, experts: Any, threads: int = 1, config: Any = None, saver: Any = None) -> None:
        from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
        from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

        self.experts, self.model = experts, OneLayer(experts, threads)
        self._sent: dict[bytes, Any] = {}  # a trainer sends handles of GPU memory, which a CPU has not
        runner = SimpleNamespace(model=self.model, weight_updater=updater(self.model, config))
        worker = SimpleNamespace(
            model_runner=runner,
            weight_update_runners=lambda: [("target", runner)],
            deserialize_own_rank=lambda given: self._sent.pop(given[0]),
        )
        self.manager = SchedulerWeightUpdaterManager(
            tp_worker=worker,
            draft_worker=None,
            memory_saver_adapter=saver or TorchMemorySaverAdapter.create(enable=False),
            flush_cache=lambda **_kwargs: True,
            is_fully_idle=lambda **_kwargs: True,
            scheduler=SimpleNamespace(
                record_weight_version_change=lambda new_version: None, disaggregation_mode=None, _engine_paused=True
            ),
        )

    def call(self, name: str, request: str, **arguments: Any) -> tuple[bool, str]:
        from sglang.srt.managers import io_struct

        output = getattr(self.manager, name)(getattr(io_struct, request)(**arguments))
        return output.success, output.message

    def begin(self) -> tuple[bool, str]:
        return self.call("begin_weight_update", "BeginWeightUpdateReqInput")

    def end(self) -> tuple[bool, str]:
        return self.call("end_weight_update", "EndWeightUpdateReqInput")

    def send(self, tensors: Tensors, bucket: bool = False) -> tuple[bool, str]:
        """`update_weights_from_tensor`; `bucket`: as one flattened tensor."""
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

        given: Any = list(tensors.items())
        if bucket:
            flat = FlattenedTensorBucket(named_tensors=given)
            given = {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}
        self._sent[b"handle"] = given
        return self.call(
            "update_weights_from_tensor",
            "UpdateWeightsFromTensorReqInput",
            serialized_named_tensors=[b"handle"],
            load_format="flattened_bucket" if bucket else None,
        )

    def refresh(self, *parts: Tensors, bucket: bool = False) -> tuple[bool, str]:
        """A whole session; the answer of its end, or of the first call that fails."""
        self.begin()
        answers = [self.send(part, bucket) for part in parts]
        answers.append(self.end())
        return next((answer for answer in answers if not answer[0]), answers[-1])

    @property
    def reason(self) -> str | None:
        """Why the layer is not served, as the layer's next call says it."""
        try:
            self.experts.quant_method.refresh.require_whole()
        except Refusal as refusal:
            for call in (self.experts.quant_method.apply, self.experts.quant_method.run_mega):
                assert _refusal(call, self.experts) == str(refusal)
            return str(refusal)
        return None


def _refusal(call: Any, experts: Any) -> str:
    try:
        if call.__name__ == "apply":
            call(experts, None)
        else:
            call(experts, None, None, None, hidden_size=0, intermediate_size=0, top_k=0, num_tokens=0)
    except Refusal as refusal:
        return str(refusal)
    return "served"


def loaded(tensors: Tensors, **changes: Any) -> Any:
    """A layer that was loaded and packed from these tensors."""
    experts = stock.fused_moe(**changes)
    stock.load(experts, tensors)
    experts.quant_method.process_weights_after_loading(experts)
    return experts


def contents(experts: Any) -> dict[str, torch.Tensor]:
    """A copy of what the kernel reads."""
    held = experts.quant_method.refresh._experts
    return {field.name: getattr(held, field.name).view(torch.uint8).clone() for field in fields(held)}


def pointers(experts: Any) -> dict[str, int]:
    held = experts.quant_method.refresh._experts
    return {name: parameter.data_ptr() for name, parameter in experts.named_parameters()} | {
        f"kernel's {field.name}": getattr(held, field.name).data_ptr() for field in fields(held)
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def changed_experts(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[int]:
    """Local ids of the experts whose bytes differ."""
    count = next(iter(one.values())).shape[0]
    return [e for e in range(count) if not all(torch.equal(one[name][e], other[name][e]) for name in one)]


def shuffled(tensors: Tensors, seed: int) -> Tensors:
    items = list(tensors.items())
    random.Random(seed).shuffle(items)
    return dict(items)


def in_buckets(tensors: Tensors, size: int) -> list[Tensors]:
    items = list(tensors.items())
    return [dict(items[start : start + size]) for start in range(0, len(items), size)]


def weights_then_scales(tensors: Tensors) -> list[Tensors]:
    return [{n: t for n, t in tensors.items() if n.endswith(part)} for part in ("weight", "scale")]
