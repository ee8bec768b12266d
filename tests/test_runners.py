"""One layer behind the `ExpertRunner` interface: as the quant method hands it over, on the CPU and (marked) on one Hopper GPU.

Needs no SGLang: `pack_layer` works on any module with the four checkpoint parameters.
"""

from __future__ import annotations

import pytest
import torch
from layer_data import Layer, make_layer
from mega_moe_rig import block_counts
from torch._subclasses.fake_tensor import FakeTensorMode

from hopper_moe.kernels import reference
from hopper_moe.kernels.expert_blocks import most_rows, run_on_blocks
from hopper_moe.kernels.reference_weights import Mxfp4Experts
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends.registry import create_runner
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.sglang_checks import CHECKPOINT_PARAMETERS
from hopper_moe.quantization.sglang_loading import PACKED_PARAMETERS, pack_layer

LIMIT = 2.0
ROUNDING = 0.1  # relative error that E4M3 activations may make; 0.05 is usual
SIZES = {"num_experts": 8, "hidden_size": 640, "intermediate_size": 384}


def module_of(weights: tuple[torch.Tensor, ...], experts: slice, device: str) -> torch.nn.Module:
    """What SGLang's loader leaves behind on a rank that holds `experts`."""
    module = torch.nn.Module()
    for name, tensor in zip(CHECKPOINT_PARAMETERS, weights, strict=True):
        dtype = torch.float8_e8m0fnu if "scale" in name else torch.int8
        data = tensor[experts].clone().to(device).view(torch.uint8).view(dtype)
        module.register_parameter(name, torch.nn.Parameter(data, requires_grad=False))
    module.num_local_experts = module.w13_weight.shape[0]
    return module


def shard_of(layer: Layer, module: torch.nn.Module, first_expert: int) -> ExpertShard:
    return ExpertShard(
        num_experts=SIZES["num_experts"],
        first_expert=first_expert,
        num_local_experts=module.num_local_experts,
        top_k=layer.topk_ids.shape[1],
        hidden_size=SIZES["hidden_size"],
        intermediate_size=SIZES["intermediate_size"],
        swiglu_limit=LIMIT,
        max_tokens_per_rank=64,
    )


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double().cpu() - wanted).norm() / wanted.norm())


def run_in_shards(kernel: str, seed: int, device: str, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over ranks of the kernel's partial results, FP64 result of the whole layer with activations that are not
    quantised)."""
    layer = make_layer(seed, num_tokens=33, **SIZES)
    layer.topk_ids[5] = -1
    total = torch.zeros(layer.x.shape, dtype=torch.float64)
    per_rank = SIZES["num_experts"] // ranks
    for rank in range(ranks):
        module = module_of(layer.weights, slice(rank * per_rank, (rank + 1) * per_rank), device)
        packed = pack_layer(module)
        assert all(getattr(module, name).is_cuda == (device == "cuda") for name in PACKED_PARAMETERS)
        assert not any(getattr(module, name).numel() for name in CHECKPOINT_PARAMETERS), "the originals are freed"
        runner = create_runner(kernel)
        runner.prepare(packed, shard_of(layer, module, rank * per_rank))
        given = layer.x.to(device), layer.topk_ids.to(device, torch.int32), layer.topk_weights.to(device)
        y = runner.run(*given)
        assert y.dtype is torch.bfloat16 and y.data_ptr() != given[0].data_ptr() and not y[5].any()
        there = torch.full_like(y, float("nan"))
        assert runner.run(*given, there).data_ptr() == there.data_ptr() and torch.equal(there, y)
        assert runner.run(*(t[:0] for t in given)).shape == (0, SIZES["hidden_size"])
        total += y.double().cpu()
    experts = Mxfp4Experts(*layer.weights)
    return total, reference.exact(layer.x, layer.topk_ids, layer.topk_weights, experts, swiglu_limit=LIMIT)


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_reference_runner_on_the_cpu(seed, ranks):
    assert relative_error(*run_in_shards("reference", seed, "cpu", ranks)) < ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_reference_kernel_serves_a_layer_on_the_gpu(seed, ranks):
    assert relative_error(*run_in_shards("reference", seed, "cuda", ranks)) < ROUNDING


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 4])
def test_the_fused_kernel_serves_the_same_layer_on_the_gpu(seed, ranks):
    total, wanted = run_in_shards("mxfp4_mega", seed, "cuda", ranks)
    assert relative_error(total, wanted) < ROUNDING
    reference_total, _ = run_in_shards("reference", seed, "cuda", ranks)
    assert relative_error(total, reference_total) < 1e-2, (
        "same roundings; FP32 sums may move a few values to the next E4M3 number"
    )


def test_experts_of_another_layer_are_refused(seed):
    layer = make_layer(seed, num_tokens=1, **SIZES)
    module = module_of(layer.weights, slice(0, 4), "cpu")
    packed = pack_layer(module)
    module.num_local_experts = 8
    with pytest.raises(Refusal, match="4 experts of 640 x 384 were packed for a layer of 8 of 640 x 384"):
        create_runner("reference").prepare(packed, shard_of(layer, module, 0))


@pytest.mark.parametrize("kernel", ["mxfp4_mega", "fp8_mega"])
def test_another_group_than_prepared_for_is_refused_by_the_kernels_name(kernel, monkeypatch):
    runner = create_runner(kernel)
    monkeypatch.setattr(runner, "_group", None, raising=False)  # as `prepare` without a group leaves it, which takes a GPU
    with pytest.raises(Refusal, match=f"^{kernel} was prepared for another group"):
        runner.run_across_ranks(torch.empty(0), torch.empty(0), torch.empty(0), group=object())


def test_blocks_of_rows_run_without_a_look_at_their_counts():
    """A CUDA graph captures it: fake tensors have no values to look at."""
    with FakeTensorMode():
        blocks, sizes = torch.empty(4, 9, 8, dtype=torch.bfloat16), []
        y = run_on_blocks(blocks, torch.empty(4, dtype=torch.int32), 3, lambda x, *_: sizes.append(x.shape) or x)
    assert (y.dtype, y.shape) == (torch.bfloat16, blocks.shape) and y.is_contiguous()
    assert sizes == [(most_rows(4, 9, 3), 8)] == [(27, 8)]


@pytest.mark.parametrize(("experts", "most"), [(2, 18), (3, 27), (40, 27)])
def test_every_row_of_a_block_is_listed_once(experts, most, seed):
    """Rows that nine tokens sent to three experts each, or to all there are; each comes back where it lay, from its expert."""
    assert most_rows(experts, 9, 3) == most
    counts = block_counts(9, experts, min(3, experts), torch.Generator().manual_seed(seed), "cpu")
    blocks = torch.arange(experts * 9 * 8.0).view(experts, 9, 8).bfloat16()
    is_row = torch.arange(9) < counts[:, None]

    def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        assert ids.dtype is torch.int32 and weights.dtype is torch.float32 and weights.eq(1).all()
        assert len(x) == most and ids.shape == (most, 3) and ids[:, 1:].eq(-1).all()
        assert torch.equal(torch.bincount(ids[:, 0] + 1, minlength=experts + 1)[1:], counts.long())
        return x + ids[:, :1].bfloat16()

    y = run_on_blocks(blocks, counts, 3, run)
    assert torch.equal(y[is_row], (blocks + torch.arange(experts)[:, None, None].bfloat16())[is_row])
