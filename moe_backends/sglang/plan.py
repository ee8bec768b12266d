"""The plan of a launch for its workers: kernel, exchange and capacity, passed in one environment variable."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass

BACKEND = "hopper_moe"
"""The value of `--moe-runner-backend` that selects this plugin."""

DEFAULT_CAPACITY = 8192
"""Tokens per kernel call where a call may be split (exchange "none"): bounds the kernel's buffers, not the batch."""

NO_EXCHANGE, FUSED_EXCHANGE, DEEPEP_EXCHANGE = "none", "megamoe", "deepep"
"""Values of `--moe-a2a-backend`: rows are moved by SGLang's collectives, by the kernel, or by DeepEP."""

_NOTE = "_HOPPER_MOE_PLAN"


@dataclass(frozen=True)
class ServingPlan:
    """Decisions from the resolved arguments, for every MoE layer of every rank. Workers inherit only the environment."""

    kernel: str  # a name of the registry
    exchange: str  # NO_EXCHANGE, FUSED_EXCHANGE or DEEPEP_EXCHANGE
    capacity: int  # tokens per kernel call; with the fused exchange the limit of a rank, else the size of one piece
    block_rows: int = 0  # of each expert of a rank in DeepEP's low-latency mode; 0: that mode is not used

    def publish(self, environ: MutableMapping[str, str]) -> None:
        environ[_NOTE] = json.dumps(asdict(self))

    @staticmethod
    def read(environ: Mapping[str, str]) -> ServingPlan | None:
        """The plan of this process or its parent; None: this backend was not requested."""
        note = environ.get(_NOTE)
        return ServingPlan(**json.loads(note)) if note else None
