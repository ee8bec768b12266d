"""Kernels of other projects behind `ExpertRunner`: for benchmarks and contract tests, never chosen for serving."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hopper_moe.moe_backends.errors import Refusal

if TYPE_CHECKING:
    from hopper_moe.moe_backends.base import ExpertRunner


@dataclass(frozen=True)
class Peer:
    """One kernel: what it is, its module here (with `create()`), and the package it comes from."""

    name: str
    summary: str
    package: str

    @property
    def missing(self) -> str | None:
        """Why it cannot run here; None: its package is installed."""
        return None if importlib.util.find_spec(self.package) else f"{self.package} is not installed"


_ALL = (
    Peer("marlin", "SGLang's Marlin: FP4 experts, BF16 activations (`--moe-runner-backend marlin`)", "sglang"),
    Peer("flashinfer_mxfp4", "FlashInfer as SGLang 0.5.17 calls it: sums of slots with atomics", "flashinfer"),
    Peer("deep_gemm_mega", "DeepGEMM's FP8 MegaMoE, FP4 experts expanded to 128 x 128 block FP8", "deep_gemm"),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}


def create_peer(name: str) -> ExpertRunner:
    """A new runner of a peer for one layer. Raises `Refusal` when there is none of that name or its package is missing."""
    if name not in PEERS:
        raise Refusal(f"{name!r} is not a peer kernel: use one of {', '.join(PEERS)}.")
    if reason := PEERS[name].missing:
        raise Refusal(f"{name}: {reason}; leave it out or install it.")
    return importlib.import_module(f"hopper_moe.kernels.peers.{name}").create()
