"""An SGLang plugin for one row of the H200 table: `HOPPER_MOE_KERNEL=reference` computes without rounding anything.

Only a server that has the folder made by `install` on its PYTHONPATH loads it: nothing that is served to anybody else changes.
The start-up self-check must be off there, since it compares the layer with the rounding reference.
"""

from __future__ import annotations

from pathlib import Path

import torch

from hopper_moe.kernels.reference import exact
from hopper_moe.moe_backends.runners.reference import ReferenceRunner

_METADATA = "Metadata-Version: 2.1\nName: hopper-moe-exact-experts\nVersion: 0\n"
_ENTRY_POINTS = f"[sglang.srt.plugins]\nhopper_moe_exact_experts = {__name__}:register\n"


def install(folder: Path) -> Path:
    """Write the metadata by which SGLang finds the plugin; put the returned folder on PYTHONPATH."""
    metadata = folder / "hopper_moe_exact_experts-0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(_METADATA)
    (metadata / "entry_points.txt").write_text(_ENTRY_POINTS)
    return folder


def register() -> None:
    """SGLang calls this in each of its processes."""
    ReferenceRunner.run = run  # type: ignore[method-assign]  # a plug-in of SGLang's, which patches in its processes


def run(
    self: ReferenceRunner,
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ReferenceRunner.run` in FP64 throughout; only the result is rounded, to bf16 [num_tokens, H]."""
    limit, first = self._shard.swiglu_limit, self._shard.first_expert
    y = exact(hidden_states, topk_ids, topk_weights, self._experts, swiglu_limit=limit, first_expert=first).to(torch.bfloat16)
    return y if out is None else out.copy_(y)
