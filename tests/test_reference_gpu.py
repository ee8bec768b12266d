"""Packing and reference on the GPU: the same bits as on the CPU, and quick enough to check kernels at full size."""

import time

import pytest
import torch
from layer_compare import assert_layers_agree
from layer_data import Layer, make_layer

from hopper_moe.kernels import reference
from hopper_moe.kernels.reference_weights import Mxfp4Experts
from hopper_moe.quantization.packing import PackedExperts, pack_experts, unpack_experts

pytestmark = pytest.mark.gpu
LIMIT, FACTOR = 2.0, 1.5


def run(layer: Layer) -> torch.Tensor:
    experts = Mxfp4Experts(*layer.weights)
    return reference.moe_layer(
        layer.x, layer.topk_ids, layer.topk_weights, experts, swiglu_limit=LIMIT, routed_scaling_factor=FACTOR
    )


def test_gpu_and_cpu_agree(seed):
    layer = make_layer(seed, num_tokens=50, num_experts=8, hidden_size=1024, intermediate_size=512)
    on_gpu = Layer(*(t.cuda() for t in (*layer.weights, layer.x, layer.topk_ids, layer.topk_weights)))
    # Only exp() may differ in its last FP64 bit, which next to never survives the rounding to FP32, E4M3 and BF16.
    assert_layers_agree(run(on_gpu).cpu(), run(layer), max_relative_l2=1e-5)
    for fp4 in (False, True):
        ours = reference.pre_dispatch(on_gpu.x, on_gpu.topk_ids, on_gpu.topk_weights, fp4=fp4)
        theirs = reference.pre_dispatch(layer.x, layer.topk_ids, layer.topk_weights, fp4=fp4)
        assert torch.equal(ours.x_q.cpu().view(torch.uint8), theirs.x_q.view(torch.uint8))
        assert torch.equal(ours.x_scale.cpu(), theirs.x_scale)


def test_gpu_packs_the_same_bytes(seed):
    layer = make_layer(seed, num_tokens=1, num_experts=3, hidden_size=512, intermediate_size=384)
    packed, on_cpu = pack_experts(*(t.cuda() for t in layer.weights)), pack_experts(*layer.weights)
    for name in ("w13_packed", "w13_base", "w2_packed", "w2_base"):
        assert torch.equal(getattr(packed, name).cpu(), getattr(on_cpu, name)), name
    for given, back in zip(layer.weights, unpack_experts(packed), strict=True):
        assert torch.equal(given, back.cpu())


def random_flash_experts(num_experts: int, generator: torch.Generator) -> PackedExperts:
    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, device="cuda", generator=generator)

    return pack_experts(
        integers(0, 256, num_experts, 4096, 2048),
        integers(116, 122, num_experts, 4096, 128),
        integers(0, 256, num_experts, 4096, 1024),
        integers(116, 122, num_experts, 4096, 64),
    )


def test_a_flash_layer_packs_and_runs_8192_tokens_in_seconds(seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    random_flash_experts(1, generator)  # warm up
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    packed = random_flash_experts(32, generator)
    torch.cuda.synchronize()
    packing = time.perf_counter() - start
    x = torch.randn(8192, 4096, device="cuda", generator=generator).bfloat16()
    ids = torch.rand(8192, 32, device="cuda", generator=generator).argsort(1)[:, :6].int()
    weights = torch.rand(8192, 6, device="cuda", generator=generator)
    start = time.perf_counter()
    y = reference.moe_layer(x, ids, weights, packed, swiglu_limit=10.0)
    torch.cuda.synchronize()
    running = time.perf_counter() - start
    gib = torch.cuda.max_memory_allocated() / 2**30
    print(f"32 Flash experts packed in {packing:.2f} s, 8192 tokens in {running:.2f} s, peak {gib:.1f} GiB")
    assert torch.isfinite(y).all() and packing < 10 and running < 60 and gib < 32
    some = slice(100, 103)
    assert torch.equal(reference.moe_layer(x[some], ids[some], weights[some], packed, swiglu_limit=10.0), y[some])
