"""Experts with one classic mistake each, to show that the evaluation catches them. Never part of a served kernel."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hopper_moe.kernels.reference_weights import ExpertSource, Matrix
from hopper_moe.launch.cpu_host.experts import ExpertsKernel, reference_kernel
from hopper_moe.quantization.errors import Refusal


@dataclass(frozen=True)
class SwappedGateUp:
    """An expert source whose gate and up rows have changed places."""

    source: ExpertSource

    @property
    def num_experts(self) -> int:
        return self.source.num_experts

    @property
    def hidden_size(self) -> int:
        return self.source.hidden_size

    @property
    def intermediate_size(self) -> int:
        return self.source.intermediate_size

    def w13(self, expert: int, dtype: torch.dtype) -> Matrix:
        matrix = self.source.w13(expert, dtype)
        return Matrix(matrix.values.roll(self.intermediate_size, 0), matrix.block_scale)

    def w2(self, expert: int, dtype: torch.dtype) -> Matrix:
        return self.source.w2(expert, dtype)


def sabotages(routed_scaling_factor: float) -> dict[str, ExpertsKernel]:
    """Name -> the reference kernel with that mistake; the factor is the model's own, already inside the top-k weights."""

    def factor_dropped(x, ids, weights, experts, *, swiglu_limit):
        return reference_kernel(x, ids, weights / routed_scaling_factor, experts, swiglu_limit=swiglu_limit)

    def factor_doubled(x, ids, weights, experts, *, swiglu_limit):
        return reference_kernel(x, ids, weights * routed_scaling_factor, experts, swiglu_limit=swiglu_limit)

    def clamp_missing(x, ids, weights, experts, *, swiglu_limit):
        return reference_kernel(x, ids, weights, experts, swiglu_limit=None)

    def gate_up_swapped(x, ids, weights, experts, *, swiglu_limit):
        return reference_kernel(x, ids, weights, SwappedGateUp(experts), swiglu_limit=swiglu_limit)

    return {
        "scaling factor dropped": factor_dropped,
        "scaling factor applied twice": factor_doubled,
        "clamp missing": clamp_missing,
        "gate and up swapped": gate_up_swapped,
    }


def sabotaged_checkpoint(model: Path, out: Path, name: str) -> Path:
    """Copy of a checkpoint that makes any honest server commit mistake `name` of `sabotages`: for GPU kernels, which cannot be
    swapped for a wrong function.

    A missing clamp is missing in the shared experts too: SGLang knows one limit for both.
    """
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    factor = config["routed_scaling_factor"]
    if name == "gate and up swapped":
        other = {"w1": "w3", "w3": "w1"}
        for file in out.glob("*.safetensors"):
            tensors = load_file(file)
            renamed = {
                re.sub(r"(?<=\.)w[13](?=\.)", lambda m: other[m[0]], n) if ".experts." in n else n: t for n, t in tensors.items()
            }
            if renamed.keys() != tensors.keys():
                raise Refusal(f"{file} holds an expert's w1 or w3 without the other: write the checkpoint with both in one file.")
            save_file(renamed, file, metadata={"format": "pt"})
        return out
    changed = {
        "scaling factor dropped": {"routed_scaling_factor": 1.0},
        "scaling factor applied twice": {"routed_scaling_factor": factor**2},
        "clamp missing": {"swiglu_limit": 1e4},
    }[name]
    (out / "config.json").write_text(json.dumps(config | changed, indent=2) + "\n")
    return out
