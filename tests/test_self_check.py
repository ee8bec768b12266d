"""The check before serving: it passes for kernels that compute the layer and refuses every deliberate mistake."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from layer_data import make_layer

from hopper_moe.kernels import reference
from hopper_moe.kernels.reference_weights import Fp8BlockExperts, Mxfp4Experts
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends import self_check
from hopper_moe.quantization.codecs import power_of_two, quantize_fp8_blocks
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import pack_experts

SIZES = {"num_experts": 8, "hidden_size": 640, "intermediate_size": 384}
FIRST, LOCAL, LIMIT = 4, 4, 2.0


class Runner:
    """The reference on packed experts, with `mistake` applied to what goes in and what comes out."""

    def __init__(self, packed, mistake: Callable) -> None:
        self._packed, self._mistake = packed, mistake

    def run(self, hidden_states, topk_ids, topk_weights):
        def layer(x, ids, weights, limit=LIMIT, experts=self._packed):
            return reference.moe_layer(x, ids, weights, experts, swiglu_limit=limit, first_expert=FIRST)

        return self._mistake(layer, hidden_states, topk_ids, topk_weights)


MISTAKES = {
    "scaling factor dropped": lambda layer, x, ids, w: layer(x, ids, w / 1.5),
    "scaling factor twice": lambda layer, x, ids, w: layer(x, ids, w * 1.5),
    "next expert": lambda layer, x, ids, w: layer(x, torch.where(ids >= FIRST, FIRST + (ids + 1 - FIRST) % LOCAL, ids), w),
    "weights of another slot": lambda layer, x, ids, w: layer(x, ids, w.roll(1, 1)),
    "tokens shifted": lambda layer, x, ids, w: layer(x.roll(1, 0), ids, w),
    "no clamp": lambda layer, x, ids, w: layer(x, ids, w, limit=None),
    "masked slot computed": lambda layer, x, ids, w: layer(x, torch.where(ids < 0, FIRST, ids), w),
    "one token lost": lambda layer, x, ids, w: layer(x, ids, w).index_fill(0, torch.tensor([3]), 0),
    "not a number": lambda layer, x, ids, w: layer(x, ids, w) * float("nan"),
    "one NaN": lambda layer, x, ids, w: layer(x, ids, w).index_fill(1, torch.tensor([5]), float("nan")),
    "rows missing": lambda layer, x, ids, w: layer(x, ids, w)[:-1],
}


@pytest.fixture(scope="module")
def setup(seed):
    layer = make_layer(seed, **SIZES)
    weights = tuple(tensor[FIRST : FIRST + LOCAL] for tensor in layer.weights)
    shard = ExpertShard(
        num_experts=SIZES["num_experts"], first_expert=FIRST, num_local_experts=LOCAL, top_k=3, hidden_size=SIZES["hidden_size"],
        intermediate_size=SIZES["intermediate_size"], swiglu_limit=LIMIT, max_tokens_per_rank=64,
    )  # fmt: skip
    return Mxfp4Experts(*weights), pack_experts(*weights), shard


@pytest.fixture
def sample(setup, seed) -> Callable[..., self_check.Sample]:
    """A function of what the kernel computes and the sample's number."""
    checkpoint, _, shard = setup
    cpu = torch.device("cpu")
    return lambda definition="moe_layer", number=0: self_check.expect(definition, checkpoint, shard, cpu, seed=seed + number)


def test_a_kernel_that_computes_the_layer_passes(setup, sample):
    right = Runner(setup[1], lambda layer, x, ids, w: layer(x, ids, w))
    assert self_check.require_agreement("layer", "mxfp4_mega", right, sample()) == 0


def test_rounding_as_the_fused_kernel_does_it_passes(setup, sample):
    """FP32 sums move values over E4M3 edges, as the kernel's order of sums does: the error is of its size, and passes."""
    rounds = Runner(setup[1], lambda layer, x, ids, w: layer(x, ids, w) * (1 + 1.4e-2 * torch.randn(x.shape).sign()))
    assert 1.2e-2 < self_check.require_agreement("layer", "mxfp4_mega", rounds, sample()) < 1.7e-2


def test_the_default_type_of_torch_does_not_matter(setup, sample):
    """SGLang loads models with BF16 as default; the runner's interface wants FP32 weights whatever it is."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        drawn = sample()
    finally:
        torch.set_default_dtype(torch.float32)
    assert [t.dtype for t in (drawn.hidden_states, drawn.topk_ids, drawn.topk_weights)] == [
        torch.bfloat16,
        torch.int32,
        torch.float32,
    ]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_refused(setup, sample, mistake):
    with pytest.raises(Refusal, match="differs from the reference|returned"):
        self_check.require_agreement("layer", "mxfp4_mega", Runner(setup[1], MISTAKES[mistake]), sample())


def test_a_wrong_conversion_is_refused(setup, sample):
    """The expectation comes from the checkpoint's tensors, so packing is checked too."""
    packed = setup[1]
    packed.w2_base[1] += 1
    try:
        with pytest.raises(Refusal, match="differs"):
            for number in range(20):  # an expert may be missing from one sample of 6 tokens
                right = Runner(packed, lambda layer, x, ids, w: layer(x, ids, w))
                self_check.require_agreement("layer", "mxfp4_mega", right, sample(number=number))
    finally:
        packed.w2_base[1] -= 1


def test_fp8_experts_are_checked_too(setup, seed):
    """Block-scaled FP8 experts as the checkpoint has them; a mistake does not pass."""
    shard = setup[2]
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in ((LOCAL, 2 * 384, 640), (LOCAL, 640, 384))]
    (w13, w13_scale), (w2, w2_scale) = (
        tuple(torch.stack(parts) for parts in zip(*(quantize_fp8_blocks(m) for m in matrix), strict=True)) for matrix in weights
    )
    experts = Fp8BlockExperts(
        w13, power_of_two(w13_scale.int() - 127, torch.float32), w2, power_of_two(w2_scale.int() - 127, torch.float32)
    )
    right = Runner(experts, lambda layer, x, ids, w: layer(x, ids, w))
    drawn = self_check.expect("moe_layer", experts, shard, torch.device("cpu"), seed=seed)
    assert self_check.require_agreement("layer", "fp8_mega", right, drawn) == 0
    with pytest.raises(Refusal, match="differs"):
        self_check.require_agreement("layer", "fp8_mega", Runner(experts, MISTAKES["scaling factor dropped"]), drawn)


def test_a_kernel_without_quantised_activations_has_its_own_reference(setup, sample):
    checkpoint, packed, shard = setup

    def unquantised(layer, x, ids, w):
        return reference.w4a16(x, ids, w, packed, swiglu_limit=LIMIT, first_expert=FIRST)

    self_check.require_agreement("layer", "w4a16", Runner(packed, unquantised), sample("w4a16"))
    for mistake in ("scaling factor dropped", "next expert", "no clamp", "one token lost", "one NaN"):
        with pytest.raises(Refusal, match="differs"):
            self_check.require_agreement("layer", "w4a16", Runner(packed, MISTAKES[mistake]), sample("w4a16"))
