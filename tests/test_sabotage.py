"""Each classic mistake, made on purpose in the pipeline bytes -> packing -> two ranks, is caught by the tests' own comparison.

The pipeline below is the honest one; a sabotage replaces one step of it. Truth is `layer_oracle`, which shares no code with it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import layer_oracle
import pytest
import torch
from layer_compare import assert_layers_agree
from layer_data import Layer, make_layer

from hopper_moe.kernels import reference
from hopper_moe.quantization.packing import PackedExperts, interleave_rows, pack_experts

LIMIT, FACTOR, RANKS = 1.5, 2.5, 2


def keep(value):
    return value


@dataclass(frozen=True)
class Pipeline:
    """The steps that a sabotage can replace; each takes what the honest step made (`ids` also the rank's first expert)."""

    weights: Callable[[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]] = keep  # a rank's checkpoint bytes
    packed: Callable[[PackedExperts], PackedExperts] = keep
    ids: Callable[[torch.Tensor, int], torch.Tensor] = lambda ids, first: ids
    tokens: Callable[[reference.DispatchedTokens], reference.DispatchedTokens] = keep
    first_expert: Callable[[int], int] = keep
    factor: float = FACTOR
    swiglu_limit: float | None = LIMIT

    def run(self, layer: Layer) -> torch.Tensor:
        """Two expert-parallel ranks, with all tokens and its half of the experts; the parts are added as an all-reduce does."""
        share = layer.w13.shape[0] // RANKS
        total = torch.zeros(layer.x.shape)
        for rank in range(RANKS):
            packed = self.packed(pack_experts(*self.weights(layer.rank_weights(rank, RANKS))))
            first = self.first_expert(rank * share)
            ids = self.ids(layer.topk_ids, rank * share).long() - first
            local = torch.where((ids >= 0) & (ids < share), ids, -1)
            tokens = self.tokens(reference.pre_dispatch(layer.x, local, layer.topk_weights, routed_scaling_factor=self.factor))
            (part,) = reference.mega_moe([tokens], [packed], num_experts=share, swiglu_limit=self.swiglu_limit)
            total += part.float()
        return total.bfloat16()


def swap_gate_and_up(weights):
    w13, w13_scale, w2, w2_scale = weights
    half = w13.shape[1] // 2
    return w13.roll(half, 1), w13_scale.roll(half, 1), w2, w2_scale


def swap_nibbles(weights):
    w13, w13_scale, w2, w2_scale = weights
    return (w13 << 4) | (w13 >> 4), w13_scale, w2, w2_scale


def swap_nibbles_of_w2(weights):
    w13, w13_scale, w2, w2_scale = weights
    return w13, w13_scale, (w2 << 4) | (w2 >> 4), w2_scale


def unsigned_weights(weights):
    return weights[0] & 0x77, *weights[1:]


def scale_one_too_large(weights):
    return weights[0], weights[1] + 1, *weights[2:]


def experts_in_reverse(packed):
    return replace(packed, w2_packed=packed.w2_packed.flip(0).contiguous(), w2_base=packed.w2_base.flip(0).contiguous())


def rows_not_interleaved(weights):
    """What a loader does that forgets that pack_experts interleaves: it interleaves once more."""
    rows = interleave_rows(weights[2].shape[2] * 2)
    return weights[0][:, rows], weights[1][:, rows], *weights[2:]


def base_forgotten(packed):
    return replace(packed, w13_base=torch.full_like(packed.w13_base, 120))


def deltas_of_the_next_group(packed):
    shifted = packed.w2_packed.clone()
    shifted[..., 4096:] = packed.w2_packed[..., 4096:].roll(1, -1)
    return replace(packed, w2_packed=shifted)


def one_activation_scale_for_all(tokens):
    return replace(tokens, x_scale=tokens.x_scale[:1].expand_as(tokens.x_scale).contiguous())


def weights_of_the_wrong_slot(tokens):
    return replace(tokens, topk_weights=tokens.topk_weights.flip(1))


SABOTAGES = {
    "routed scaling factor dropped": Pipeline(factor=1.0),
    "routed scaling factor applied twice": Pipeline(factor=FACTOR**2),
    "gate and up swapped": Pipeline(weights=swap_gate_and_up),
    "rows interleaved twice": Pipeline(weights=rows_not_interleaved),
    "nibbles of w13 swapped": Pipeline(weights=swap_nibbles),
    "nibbles of w2 swapped": Pipeline(weights=swap_nibbles_of_w2),
    "signs lost": Pipeline(weights=unsigned_weights),
    "scale byte one too large": Pipeline(weights=scale_one_too_large),
    "local ids fed as global ones": Pipeline(ids=lambda ids, first: ids - first),
    "global ids fed as local ones": Pipeline(first_expert=lambda first: 0),
    "w2 of another expert": Pipeline(packed=experts_in_reverse),
    "row bases lost": Pipeline(packed=base_forgotten),
    "scale deltas of the neighbouring group": Pipeline(packed=deltas_of_the_next_group),
    "swiglu_limit not passed on": Pipeline(swiglu_limit=None),
    "one activation scale for every token": Pipeline(tokens=one_activation_scale_for_all),
    "top-k weights of another slot": Pipeline(tokens=weights_of_the_wrong_slot),
}


@functools.cache
def layer_and_truth(seed: int) -> tuple[Layer, torch.Tensor]:
    layer = make_layer(seed, num_tokens=6, num_experts=4, top_k=2, hidden_size=640, intermediate_size=256)
    layer.topk_ids[:] = torch.tensor([[0, 3], [1, 2], [2, 0], [3, 1], [0, 1], [3, 2]])  # both ranks, every expert
    y = layer_oracle.layer(
        layer.x.float().numpy(),
        layer.topk_ids.numpy(),
        layer.topk_weights.numpy(),
        *(tensor.numpy() for tensor in layer.weights),
        swiglu_limit=LIMIT,
        routed_scaling_factor=FACTOR,
    )
    return layer, torch.from_numpy(y).bfloat16()


def check(pipeline: Pipeline, seed: int) -> None:
    layer, truth = layer_and_truth(seed)
    # Two ranks round their partial sums to BF16 before they are added, the oracle does not: no more may differ.
    assert_layers_agree(pipeline.run(layer), truth, max_relative_l2=5e-3)


def test_the_honest_pipeline_passes(seed):
    check(Pipeline(), seed)


@pytest.mark.parametrize("name", SABOTAGES)
def test_sabotage_is_caught(name, seed):
    with pytest.raises(AssertionError, match=r"relative L2|cosine|token \d+") as caught:
        check(SABOTAGES[name], seed)
    print(f"{name}: {caught.value}")
