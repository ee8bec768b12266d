"""One contract for every kernel: the same random layer, the same routing, the same reference.

The reference is exact arithmetic (FP64, activations that nobody rounds) on the checkpoint's FP4 weights; how far a kernel may be
from it depends on what it does to the activations, and on nothing else. On the CPU this runs for `reference`, on a Hopper GPU for
every kernel, and for those of other projects where they are installed.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from layer_compare import relative_l2
from layer_data import Layer, make_layer

from hopper_moe.eval.layer_bench.baselines import BASELINES
from hopper_moe.eval.layer_bench.baselines.flashinfer_mxfp4 import FlashInferMxfp4Runner
from hopper_moe.eval.layer_bench.contenders import OURS, create, fill
from hopper_moe.kernels import reference
from hopper_moe.kernels.reference_weights import Mxfp4Experts
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends.kernel_specs import REGISTRY
from hopper_moe.moe_backends.runner import ExpertRunner
from hopper_moe.quantization.errors import Refusal

LIMIT = 2.0
EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 4, 640, 512
HIDDEN_OF = {"deep_gemm_mega": 1024, "humming": 1024}  # multiples of 512 only; of 256 without padding
CAPACITY = 512
W4A16_ERROR, W8A8_ERROR = 1e-2, 8e-2  # relative L2, over all rows; a row may have twice that
BF16_ACTIVATIONS = {"w4a16", "marlin", "flashinfer_mxfp4", "humming"}

ON_GPU = [pytest.param(name, "cuda", marks=pytest.mark.gpu, id=f"{name}-gpu") for name in ("reference", *OURS, *BASELINES)]
EVERY = [pytest.param("reference", "cpu", id="reference-cpu"), *ON_GPU]
SHARDED = [case for case in EVERY if case.values[0] not in BASELINES]  # peers are compared on one rank


@pytest.fixture(autouse=True)
def untuned(monkeypatch) -> None:
    """FlashInfer's tiles change its speed only, and measuring them takes seconds per shape: the benchmarks do that."""
    monkeypatch.setattr("hopper_moe.kernels.w4a16.W4A16.tune", lambda *args: None)
    monkeypatch.setattr(FlashInferMxfp4Runner, "tune", lambda *args: None)


def runner_of(kernel: str, layer: Layer, device: str, **shard: int) -> ExpertRunner:
    """A runner that holds the experts `first_expert ...` of the layer, whose tensors may be a slice."""
    if kernel in BASELINES and BASELINES[kernel].missing:
        pytest.skip(f"{kernel}: {BASELINES[kernel].missing}")
    if kernel in REGISTRY and REGISTRY[kernel].factory is None:
        pytest.skip(f"{kernel} is not built in this release")
    first, count = shard.get("first_expert", 0), shard.get("num_local_experts", layer.w13.shape[0])
    weights = [tensor[first : first + count].to(device) for tensor in layer.weights]
    runner = create(kernel)
    runner.prepare(
        fill(runner.experts_type, weights),
        ExpertShard(
            num_experts=layer.w13.shape[0],
            first_expert=first,
            num_local_experts=count,
            top_k=layer.topk_ids.shape[1],
            hidden_size=layer.x.shape[1],
            intermediate_size=layer.w13.shape[1] // 2,
            swiglu_limit=LIMIT,
            max_tokens_per_rank=CAPACITY,
        ),
    )
    return runner


def run(runner: ExpertRunner, layer: Layer, device: str) -> torch.Tensor:
    return runner.run(layer.x.to(device), layer.topk_ids.to(device), layer.topk_weights.to(device)).cpu()


def exact(layer: Layer, device: str) -> torch.Tensor:
    """Computed where the kernel runs: a batch takes a CPU seconds."""
    x, ids, weights = (tensor.to(device) for tensor in (layer.x, layer.topk_ids, layer.topk_weights))
    experts = Mxfp4Experts(*(tensor.to(device) for tensor in layer.weights))
    return reference.exact(x, ids, weights, experts, swiglu_limit=LIMIT).cpu()


def assert_is(got: torch.Tensor, want: torch.Tensor, kernel: str) -> None:
    """Within the kernel's bound of the exact result; rows that are zero must be exactly zero."""
    bound = W4A16_ERROR if kernel in BF16_ACTIVATIONS else W8A8_ERROR
    assert got.shape == want.shape and torch.isfinite(got.double()).all()
    assert relative_l2(got, want) <= bound
    for row in range(want.shape[0]):
        if not want[row].any():
            assert not got[row].any(), f"row {row} has no expert here, so it must be exact zeros"
        else:
            assert relative_l2(got[row], want[row]) <= 2 * bound, f"row {row}"


def layer_of(seed: int, num_tokens: int, kernel: str) -> Layer:
    return make_layer(
        seed,
        num_tokens=num_tokens,
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN_OF.get(kernel, HIDDEN),
        intermediate_size=INTERMEDIATE,
    )


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize(("kernel", "device"), EVERY)
@pytest.mark.parametrize("num_tokens", [1, 33, 300])
def test_a_batch(kernel, device, num_tokens, seed):
    if device == "cpu" and num_tokens == 300:
        pytest.skip("one batch is enough for a CPU")
    layer = layer_of(seed, num_tokens, kernel)
    y = run(runner_of(kernel, layer, device), layer, device)
    assert y.dtype is torch.bfloat16
    assert_is(y, exact(layer, device), kernel)


