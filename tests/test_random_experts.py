"""Random experts and routers as they are drawn, without SGLang."""

from __future__ import annotations

import pytest
import torch

from hopper_moe.kernels.benchmarks.workload import SHAPES
from hopper_moe.moe_backends import env
from hopper_moe.moe_backends.sglang.startup import tensor_bytes
from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import decode_ue8m0, dequantize_mxfp4
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import PackedExperts, WidePackedExperts
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts
from hopper_moe.quantization.packing_w4a16 import InterleavedExperts
from hopper_moe.quantization.random_experts import generator, random_matrix
from hopper_moe.quantization.random_routing import hash_table
from hopper_moe.quantization.routing_law import MAX_SHARE, Routing, shares

CPU = torch.device("cpu")


def test_fp4_weights_are_normal_and_quantised_as_a_checkpoints(seed):
    weight, scale = random_matrix("w1", 512, 256, True, generator(CPU, seed))
    assert weight.shape == (256, 256) and weight.dtype is torch.int8 and scale.dtype is torch.float8_e8m0fnu
    source = generator(CPU, seed)
    exact = torch.randn(256, 512, generator=source) * 512**-0.5
    step = decode_ue8m0(scale).repeat_interleave(32, -1)
    assert (dequantize_mxfp4(weight, scale).float() - exact).abs().le(step).all()  # half of the widest gap, 4 to 6
    amax = exact.unflatten(-1, (-1, 32)).abs().amax(-1)
    assert (amax / decode_ue8m0(scale)).le(6).all() and (amax / decode_ue8m0(scale)).gt(2.99).all()
    assert int(scale.view(torch.uint8).amax(1).sub(scale.view(torch.uint8).amin(1)).max()) <= layout.MAX_DELTA


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_hash_tables_have_exact_shares_of_distinct_experts(seed, exponent):
    tokens, experts, top_k = 8192, 64, 6
    table = hash_table(Routing(exponent), tokens, experts, top_k, generator(CPU, seed))
    assert table.shape == (tokens, top_k) and int((table.sort(1).values.diff(dim=1) == 0).sum()) == 0
    found = torch.bincount(table.flatten(), minlength=experts) / tokens
    wanted = torch.tensor(shares(Routing(exponent), experts, top_k))
    bound = 5 * (wanted * (1 - wanted) / tokens).sqrt()  # five standard deviations
    assert ((found.sort(descending=True).values - wanted).abs() <= bound).all()


@pytest.mark.parametrize(("experts", "top_k"), [(256, 6), (384, 6), (128, 3), (16, 4), (4, 4), (4, 2)])
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_shares_sum_up(experts, top_k, exponent):
    found = shares(Routing(exponent), experts, top_k)
    assert len(found) == experts and sum(found) == pytest.approx(top_k) and max(found) <= max(MAX_SHARE, top_k / experts) + 1e-6
    assert found == sorted(found, reverse=True)


def test_the_variable():
    assert str(env.load({}).dummy_routing) == "uniform"
    assert env.load({"HOPPER_MOE_DUMMY_ROUTING": "zipf:1.5"}).dummy_routing == Routing(1.5)
    for text in ("", "zipf", "zipf:0", "zipf:2.1", "zipf:-1", "zipf:1e0", "Uniform"):
        with pytest.raises(Refusal, match=r"HOPPER_MOE_DUMMY_ROUTING='.*' is no routing: use uniform, or zipf:S"):
            env.load({"HOPPER_MOE_DUMMY_ROUTING": text})


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("packed", [PackedExperts, WidePackedExperts, InterleavedExperts, PackedFp8Experts])
def test_packed_experts_take_at_most_7_percent_more_than_the_checkpoint(shape, packed):
    hidden, inter = shape.hidden_size, shape.intermediate_size
    weights = 3 * hidden * inter
    checkpoint = weights + 4 * weights // 128**2 if packed is PackedFp8Experts else weights // 2 + weights // 32
    tensors = packed.empty(2, hidden, inter, "meta")
    assert checkpoint <= tensor_bytes(tensors) / 2 <= 1.07 * checkpoint
