"""Packed FP8 experts: every byte where the contract says, back bit for bit, and the same layer for the reference."""

import pytest
import torch

from hopper_moe.kernels import reference
from hopper_moe.kernels.benchmarks.workload import ModelShape, random_checkpoint, random_routing, random_tokens
from hopper_moe.kernels.reference_weights import Fp8BlockExperts, Mxfp4Experts, PackedSource
from hopper_moe.quantization import layout
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing_fp8 import (
    PackedFp8Experts,
    pack_fp8_experts,
    unpack_fp8_w2,
    unpack_fp8_w13,
)

SHAPE = ModelShape(384, 256, 3, 2, 3)


def checkpoint(seed: int, shape: ModelShape = SHAPE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random E4M3 bytes (NaN codes too: packing moves bytes) and scales of a layer, as a checkpoint has them."""
    generator = torch.Generator().manual_seed(seed)
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size

    def weight(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)

    def scale(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator) / 1000

    return (
        weight(e, 2 * i, h),
        scale(e, 2 * i // 128, h // 128),
        weight(e, h, i),
        scale(e, h // 128, i // 128),
    )


def test_every_byte_is_where_the_contract_says(seed):
    w13, w13_scale, w2, w2_scale = checkpoint(seed)
    packed = pack_fp8_experts(w13, w13_scale, w2, w2_scale)
    inter = SHAPE.intermediate_size
    draw = torch.Generator().manual_seed(seed)
    for matrix, tiles in ((w13, packed.w13_packed), (w2, packed.w2_packed)):
        for _ in range(300):
            e, row, k = (int(torch.randint(0, size, (), generator=draw)) for size in matrix.shape)
            where = row
            if matrix is w13:  # feature f of w1: packed row 16 * (f // 8) + f % 8; of w3: 8 further
                feature, is_up = row % inter, row // inter
                where = 16 * (feature // 8) + feature % 8 + 8 * is_up
            position = layout.wgmma_position(k % 128)
            byte = where % 64 * 128 + (position // 16 ^ where % 8) * 16 + position % 16
            got = tiles[e, where // 128, k // 128, where % 128 // 64, byte]
            assert got == matrix.view(torch.uint8)[e, row, k], f"expert {e}, row {row}, k {k}"
    blocks = inter // 128
    assert torch.equal(packed.w13_scale[..., 0], w13_scale[:, :blocks])
    assert torch.equal(packed.w13_scale[..., 1], w13_scale[:, blocks:])
    assert torch.equal(packed.w2_scale[..., 0], w2_scale) and torch.equal(packed.w2_scale[..., 1], w2_scale)


def test_packing_loses_nothing(seed):
    tensors = checkpoint(seed)
    packed = pack_fp8_experts(*tensors)
    for expert in range(SHAPE.num_experts):
        got = (*unpack_fp8_w13(packed, expert), *unpack_fp8_w2(packed, expert))
        for mine, wanted in zip(got, (t[expert] for t in tensors), strict=True):
            assert torch.equal(mine.view(torch.uint8), wanted.view(torch.uint8))
    assert packed.num_bytes == SHAPE.num_experts * layout.fp8_expert_bytes(SHAPE.hidden_size, SHAPE.intermediate_size)


def test_one_expert_at_a_time(seed):
    tensors = checkpoint(seed)
    whole = pack_fp8_experts(*tensors)
    single = PackedFp8Experts.empty(SHAPE.num_experts, SHAPE.hidden_size, SHAPE.intermediate_size, "cpu")
    for tensor in single.tensors:
        tensor.view(torch.uint8).fill_(0xFF)
    for expert in (2, 0, 1):
        single.store(expert, *(t[expert] for t in tensors))
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors, single.tensors, strict=True))


def test_fp4_experts_are_expanded_exactly_or_refused(seed):
    generator = torch.Generator().manual_seed(seed)
    w13, w13_scale, w2, w2_scale = random_checkpoint(SHAPE, SHAPE.num_experts, generator, "cpu", scale_bytes=(110, 124))
    packed = PackedFp8Experts.empty(SHAPE.num_experts, SHAPE.hidden_size, SHAPE.intermediate_size, "cpu")
    fp8, fp4 = PackedSource(packed), Mxfp4Experts(w13, w13_scale, w2, w2_scale)
    for expert in range(SHAPE.num_experts):
        packed.store(expert, w13[expert], w13_scale[expert], w2[expert], w2_scale[expert])
        for mine, wanted in ((fp8.w13, fp4.w13), (fp8.w2, fp4.w2)):
            matrix = mine(expert, torch.float64)
            values = matrix.values * matrix.block_scale.repeat_interleave(128, 1)
            assert torch.equal(values, wanted(expert, torch.float64).values)
    w13_scale[1, 0, 0], w13_scale[1, 1, 0], w13[1, 0, 0] = 100, 124, 0x11  # .5 * 2**-27 beside 2**-3
    with pytest.raises(Refusal, match="weights are too far below the largest of their 128 x 128 block"):
        packed.store(1, w13[1], w13_scale[1], w2[1], w2_scale[1])


def test_the_reference_reads_packed_experts(seed):
    w13, w13_scale, w2, w2_scale = checkpoint(seed)
    finite = [torch.where(w.float().isnan(), 0.5, w.float()).to(torch.float8_e4m3fn) for w in (w13, w2)]
    tensors = (finite[0], w13_scale, finite[1], w2_scale)
    generator = torch.Generator().manual_seed(seed)
    x = random_tokens(SHAPE, 9, generator, "cpu")
    ids, weights = random_routing(9, SHAPE.num_experts, SHAPE.top_k, "uniform", generator, "cpu")
    got, want = (
        reference.moe_layer(x, ids, weights, experts, swiglu_limit=None)
        for experts in (pack_fp8_experts(*tensors), Fp8BlockExperts(*tensors))
    )
    assert torch.equal(got, want) and want.any()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: (t[0].view(torch.uint8), *t[1:]), "w13 is torch.uint8"),
        (lambda t: (t[0], t[1].bfloat16(), *t[2:]), "w13_scale is torch.bfloat16"),
        (lambda t: (*t[:2], t[2][:, :256], t[3]), r"w2 is torch.float8_e4m3fn \[3, 256, 256\]"),
        (lambda t: (*t[:3], t[3][:, :, :1]), r"w2_scale is torch.float32 \[3, 3, 1\]"),
        (lambda t: (t[0][:, :500], *t[1:]), "intermediate_size 250 is not a positive multiple of 128"),
    ],
)
def test_what_does_not_belong_together_is_refused(seed, change, message):
    with pytest.raises(ValueError, match=message):
        pack_fp8_experts(*change(checkpoint(seed)))


def test_tensors_of_another_shape_are_refused():
    good = PackedFp8Experts.empty(2, 256, 128, "cpu")
    with pytest.raises(ValueError, match="w13_packed is .* make it with pack_fp8_experts"):
        PackedFp8Experts(good.w13_packed[:, :1], *good.tensors[1:])
    assert layout.FP8_UNIT_BYTES == 8192
