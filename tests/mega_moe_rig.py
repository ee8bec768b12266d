"""A fused layer on the GPU with poisoned memory, and what the kernel left in its workspace, in the reference's types."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hopper_moe.kernels import reference
from hopper_moe.kernels.benchmarks.workload import (
    ModelShape,
    make_layer,
    random_experts,
    random_fp8_experts,
    random_routing,
    random_tokens,
    random_wide_experts,
)
from hopper_moe.kernels.mega_moe import MegaMoE
from hopper_moe.kernels.reference_stages import DispatchedTokens, HiddenStage
from hopper_moe.kernels.tile_table import MAX_TILE, TileTable, forced_tile
from hopper_moe.quantization import layout
from hopper_moe.quantization.packing import PackedExperts, WidePackedExperts
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts

FACTOR = 1.5  # routed_scaling_factor of every call
PAIRS = replace(forced_tile(MAX_TILE), pair_from=0)  # every two blocks of an expert are one L1 task
RANDOM_EXPERTS = {
    PackedExperts: random_experts,
    WidePackedExperts: random_wide_experts,
    PackedFp8Experts: random_fp8_experts,
}


@dataclass(frozen=True)
class Batch:
    x: torch.Tensor  # bf16 [M, H]
    topk_ids: torch.Tensor  # int32 [M, K]
    topk_weights: torch.Tensor  # float32 [M, K]

    def rows(self, rows: slice) -> Batch:
        return Batch(self.x[rows], self.topk_ids[rows], self.topk_weights[rows])


def random_batch(
    shape: ModelShape,
    num_experts: int,
    num_tokens: int,
    routing: str,
    generator: torch.Generator,
    num_ranks: int = 1,
    device: str = "cuda",
) -> Batch:
    """Fresh tokens; from 5 tokens on also a masked slot, a masked token and one expert twice in a row. Beside the routings of
    benchmarks: "to_rank_0", of `num_ranks` only rank 0's experts, and "one_expert", the last one in every slot."""
    kind = "uniform" if routing in ("to_rank_0", "one_expert") else routing
    ids, weights = random_routing(num_tokens, num_experts, shape.top_k, kind, generator, device)
    if routing == "to_rank_0":
        ids %= num_experts // num_ranks
    if routing == "one_expert":
        ids.fill_(num_experts - 1)
    if num_tokens > 4:
        ids[1, 0] = -1
        ids[2] = -1
        ids[3, 1] = ids[3, 0]
    return Batch(random_tokens(shape, num_tokens, generator, device), ids, weights)


@dataclass(frozen=True)
class Rig:
    """One layer, one workspace."""

    shape: ModelShape
    packed: PackedExperts | PackedFp8Experts
    mm: MegaMoE
    generator: torch.Generator

    def batch(self, num_tokens: int, routing: str = "uniform") -> Batch:
        """See `random_batch`."""
        return random_batch(self.shape, self.mm.shard.num_experts, num_tokens, routing, self.generator)

    def run(self, batch: Batch, poison: bool = True, **options) -> torch.Tensor:
        """The kernel, into memory full of NaN: what it does not write, or reads without having written, shows."""
        if poison:
            self.mm.workspace[self.mm.offsets["control_bytes"] :].fill_(0xFF)
        y = torch.full_like(batch.x, float("nan"))
        options = {"swiglu_limit": self.shape.swiglu_limit, "routed_scaling_factor": FACTOR, **options}
        self.mm(batch.x, batch.topk_ids, batch.topk_weights, self.packed, out=y, **options)
        torch.cuda.synchronize()
        return y

    def reference(self, batch: Batch, compute=reference.moe_layer, **options) -> torch.Tensor:
        options = {"swiglu_limit": self.shape.swiglu_limit, "routed_scaling_factor": FACTOR, **options}
        return compute(
            batch.x, batch.topk_ids, batch.topk_weights, self.packed, first_expert=self.mm.shard.first_expert, **options
        )

    def with_tiles(self, tiles: TileTable, capacity: int) -> Rig:
        return replace(
            self, mm=make_layer(self.shape, self.mm.shard.num_experts, capacity, tiles=tiles, weights=type(self.packed))
        )


def make_rig(seed: int, shape: ModelShape, num_experts: int, capacity: int, **options) -> Rig:
    """Random weights. `options` go to MegaMoE (num_local_experts, first_expert, tiles, weights)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    make_experts = RANDOM_EXPERTS[options.get("weights", PackedExperts)]
    packed = make_experts(shape, options.get("num_local_experts", num_experts), generator)
    return Rig(shape, packed, make_layer(shape, num_experts, capacity, **options), generator)


def block_counts(num_tokens: int, num_experts: int, top_k: int, generator: torch.Generator, device: str = "cuda") -> torch.Tensor:
    """int32 [num_experts]: rows that come to each expert's block when `num_tokens` tokens choose."""
    ids, _ = random_routing(num_tokens, num_experts, top_k, "uniform", generator, device)
    return torch.bincount(ids.flatten(), minlength=num_experts).int()


