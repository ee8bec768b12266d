"""Peer `flashinfer_mxfp4`: the kernel of `w4a16` with the arguments of SGLang 0.5.17, which sums slots with atomics."""

from __future__ import annotations

from hopper_moe.moe_backends.runners.w4a16 import W4A16Runner


def create() -> W4A16Runner:
    """A runner for one layer."""
    return W4A16Runner(fused_finalize=True)