@pytest.mark.parametrize(("kernel", "device"), EVERY)
def test_no_tokens_and_then_some(kernel, device, seed):
    layer = layer_of(seed, 5, kernel)
    runner = runner_of(kernel, layer, device)
    nothing = dataclasses.replace(layer, x=layer.x[:0], topk_ids=layer.topk_ids[:0], topk_weights=layer.topk_weights[:0])
    assert run(runner, nothing, device).shape == nothing.x.shape
    assert_is(run(runner, layer, device), exact(layer, device), kernel)


@pytest.mark.parametrize(("kernel", "device"), EVERY)
def test_one_expert_takes_every_token(kernel, device, seed):
    layer = layer_of(seed, 70, kernel)
    others = torch.stack([torch.randperm(EXPERTS - 1)[: TOP_K - 1] for _ in range(70)]) + 1
    layer.topk_ids[:, 0], layer.topk_ids[:, 1:] = 0, others.int()
    assert_is(run(runner_of(kernel, layer, device), layer, device), exact(layer, device), kernel)


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize(("kernel", "device"), SHARDED)
@pytest.mark.parametrize("num_tokens", [40, 300])
def test_masked_slots_masked_tokens_and_an_expert_named_twice(kernel, device, num_tokens, seed):
    if device == "cpu" and num_tokens == 300:
        pytest.skip("one batch is enough for a CPU")
    layer = layer_of(seed, num_tokens, kernel)
    layer.topk_ids[torch.rand(layer.topk_ids.shape) < 0.3] = -1
    layer.topk_ids[7] = -1
    layer.topk_ids[8, 1], layer.topk_ids[9, 3] = layer.topk_ids[8, 0], layer.topk_ids[9, 1]
    layer.topk_ids[10:14] = torch.tensor([-1, 3, 3, 3], dtype=torch.int32)
    layer.topk_weights[layer.topk_ids < 0] = float("nan")  # what is skipped must not be read
    given = dataclasses.replace(layer, topk_weights=layer.topk_weights.nan_to_num())
    assert_is(run(runner_of(kernel, layer, device), layer, device), exact(given, device), kernel)


@pytest.mark.parametrize(("kernel", "device"), SHARDED)
def test_a_batch_without_any_expert_is_zeros(kernel, device, seed):
    layer = layer_of(seed, 6, kernel)
    layer.topk_ids.fill_(-1)
    assert not run(runner_of(kernel, layer, device), layer, device).any()


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize(("kernel", "device"), SHARDED)
@pytest.mark.parametrize("ranks", [2, 4])
def test_expert_parallel_shares_add_up(kernel, device, ranks, seed):
    """Every rank sees every token with global ids, as under SGLang's standard dispatcher, and computes its own experts only."""
    layer, share = layer_of(seed, 33, kernel), EXPERTS // ranks
    layer.topk_ids[4, :2] = -1
    total = torch.zeros(33, HIDDEN, dtype=torch.float64)
    for rank in range(ranks):
        y = run(runner_of(kernel, layer, device, first_expert=rank * share, num_local_experts=share), layer, device)
        mine = dataclasses.replace(layer, topk_ids=torch.where(layer.topk_ids // share == rank, layer.topk_ids, -1))
        assert_is(y, exact(mine, device), kernel)
        total += y.double()
    assert_is(total, exact(layer, device), kernel)


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize(("kernel", "device"), SHARDED)
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_slices_add_up(kernel, device, ranks, seed):
    """A slice holds the same rows of w1 and w3 and the same columns of w2, as SGLang's loader cuts them."""
    layer, size = layer_of(seed, 33, kernel), INTERMEDIATE // ranks
    total = torch.zeros(33, HIDDEN, dtype=torch.float64)
    for rank in range(ranks):
        rows = torch.cat([torch.arange(size) + rank * size + half for half in (0, INTERMEDIATE)])
        columns = {2: slice(rank * size // 2, (rank + 1) * size // 2), 3: slice(rank * size // 32, (rank + 1) * size // 32)}
        part = dataclasses.replace(
            layer,
            w13=layer.w13[:, rows],
            w13_scale=layer.w13_scale[:, rows],
            w2=layer.w2[:, :, columns[2]].contiguous(),
            w2_scale=layer.w2_scale[:, :, columns[3]].contiguous(),
        )
        y = run(runner_of(kernel, part, device), part, device)
        assert_is(y, exact(part, device), kernel)
        total += y.double()
    assert_is(total, exact(layer, device), kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [*OURS, *BASELINES])
def test_a_cuda_graph_replays_with_new_routing(kernel, seed):
    layer = layer_of(seed, 64, kernel)
    runner = runner_of(kernel, layer, "cuda")
    x, ids, weights = layer.x.cuda(), layer.topk_ids.cuda(), layer.topk_weights.cuda()
    runner.run(x, ids, weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = runner.run(x, ids, weights)
    for step in range(3):
        other = layer_of(seed + step, 64, kernel)
        given = dataclasses.replace(layer, x=other.x, topk_ids=other.topk_ids, topk_weights=other.topk_weights)
        for static, fresh in ((x, given.x), (ids, given.topk_ids), (weights, given.topk_weights)):
            static.copy_(fresh)
        y.fill_(float("nan"))
        graph.replay()
        assert_is(y.cpu(), exact(given, "cuda"), kernel)


@pytest.mark.parametrize("kernel", [name for name in OURS if REGISTRY[name].factory])
def test_slices_that_are_no_multiple_of_128_are_refused(kernel):
    with pytest.raises(Refusal, match="intermediate_size 64 is not a positive multiple of 128"):
        create(kernel).experts_type.empty(1, 256, 64, "cpu")
