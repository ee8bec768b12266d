"""This rank's metrics on SGLang's Prometheus endpoint (`--enable-metrics`, GET /metrics); none without that flag.

SGLang collects the metrics of its processes through files in PROMETHEUS_MULTIPROC_DIR, which it sets only with the flag. Metrics
that a worker registers are collected as well.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from hopper_moe.moe_backends.runner import ExpertRunner
    from hopper_moe.moe_backends.sglang.startup import Ready

PREFIX = "hopper_moe:"  # as SGLang's own begin with "sglang:"


class Metrics:
    """Gauges that are set once, and counters that are updated at every call outside CUDA graphs (each prefill makes one)."""

    def __init__(self, kernel: str, replica: int) -> None:
        from prometheus_client import Counter, Gauge

        # Every replica counts its ranks from 0, and all of them write where this host's endpoint collects.
        labels = {"kernel": kernel, "dp_rank": str(replica), "rank": str(dist.get_rank() if dist.is_initialized() else 0)}

        def gauge(name: str, text: str) -> Any:
            return Gauge(PREFIX + name, text, labels, multiprocess_mode="mostrecent").labels(**labels)

        def counter(name: str, text: str) -> Any:
            return Counter(PREFIX + name, text, labels).labels(**labels)

        self._layers = gauge("layers", "MoE layers that this rank runs on this kernel")
        self._expert_bytes = gauge("expert_bytes", "device bytes of converted expert weights")
        self._self_check = gauge("self_check_error", "relative L2 difference to the reference before serving")
        self._tokens = counter("eager_tokens", "tokens of calls outside CUDA graphs, counted in the first layer that ran")
        self._launches = counter(
            "kernel_launches", "launches of the fused kernel, CUDA graph replays included, as of the last call outside graphs"
        )
        self._watched: ExpertRunner | None = None
        self._seen = 0
        self._copy: torch.Tensor | None = None

    def ready(self, ready: Ready) -> None:
        """Set the gauges that no longer change."""
        self._layers.set(ready.num_layers)
        self._expert_bytes.set(ready.expert_bytes)
        self._self_check.set(max(ready.errors, default=float("nan")))

    def count(self, runner: ExpertRunner, num_tokens: int) -> None:
        """Count a call of a layer. Only the first layer seen is counted. Never waits for the device."""
        if self._watched is None:
            self._watched = runner
        if runner is not self._watched or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return
        self._tokens.inc(num_tokens)
        words = runner.launch_counter
        if words is None:
            return
        if self._copy is None:
            self._copy = torch.zeros(words.shape, dtype=words.dtype, pin_memory=True)
        launches = int(self._copy.view(torch.int32)) & 0xFFFFFFFF  # from the copy that an earlier call started
        self._launches.inc((launches - self._seen) & 0xFFFFFFFF)
        self._seen = launches
        self._copy.copy_(words, non_blocking=True)


@functools.cache
def metrics(kernel: str, replica: int) -> Metrics | None:
    """This process's metrics; None when the server was started without them. `replica`: SGLang's dp_rank, 0 without one."""
    return Metrics(kernel, replica) if "PROMETHEUS_MULTIPROC_DIR" in os.environ else None