def read_field(mm: MegaMoE, field: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A copy of the first elements of a workspace field (`csrc/layout.cuh`)."""
    count = torch.Size(shape).numel() * dtype.itemsize
    return mm.workspace[mm.offsets[field] :][:count].view(dtype).view(shape).clone()


def natural_order(rows: torch.Tensor) -> torch.Tensor:
    """[.., multiple of 128], one element a feature, from the order of `layout.wgmma_position` back to that of the features."""
    positions = torch.tensor([layout.wgmma_position(k) for k in range(layout.UNIT_K)], device=rows.device)
    return rows.unflatten(-1, (-1, layout.UNIT_K))[..., positions].flatten(-2)


def read_dispatched(mm: MegaMoE, num_tokens: int) -> DispatchedTokens:
    """What pre-dispatch wrote in the last call."""
    return DispatchedTokens(
        natural_order(read_field(mm, "x", torch.uint8, num_tokens, mm.shard.hidden_size)).view(torch.float8_e4m3fn),
        read_field(mm, "x_scale", torch.float32, num_tokens, 1),
        read_field(mm, "topk_ids", torch.int32, num_tokens, mm.shard.top_k),
        read_field(mm, "topk_weights", torch.float32, num_tokens, mm.shard.top_k),
        num_tokens,
    )


def read_slots(mm: MegaMoE, topk_ids: torch.Tensor) -> torch.Tensor:
    """c of the last call: bf16 [M, K, H], zeros for skipped slots (the kernel does not write those)."""
    c = read_field(mm, "combine", torch.bfloat16, *topk_ids.shape, mm.shard.hidden_size)
    return c.masked_fill((topk_ids < 0)[..., None], 0.0)


def read_hidden(mm: MegaMoE, topk_ids: torch.Tensor) -> HiddenStage:
    """hq and its scales of the last call, from the expert pools: blocks as the tile table cuts them, 128-byte swizzle undone.

    Ids as the call had them. Fails unless the pools hold every local slot exactly once.
    """
    num_tokens, size, num_groups = topk_ids.shape[0], mm.shard.intermediate_size, layout.h_groups(mm.shard.intermediate_size)
    local = topk_ids.flatten().long() - mm.shard.first_expert
    is_local = (local >= 0) & (local < mm.shard.num_local_experts)
    counts = torch.bincount(local[is_local], minlength=mm.shard.num_local_experts).tolist()
    device = topk_ids.device
    hq = torch.zeros(topk_ids.numel(), num_groups, 8, 16, dtype=torch.uint8, device=device)
    h_scale = torch.zeros(topk_ids.numel(), num_groups, dtype=torch.float32, device=device)
    seen, row = [], 0
    for count in counts:
        while count > 0:
            tile = mm.tiles.max_tile if count >= mm.tiles.max_tile else mm.tiles.tail_tile[-(-count // 8)]
            num_rows = min(count, tile)
            slots = _read_rows(mm, "pool_slot", torch.int32, row, num_rows).long()  # the upper bits are source rank 0
            values = _read_rows(mm, "pool_h", torch.uint8, row, tile * size).view(num_groups, tile, 8, 16)[:, :num_rows]
            scales = _read_rows(mm, "pool_h_scale", torch.float32, row, tile * num_groups).view(num_groups, tile)[:, :num_rows]
            line = torch.arange(num_rows, device=device)
            chunk = torch.arange(8, device=device) ^ (line % 8)[:, None]  # where logical 16-byte chunk c of a row lies
            hq[slots] = values[:, line[:, None], chunk].transpose(0, 1)
            h_scale[slots] = scales.T
            seen.append(slots)
            row, count = row + tile, count - num_rows
    found = torch.cat(seen).sort().values if seen else torch.empty(0, dtype=torch.long, device=device)
    assert torch.equal(found, is_local.nonzero().flatten()), "the pools do not hold every local slot exactly once"
    hq = natural_order(hq.view(num_tokens, mm.shard.top_k, size)).view(torch.float8_e4m3fn)
    return HiddenStage(hq, h_scale.view(num_tokens, mm.shard.top_k, num_groups))


def _read_rows(mm: MegaMoE, field: str, dtype: torch.dtype, row: int, count: int) -> torch.Tensor:
    """`count` elements of the block that starts at pool row `row`."""
    per_row = {"pool_slot": 1, "pool_h": mm.shard.intermediate_size, "pool_h_scale": layout.h_groups(mm.shard.intermediate_size)}[
        field
    ]
    begin = mm.offsets[field] + row * per_row * dtype.itemsize
    return mm.workspace[begin : begin + count * dtype.itemsize].view(dtype)
