"""What merging repeated experts must give, slot by slot in plain Python, on any device that can run the kernel."""

import pytest
import torch

from hopper_moe.kernels.merge_slots import merge_repeated


def check(seed: int, device: str) -> None:
    """Compares `merge_repeated` with a dictionary per token: few experts, so that most tokens name one more than once."""
    generator = torch.Generator().manual_seed(seed)
    for num_tokens, top_k in ((1, 6), (7, 6), (300, 4), (65, 16)):
        ids = torch.randint(-1, 4, (num_tokens, top_k), generator=generator, dtype=torch.int32)
        weights = torch.rand(num_tokens, top_k, generator=generator)
        weights[ids < 0] = float("nan")
        merged_ids, merged_weights = (tensor.cpu() for tensor in merge_repeated(ids.to(device), weights.to(device)))
        for token in range(num_tokens):
            wanted: dict[int, float] = {}
            for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
                if expert >= 0:
                    wanted[expert] = wanted.get(expert, 0.0) + weight
            slots = zip(merged_ids[token].tolist(), merged_weights[token].tolist(), strict=True)
            assert {expert: weight for expert, weight in slots if expert >= 0} == pytest.approx(wanted, rel=1e-6)
            assert (merged_ids[token] >= 0).sum() == len(wanted)
