"""`w4a16` at the published shapes: whole experts, the slices of tensor parallelism, the shares of expert parallelism."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from layer_compare import relative_l2
from merge_check import check

from hopper_moe.eval.layer_bench.contenders import fill
from hopper_moe.kernels import reference
from hopper_moe.kernels.benchmarks.workload import SHAPES, gaussian_checkpoint, random_routing, random_tokens
from hopper_moe.kernels.reference_weights import Mxfp4Experts
from hopper_moe.kernels.w4a16 import W4A16
from hopper_moe.quantization.packing_w4a16 import InterleavedExperts

pytestmark = pytest.mark.gpu
MAX_ERROR = 1e-2
EXPERTS = 16


@pytest.mark.parametrize("tokens", [3, 96, 600])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (1, 4)])
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_against_activations_that_nobody_rounds(name, tp, ep, tokens, seed):
    shape = dataclasses.replace(SHAPES[name], intermediate_size=SHAPES[name].intermediate_size // tp)
    share = EXPERTS // ep
    generator = torch.Generator("cuda").manual_seed(seed)
    checkpoint = gaussian_checkpoint(shape, share, generator)
    x = random_tokens(shape, tokens, generator)
    ids, weights = random_routing(tokens, EXPERTS, shape.top_k, "uniform", generator)
    ids[0, 0] = -1
    experts = fill(InterleavedExperts, checkpoint)
    for rank in range(ep):  # the same weights at every rank's ids
        kernel = W4A16(
            num_tokens_capacity=tokens, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
            num_experts=EXPERTS, top_k=shape.top_k, num_local_experts=share, first_expert=rank * share,
            swiglu_limit=shape.swiglu_limit,
        )  # fmt: skip
        y = kernel(x, ids, weights, experts, out=torch.full_like(x, float("nan")))
        want = reference.exact(
            x, ids, weights, Mxfp4Experts(*checkpoint), swiglu_limit=shape.swiglu_limit, first_expert=rank * share
        )
        assert torch.isfinite(y.double()).all()
        error = relative_l2(y, want)
        print(f"{name} TP {tp} EP {ep} rank {rank}, {tokens} tokens: relative L2 {error:.2e}")
        assert error <= MAX_ERROR
        assert not y[~want.any(1)].any(), "rows without a local expert are exact zeros"
        again = kernel(x, ids, weights, experts)
        assert torch.equal(again, y), "the same call gives the same bits"


def test_an_expert_named_twice_gets_the_sum_of_its_weights(seed):
    check(seed, "cuda")
