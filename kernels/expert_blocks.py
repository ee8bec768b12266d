"""Rows that lie in one block per expert, as DeepEP's low-latency mode brings them, as a kernel's routing."""

from __future__ import annotations

import torch


def block_routing(counts: torch.Tensor, rows: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing of the E * `rows` rows of E blocks, of which the first `counts[e]` of block e are expert e's and the others
    nobody's.

    A kernel takes `top_k` slots per row; here a row uses the first one, with weight 1. Only tensor operations on the device of
    `counts`, so that a CUDA graph captures it.

    Args:
        counts: int32 [E].
        rows: of each block.
        top_k: slots per row that the kernel was built for.

    Returns:
        int32 [E * rows, top_k], local ids and -1, and float32 [E * rows, top_k].
    """
    num_experts, device = counts.shape[0], counts.device
    experts = torch.arange(num_experts, dtype=torch.int32, device=device)[:, None]
    place = torch.arange(rows, dtype=torch.int32, device=device)
    ids = torch.full((num_experts, rows, top_k), -1, dtype=torch.int32, device=device)
    ids[..., 0] = torch.where(place < counts[:, None], experts, -1)
    return ids.flatten(0, 1), torch.ones(num_experts * rows, top_k, dtype=torch.float32, device=device)
