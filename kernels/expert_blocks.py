"""Rows that lie in one block per expert, as DeepEP's low-latency mode brings them, for a kernel that takes a list of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [N, H], ids int32 [N, K], weights float32 [N, K]) -> [N, H]."""


def most_rows(num_experts: int, block_rows: int, top_k: int) -> int:
    """Rows that `num_experts` blocks hold at most: a block has room for every token of all ranks, and each of these tokens chose
    `top_k` experts."""
    return block_rows * min(top_k, num_experts)


def run_on_blocks(blocks: torch.Tensor, counts: torch.Tensor, top_k: int, run: Run) -> torch.Tensor:
    """Every row through its block's expert, with weight 1.

    The rows are copied to a list of `most_rows` and their results back, so that `run` does not pass over whole blocks, most of
    which is empty. Only tensor operations on the device, whose sizes do not depend on `counts`: a CUDA graph captures them.

    Args:
        blocks: bf16 [E, M, H], contiguous, H a multiple of 4; rows from `counts` on may hold anything, NaN too.
        counts: int32 [E], of rows in each block; at most `most_rows` together.
        top_k: slots per row that `run` takes; a row uses the first one.
        run: the layer. Ids count from 0; -1 stands in the other slots, and where the list holds no row.

    Returns:
        bf16 [E, M, H]; rows from `counts` on are undefined.
    """
    num_experts, block_rows, _ = blocks.shape
    places, experts = _listed(counts, block_rows, most_rows(num_experts, block_rows, top_k))
    ids = torch.full((len(places), top_k), -1, dtype=torch.int32, device=blocks.device)
    ids[:, 0] = experts.where(experts < num_experts, -1)
    weights = torch.ones(len(places), top_k, dtype=torch.float32, device=blocks.device)
    rows = blocks.flatten(0, 1).view(torch.int64)  # a thread copies eight bytes, not two
    done = run(rows.index_select(0, places.clamp(max=len(rows) - 1)).view(blocks.dtype), ids, weights)
    result = rows.new_empty(len(rows) + 1, rows.shape[1])  # the last one takes what is nobody's
    result.index_copy_(0, places, done.view(torch.int64))
    return result[:-1].view(blocks.dtype).view_as(blocks)


def _listed(counts: torch.Tensor, block_rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of all blocks, one block after the other: each one's place in the flattened blocks and its expert, int64 [length].
    Behind the last row the place after the blocks, and E."""
    ends, listed = counts.cumsum(0), torch.arange(length, device=counts.device)
    experts = torch.searchsorted(ends, listed, right=True)
    starts = torch.nn.functional.pad(ends, (1, 0))
    places = experts * block_rows + listed - starts[experts]
    return places.clamp(max=len(counts) * block_rows), experts
