"""Random layers and routing for tests and benchmarks of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hopper_moe.kernels.mega_moe import MegaMoE
from hopper_moe.quantization.codecs import quantize_mxfp4
from hopper_moe.quantization.packing import PackedExperts, pack_experts
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


def random_fp8_experts(
    shape: ModelShape, num_experts: int, generator: torch.Generator, device: str = "cuda"
) -> PackedFp8Experts:
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
    num_tokens: int, num_experts: int, top_k: int, routing: str, generator: torch.Generator, device: str = "cuda"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int32 ids [num_tokens, top_k], float32 weights summing to 1 per token).

    uniform: every set of distinct experts equally likely. zipf: expert e drawn in proportion to 1 / (e + 1), distinct per token.
    one_hot: every token's first slot is expert 0, the other slots uniform over the rest.
    """
    weight = torch.ones(num_experts, device=device)
    if routing == "zipf":
        weight = 1 / torch.arange(1, num_experts + 1, device=device)
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


def make_layer(shape: ModelShape, num_experts: int, capacity: int, **options) -> MegaMoE:
    """A MegaMoE of one rank with `num_experts` experts. `options` go to it."""
    return MegaMoE(
        num_tokens_capacity=capacity,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=num_experts,
        top_k=shape.top_k,
        **options,
    )
