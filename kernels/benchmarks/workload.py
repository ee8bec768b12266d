"""Random layers and routing for tests and benchmarks of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from hopper_moe.kernels.mega_moe import MegaMoE
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.kernels.tile_table import TileTable
from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import quantize_mxfp4
from hopper_moe.quantization.packing import PackedExperts, WidePackedExperts, pack_experts
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts, pack_fp8_experts


@dataclass(frozen=True)
class ModelShape:
    """One MoE layer. `local_experts`: experts of one rank at the expert parallelism people run it with (EP 8)."""

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    local_experts: int
    swiglu_limit: float | None = 10.0


SHAPES = {
    "flash": ModelShape(4096, 2048, 256, 6, 32),
    "pro": ModelShape(7168, 3072, 384, 6, 48),
    "v3": ModelShape(7168, 2048, 256, 8, 32, None),
    "v4.1-flash": ModelShape(5120, 2304, 384, 6, 48),
    "v4.1-draft": ModelShape(5120, 2304, 128, 3, 16),
}
ROUTINGS = ("uniform", "zipf", "one_hot")


Checkpoint = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # w13, w13_scale, w2, w2_scale of a layer, uint8


def random_checkpoint(
    shape: ModelShape,
    num_experts: int,
    generator: torch.Generator,
    device: str = "cuda",
    scale_bytes: tuple[int, int] = (118, 122),
) -> Checkpoint:
    """Uniform random E2M1 codes with UE8M0 bytes in `scale_bytes` (inclusive): every code, sign and scale step occurs."""

    def bytes_of(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, dtype=torch.uint8, device=device, generator=generator)

    hidden, inter, (low, high) = shape.hidden_size, shape.intermediate_size, scale_bytes
    return (
        bytes_of(0, 256, num_experts, 2 * inter, hidden // 2),
        bytes_of(low, high + 1, num_experts, 2 * inter, hidden // 32),
        bytes_of(0, 256, num_experts, hidden, inter // 2),
        bytes_of(low, high + 1, num_experts, hidden, inter // 32),
    )


def gaussian_checkpoint(shape: ModelShape, num_experts: int, generator: torch.Generator, device: str = "cuda") -> Checkpoint:
    """Normal weights of a trained layer's size, rounded to MXFP4 as a checkpoint's are: for accuracy."""

    def matrix(rows: int, columns: int, gain: float) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.randn(rows, columns, device=device, generator=generator) * gain / columns**0.5
        packed, scale = quantize_mxfp4(weights)
        return packed.view(torch.uint8), scale.view(torch.uint8)

    experts = [
        (*matrix(2 * shape.intermediate_size, shape.hidden_size, 2.0), *matrix(shape.hidden_size, shape.intermediate_size, 1.0))
        for _ in range(num_experts)
    ]
    w13, w13_scale, w2, w2_scale = (torch.stack(tensors) for tensors in zip(*experts, strict=True))
    return w13, w13_scale, w2, w2_scale


def random_experts(
    shape: ModelShape,
    num_experts: int,
    generator: torch.Generator,
    device: str = "cuda",
    scale_bytes: tuple[int, int] = (118, 122),
) -> PackedExperts:
    """`random_checkpoint`, packed."""
    return pack_experts(*random_checkpoint(shape, num_experts, generator, device, scale_bytes))


def widen_rows(checkpoint: Checkpoint, share: float, generator: torch.Generator) -> Checkpoint:
    """`checkpoint` with this share of the rows of every matrix spanning 12 to 28 octaves, and a group of zeros of any scale in
    each of these."""
    w13, w13_scale, w2, w2_scale = (tensor.clone() for tensor in checkpoint)
    for weight, scale in ((w13, w13_scale), (w2, w2_scale)):
        options: dict[str, Any] = {"device": scale.device, "generator": generator}
        rows = torch.rand(scale.shape[:2], **options) < share
        rows.view(-1)[0] = share > 0  # one at least
        codes, scales = weight[rows], scale[rows].int()
        top = scales.amax(-1, keepdim=True)
        span = torch.randint(12, layout.WIDE_MAX_DELTA + 1, top.shape, **options)
        scales = top - (torch.rand(scales.shape, **options) * (span + 1)).int()
        scales[:, :1], scales[:, 1:2] = top, top - span
        codes[:, :32:16] = 0x71  # a .5 and a 6 in each of these two groups, so that neither can be moved
        codes[:, 32:48] = 0x80
        scales[:, 2] = torch.randint(0, layout.UE8M0_NAN, scales.shape[:1], **options).int()
        weight[rows], scale[rows] = codes, scales.to(torch.uint8)
    return w13, w13_scale, w2, w2_scale


def random_wide_experts(
    shape: ModelShape, num_experts: int, generator: torch.Generator, device: str = "cuda", share: float = 0.5
) -> PackedExperts:
    """`random_checkpoint` with `share` of its rows widened, in the wide format."""
    checkpoint = random_checkpoint(shape, num_experts, generator, device)
    return pack_experts(*widen_rows(checkpoint, share, generator), WidePackedExperts)


def random_fp8_experts(shape: ModelShape, num_experts: int, generator: torch.Generator, device: str = "cuda") -> PackedFp8Experts:
    """Uniform random E4M3 bytes (all but the two NaN) with FP32 block scales of random mantissa over a factor of 16."""

    def weight(*size: int) -> torch.Tensor:
        data = torch.randint(0, 254, size, dtype=torch.uint8, device=device, generator=generator)
        return (data + (data >= 127)).view(torch.float8_e4m3fn)

    def scale(*size: int) -> torch.Tensor:
        blocks = [size[0], *(n // 128 for n in size[1:])]
        return torch.exp2(4 * torch.rand(blocks, device=device, generator=generator) - 15)

    hidden, inter = shape.hidden_size, shape.intermediate_size
    w13, w2 = (num_experts, 2 * inter, hidden), (num_experts, hidden, inter)
    return pack_fp8_experts(weight(*w13), scale(*w13), weight(*w2), scale(*w2))


def random_tokens(shape: ModelShape, num_tokens: int, generator: torch.Generator, device: str = "cuda") -> torch.Tensor:
    """bf16 [num_tokens, hidden_size], standard normal with a different magnitude per token, as after a norm with a gain."""
    x = torch.randn(num_tokens, shape.hidden_size, device=device, generator=generator)
    gain = torch.rand(num_tokens, 1, device=device, generator=generator) + 0.5
    return (x * gain).to(torch.bfloat16)


def random_routing(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    routing: str,
    generator: torch.Generator,
    device: str = "cuda",
    *,
    exponent: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int32 ids [num_tokens, top_k], float32 weights summing to 1 per token).

    uniform: every set of distinct experts equally likely. zipf: expert e drawn in proportion to 1 / (e + 1)^exponent, distinct
    per token. one_hot: every token's first slot is expert 0, the other slots uniform over the rest.
    """
    weight = torch.ones(num_experts, device=device)
    if routing == "zipf":
        weight = torch.arange(1, num_experts + 1, device=device).float() ** -exponent
    # Gumbel top-k: distinct draws in proportion to `weight`, without a host loop
    noise = -torch.log(-torch.log(torch.rand(num_tokens, num_experts, device=device, generator=generator).clamp(1e-9, 1 - 1e-7)))
    score = noise + weight.log()
    if routing == "one_hot":
        score[:, 0] = torch.inf
    elif routing not in ROUTINGS:
        raise ValueError(f"routing {routing!r} is not one of {ROUTINGS}")
    ids = score.topk(top_k, dim=1).indices.to(torch.int32)
    weights = torch.rand(num_tokens, top_k, device=device, generator=generator) + 0.1
    return ids.contiguous(), (weights / weights.sum(1, keepdim=True)).contiguous()


def make_layer(
    shape: ModelShape,
    num_experts: int,
    capacity: int,
    *,
    group: dist.ProcessGroup | None = None,
    weights: type[PackedExperts] | type[PackedFp8Experts] = PackedExperts,
    tiles: TileTable | None = None,
    wave_rows: int | None = None,
    **of_shard: Any,
) -> MegaMoE:
    """A MegaMoE of this rank's share of `num_experts` experts. `of_shard`: fields of its `ExpertShard`."""
    rank, num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    shard = ExpertShard.of(shape, capacity, num_experts=num_experts, rank=rank, num_ranks=num_ranks, group=group, **of_shard)
    return MegaMoE(shard, weights=weights, tiles=tiles, wave_rows=wave_rows)
