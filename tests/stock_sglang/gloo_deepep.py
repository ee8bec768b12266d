"""DeepEP's transport over gloo: what `deep_ep.Buffer` does to rows in either mode, for SGLang's own dispatcher on a CPU.

Transport only: SGLang's dispatcher and layer, and this package's side of them, are the real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist


class Event:
    def current_stream_wait(self) -> None:
        pass


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        return 0

    get_rdma_buffer_size_hint = get_nvl_buffer_size_hint


class Buffer:
    num_sms = 20

    def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int, **options: Any) -> None:
        self.group, self.rank, self.group_size = group, dist.get_rank(group), dist.get_world_size(group)
        self.low_latency_mode, self.is_clean = options["low_latency_mode"], True
        assert self.low_latency_mode == (num_rdma_bytes > 0)

    @staticmethod
    def capture() -> Event:
        return Event()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    get_combine_config = get_dispatch_config

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
        return 4 * num_experts * num_max_tokens * hidden * torch.bfloat16.itemsize

    def clean_low_latency_buffer(self, num_max_tokens: int, hidden: int, num_experts: int) -> None:
        self.is_clean = True

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int, **options: Any) -> tuple:
        self.num_local_experts = num_experts // self.group_size
        return None, None, None, None, Event()

    def dispatch(self, x: torch.Tensor, *, topk_idx: torch.Tensor, topk_weights: torch.Tensor, **options: Any) -> tuple:
        """Each row once to every rank that holds one of its experts; there ids count from 0, -1 is an expert elsewhere."""
        assert (x.dtype, topk_idx.dtype, topk_weights.dtype) == (torch.bfloat16, torch.int64, torch.float32)
        self.is_clean = False
        rows, ids, weights, places = [], [], [], []
        for source, (its_x, its_ids, its_weights) in enumerate(self._from_all((x, topk_idx, topk_weights))):
            local = its_ids - self.rank * self.num_local_experts
            is_mine = (its_ids >= 0) & (local >= 0) & (local < self.num_local_experts)
            (chosen,) = is_mine.any(1).nonzero(as_tuple=True)
            rows.append(its_x[chosen])
            ids.append(torch.where(is_mine, local, -1)[chosen])
            weights.append(torch.where(is_mine, its_weights, 0.0)[chosen])
            places += [(source, row) for row in chosen.tolist()]
        counts = torch.cat(ids).flatten()
        handle = (places, x.shape)
        per_expert = [int((counts == expert).sum()) for expert in range(self.num_local_experts)]
        return torch.cat(rows), torch.cat(ids), torch.cat(weights), per_expert, handle, Event()

    def combine(self, x: torch.Tensor, handle: tuple, **options: Any) -> tuple:
        """Every row is the sum of what the ranks made of it, in rank order."""
        assert x.dtype is torch.bfloat16
        places, shape = handle
        y = torch.zeros(shape, dtype=torch.float32)
        for its_x, its_places in self._from_all((x, places)):
            for result, (rank, row) in zip(its_x, its_places, strict=True):
                if rank == self.rank:
                    y[row] += result.float()
        return y.bfloat16(), None, Event()

    def low_latency_dispatch(
        self, x: torch.Tensor, topk_idx: torch.Tensor, num_max_tokens: int, num_experts: int, use_fp8: bool, **options: Any
    ) -> tuple:
        """Each row to the block of every expert that it chose, in no particular order; the hook brings what was sent.

        What no row was sent to is NaN.
        """
        assert (x.dtype, topk_idx.dtype) == (torch.bfloat16, torch.int64) and not use_fp8 and options["return_recv_hook"]
        assert self.low_latency_mode and self.is_clean and len(x) <= num_max_tokens
        num_local = num_experts // self.group_size
        blocks = torch.full((num_local, num_max_tokens * self.group_size, x.shape[1]), float("nan"), dtype=x.dtype)
        counts, handle = torch.full((num_local,), -(2**31), dtype=torch.int32), []

        def receive() -> None:
            found = self._from_all((x, topk_idx))
            for expert in range(num_local):
                chose = [(its_ids == self.rank * num_local + expert).any(1).nonzero().flatten() for _, its_ids in found]
                places = [(source, row) for source, rows in enumerate(chose) for row in rows.tolist()][::-1]
                for place, (source, row) in enumerate(places):
                    blocks[expert, place] = found[source][0][row]
                counts[expert] = len(places)
                handle.append(places)

        return blocks, counts, (handle, blocks.shape), Event(), receive

    def low_latency_combine(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, handle: tuple, **options: Any
    ) -> tuple[torch.Tensor, Event, Callable[[], None]]:
        """Every row is the weighted sum of what its experts made of it, in the order of its slots."""
        places, shape = handle
        assert (x.dtype, x.shape) == (torch.bfloat16, shape) and x.is_contiguous() and topk_weights.dtype is torch.float32
        y = torch.full((len(topk_idx), x.shape[2]), float("nan"), dtype=x.dtype)

        def receive() -> None:
            results = {}
            for rank, (its_x, its_places) in enumerate(self._from_all((x, places))):
                for local, block in enumerate(its_places):
                    for place, (source, row) in enumerate(block):
                        if source == self.rank:
                            results[row, rank * len(its_places) + local] = its_x[local, place].float()
            for row, (ids, weights) in enumerate(zip(topk_idx.tolist(), topk_weights, strict=True)):
                slots = [weights[k] * results[row, expert] for k, expert in enumerate(ids) if expert >= 0]
                y[row] = sum(slots, torch.zeros(x.shape[2])).bfloat16()

        return y, Event(), receive

    def _from_all(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * self.group_size
        dist.all_gather_object(found, mine, group=self.group)
        return found


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang as on a machine where deep_ep and deep_gemm load; its dispatcher gets this transport."""
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe.token_dispatcher import deepep

    monkeypatch.setattr(deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", True)
    monkeypatch.setattr(deepep, "use_deepep", True)
    monkeypatch.setattr(deepep, "Buffer", Buffer, raising=False)
    monkeypatch.setattr(deepep, "Config", Config, raising=False)
    monkeypatch.setattr(deepep, "_is_mnnvl_fabric_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_, **__: SimpleNamespace(multi_processor_count=132))
