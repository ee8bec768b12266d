"""What holds for the fused kernel in every weight format: checks on a `Rig` that the GPU tests of the formats share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mega_moe_rig import Batch, Rig

from hopper_moe.kernels.tile_table import TILES, forced_tile


def check_layer(rig: Rig, num_tokens: int, routing: str, assert_is: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    """One call against the reference, by the bounds of `assert_is(got, want)`."""
    batch = rig.batch(num_tokens, routing)
    y = rig.run(batch)
    assert y.shape == batch.x.shape
    if num_tokens:
        assert_is(y, rig.reference(batch))


def check_bits(rig: Rig, num_tokens: int, capacity: int) -> None:
    """A token's bits do not depend on the tile, on the rest of the batch, nor on its place in it."""
    batch = rig.batch(num_tokens)
    want = rig.run(batch)
    for tile in TILES:
        assert torch.equal(rig.with_tiles(forced_tile(tile), capacity).run(batch), want), f"tile {tile} gives other bits"
    for begin in {0, num_tokens // 2, num_tokens - 1}:
        rows = slice(begin, begin + 1)
        assert torch.equal(rig.run(batch.rows(rows)), want[rows]), f"row {begin} alone has other bits"
    order = torch.randperm(num_tokens, device="cuda", generator=rig.generator)
    assert torch.equal(rig.run(Batch(batch.x[order], batch.topk_ids[order], batch.topk_weights[order])), want[order])
