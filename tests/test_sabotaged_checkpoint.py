"""Sabotages written into a checkpoint, for servers whose kernel cannot be swapped, are those of the sabotaged kernels."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hopper_moe.eval.demo import tiny_model
from hopper_moe.eval.sabotage import sabotaged_checkpoint, sabotages
from hopper_moe.launch.cpu_host.experts import use_kernel
from hopper_moe.launch.cpu_host.model import load


@torch.inference_mode()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


FACTOR = (
    2.0  # a power of two, as the tiny model's own is not: multiplied by it in any order, weights are the same to the last bit
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny model with `FACTOR`."""
    folder = shutil.copytree(tiny_model(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": FACTOR}))
    return folder


@pytest.mark.parametrize("name", list(sabotages(FACTOR)))
def test_it_is_the_sabotaged_kernels_mistake(name: str, model: Path, tmp_path: Path, seed: int) -> None:
    ids = torch.randint(7, 450, (2, 40), generator=torch.Generator().manual_seed(seed))
    honest, _ = load(model, "reference")
    right = logits(honest, ids)
    wrong, _ = load(sabotaged_checkpoint(model, tmp_path / "wrong", name), "reference")
    got = logits(wrong, ids)
    assert (got - right).norm() > 0.02 * right.norm()  # a plain "differs"; every mistake makes 0.1 or more
    if name == "clamp missing":
        return  # the checkpoint takes it from the shared experts too
    assert honest.config.routed_scaling_factor == FACTOR
    use_kernel(honest, name, sabotages(FACTOR)[name])
    assert torch.equal(got, logits(honest, ids)), "a scale is applied elsewhere, or rows went to another place"
