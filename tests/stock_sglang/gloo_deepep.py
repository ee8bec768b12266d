"""DeepEP's transport over gloo: what `deep_ep.Buffer` does to rows in its normal mode, for SGLang's own dispatcher on a CPU.

Transport only: SGLang's dispatcher and layer, and this package's side of them, are the real ones.
"""

from __future__ import annotations

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
        assert not options["low_latency_mode"]
        self.group, self.rank, self.low_latency_mode = group, dist.get_rank(group), False

    @staticmethod
    def capture() -> Event:
        return Event()

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int, **options: Any) -> tuple:
        self.num_local_experts = num_experts // dist.get_world_size(self.group)
        return None, None, None, None, Event()

    def dispatch(self, x: torch.Tensor, *, topk_idx: torch.Tensor, topk_weights: torch.Tensor, **options: Any) -> tuple:
        """Each row once to every rank that holds one of its experts; there ids count from 0, -1 is an expert elsewhere."""
        assert (x.dtype, topk_idx.dtype, topk_weights.dtype) == (torch.bfloat16, torch.int64, torch.float32)
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

    def _from_all(self, mine: Any) -> list[Any]:
        found: list[Any] = [None] * dist.get_world_size(self.group)
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
