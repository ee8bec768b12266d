"""Weights that a trainer broadcasts: SGLang's `update_weights_from_distributed`, in a process group with the server's ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from hopper_moe.eval.serving_bench.trainer_calls import Answer, WeightCalls, call
from hopper_moe.eval.serving_bench.trainer_tensors import Named, aligned, flattened
from hopper_moe.launch.ports import free_port
from hopper_moe.quantization.errors import Refusal

_AT_ONCE = 0.5  # seconds in which a server answers that it will not join; one that does answers only when we have joined, too
_AFTER_REFUSAL = 5.0  # seconds for a broadcast to end whose call was refused: it never does if the server did not take part


class TrainerGroup:
    """A process group of this process (rank 0) and the server's tensor-parallel ranks, both on this host.

    Args:
        url: of the server, without a path.
        ranks: its tensor-parallel ranks.
        backend: "nccl" (this process needs a GPU that the server does not use) or "gloo".
        timeout: seconds for joining, and for one broadcast.

    Raises `Refusal` if the server does not join. `close` it, or use it as a context manager.
    """

    def __init__(self, url: str, ranks: int, backend: str, timeout: float = 120.0) -> None:
        self.url, self.ranks, self._is_whole = url, ranks, True
        self._timeout, port = timedelta(seconds=timeout), free_port()
        if backend == "nccl":
            # As SGLang sets it in its own processes: NCCL cannot open the other kind of memory ("invalid argument").
            os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
        self.name = f"trainer-{port}"  # of its own: another run may use the same server
        body = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": ranks + 1}
        with ThreadPoolExecutor(1) as pool:
            answered = pool.submit(call, url, "init_weights_update_group", {**body, "group_name": self.name, "backend": backend})
            wait([answered], _AT_ONCE)
            problem = _refusal(answered) if answered.done() else None
            try:
                self._group: Any = None if problem else self._joined(backend, port)
            except RuntimeError as error:
                problem = f"this process could not join: {error}"
            problem = _refusal(answered) or problem
        if problem:
            raise Refusal(f"{url} and this process form no group of {ranks + 1} ranks over {backend} ({problem}).")

    def _joined(self, backend: str, port: int) -> Any:
        from sglang.srt.utils import init_custom_process_group

        return init_custom_process_group(
            backend=backend,
            init_method=f"tcp://127.0.0.1:{port}",
            timeout=self._timeout,
            world_size=self.ranks + 1,
            rank=0,
            group_name=self.name,
        )

    def broadcast(self, named: Sequence[Named], flat: bool, receive: Callable[[], Answer]) -> Answer:
        """Send the tensors in this order, or as one flattened uint8 tensor, while `receive` makes the call that takes them.

        Returns the call's answer, or a refusal if the broadcast failed; after a refusal the group can only be closed.
        """
        tensors = [flattened(named)["flattened_tensor"]] if flat else [tensor for _, tensor in named]
        with ThreadPoolExecutor(1) as pool:
            answered = pool.submit(receive)
            self._is_whole = False
            try:
                works: list[Any] = [dist.broadcast(tensor, src=0, group=self._group, async_op=True) for tensor in tensors]
                limit = self._timeout if answered.result().success else timedelta(seconds=_AFTER_REFUSAL)
                for work in works:
                    work.wait(limit)
            except RuntimeError as error:
                return Answer(False, f"{answered.result().message}; the broadcast failed: {error}")
        self._is_whole = answered.result().success
        return answered.result()

    def close(self) -> None:
        """Destroy both ends. Raises `Refusal` if the server does not."""
        with ThreadPoolExecutor(1) as pool:
            answered = pool.submit(call, self.url, "destroy_weights_update_group", {"group_name": self.name})
            if not self._is_whole:
                self._group.abort()  # NCCL would wait for the server's part of the last broadcast for ever
            dist.destroy_process_group(self._group)
            self._group = None
        if problem := _refusal(answered):
            raise Refusal(f"{self.url} did not destroy the group {self.name} ({problem}).")

    def __enter__(self) -> TrainerGroup:
        return self

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        with suppress(Refusal) if error else nullcontext():  # an error of the block says more
            self.close()


def _refusal(answered: Future[Answer]) -> str | None:
    """Waits for the answer. None where it is success."""
    answer = answered.result()
    return None if answer.success else answer.message


class BroadcastCalls(WeightCalls):
    """The calls of one server whose tensors go by broadcast from this process.

    Neither NCCL nor gloo has float8_e8m0fnu, the type of MXFP4's scales: such tensors go in flattened buckets only.
    """

    def __init__(self, group: TrainerGroup) -> None:
        super().__init__(group.url, group.ranks)
        self._group = group

    def send(self, named: Sequence[Named], *, flat: bool = False, flush: bool = True, version: str | None = None) -> Answer:
        """`update_weights_from_distributed`. `flat`: as one flattened bucket. `flush`: the KV cache of the old weights goes."""
        ordered = aligned(named) if flat else list(named)
        body = {
            "names": [name for name, _ in ordered],
            "dtypes": [_name_of(tensor.dtype) for _, tensor in ordered],
            "shapes": [list(tensor.shape) for _, tensor in ordered],
            "group_name": self._group.name,
            "load_format": "flattened_bucket" if flat else None,
            "flush_cache": flush,
            "weight_version": version,
        }
        return self._group.broadcast(ordered, flat, lambda: self._call("update_weights_from_distributed", body))


def _name_of(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
