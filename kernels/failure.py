"""Report of a peer that did not arrive in time: the host side of `PeerFailure` in csrc/layout.cuh.

The kernel writes the record to pinned host memory and then ends its CUDA context with a trap, so that no result of an incomplete
group is used. The record outlives the context. Later CUDA calls fail with a message that does not mention ranks, so a thread
watches the record and logs a sentence that names them.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref

import torch

logger = logging.getLogger("hopper_moe")

# By PeerStep in csrc/peers.cuh: (what this rank waited for, what the missing rank should have done).
_STEPS = {1: "its token counts (it has not entered this layer)", 2: "the expert outputs it owes this rank"}
_FIELDS = ("reported", "step", "missing_rank", "layer", "launch")  # struct PeerFailure


class PeerTimeout(RuntimeError):
    """A peer rank did not take part in a layer within the timeout. The process's CUDA context is gone: restart all ranks."""


class FailureRecord:
    """Pinned host memory that one rank's kernels report to. `watch`: log the report as soon as it comes."""

    def __init__(self, rank: int, timeout_s: float, watch: bool) -> None:
        self._words = torch.zeros(len(_FIELDS), dtype=torch.int32, pin_memory=torch.cuda.is_available())
        self._rank, self._timeout_s = rank, timeout_s
        if watch:
            threading.Thread(target=_watch, args=(weakref.ref(self),), name="hopper_moe-peers", daemon=True).start()

    @property
    def address(self) -> int:
        """Address of the record, the same on host and device."""
        return self._words.data_ptr()

    def message(self) -> str | None:
        """One sentence naming this rank, the missing one, the step and the layer; None while nothing has failed."""
        reported, step, missing_rank, layer, launch = self._words.tolist()
        if not reported:
            return None
        where = f"layer {layer}" if layer >= 0 else "a layer without a number"
        return (
            f"rank {self._rank} waited {self._timeout_s:g} s for rank {missing_rank} in {where} (launch {launch}): "
            f"{_STEPS[step]} did not arrive; look for that rank's own error, or raise HOPPER_MOE_TIMEOUT_S if it was only slow."
        )

    def check(self) -> None:
        """Raises PeerTimeout once a kernel has reported."""
        if (message := self.message()) is not None:
            raise PeerTimeout(message)


def _watch(record: weakref.ref[FailureRecord]) -> None:
    """Wait until the record is reported, then log it, or until it is deleted."""
    while (alive := record()) is not None:
        if (message := alive.message()) is not None:
            logger.critical(message)
            return
        del alive
        time.sleep(0.2)
