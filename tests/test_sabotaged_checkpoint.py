"""Sabotages written into a checkpoint, for servers whose kernel cannot be swapped, are those of the sabotaged kernels."""

from pathlib import Path

import pytest
import torch

from hopper_moe.eval.sabotage import sabotaged_checkpoint, sabotages
from hopper_moe.launch.cpu_host_experts import use_kernel
from hopper_moe.launch.cpu_host_model import load
from hopper_moe.launch.demo import tiny_model


@torch.inference_mode()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", list(sabotages(2.5)))
def test_it_is_the_sabotaged_kernels_mistake(name: str, tmp_path: Path, seed: int) -> None:
    ids = torch.randint(7, 450, (2, 40), generator=torch.Generator().manual_seed(seed))
    honest, _ = load(tiny_model(), "reference")
    right = logits(honest, ids)
    wrong, _ = load(sabotaged_checkpoint(tiny_model(), tmp_path / "wrong", name), "reference")
    got = logits(wrong, ids)
    assert (got - right).norm() > 0.02 * right.norm()
    if name == "clamp missing":
        return  # the checkpoint takes it from the shared experts too
    use_kernel(honest, name, sabotages(honest.config.routed_scaling_factor)[name])
    torch.testing.assert_close(got, logits(honest, ids), rtol=1e-3, atol=2e-3 * right.abs().max().item())
