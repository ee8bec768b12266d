"""Forward passes of stock DeepSeek-V4 MoE blocks in SGLang, on real ranks (forked, gloo), against float64 arithmetic of
our own.

Gate, top-k, dispatcher, the MegaMoE functions, shared expert and collectives are SGLang's; the kernel at the end is the
reference.
"""

from __future__ import annotations

import os

import pytest
import stock
import torch
from stock import FACTOR, HIDDEN, ROUNDING, TOP_K

from hopper_moe.kernels.reference import moe_layer
from hopper_moe.moe_backends.sglang import seams
from hopper_moe.moe_backends.sglang.hooks import MARK, STAGE_LOOPS, TAKEOVERS

TOKENS = (4, 0, 1, 3, 0, 2, 5, 4)  # rows of each rank under attention data parallelism
EP8 = ("--tp-size", "8", "--ep-size", "8")
EP8_EXCHANGE = ("--tp-size", "8", "--attn-dp-size", "8")


@pytest.fixture(scope="module")
def checkpoint(seed) -> stock.Checkpoint:
    return stock.random_checkpoint(seed)


@pytest.fixture(scope="module")
def rows(seed) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed + 1)
    return [torch.randn(count, HIDDEN, generator=rng).bfloat16() for count in TOKENS]


def wanted(checkpoint: stock.Checkpoint, x: torch.Tensor) -> torch.Tensor:
    return stock.expected(checkpoint, x, *stock.route(checkpoint, x)) + stock.expected_shared(checkpoint, x)


def agrees(got: torch.Tensor, want: torch.Tensor) -> bool:
    return (
        got.dtype is torch.bfloat16
        and got.shape == want.shape
        and (not want.numel() or stock.relative_error(got, want) < ROUNDING)
    )


# ---- standard dispatcher: every rank sees all rows, SGLang sums over ranks


def run_standard(model, tmp_path, checkpoint, x, argv, ranks, sabotage=lambda block: None):
    def work(rank: int):
        block = stock.moe_block(checkpoint)
        sabotage(block)
        return block(x.clone()), block(x[:0])

    return stock.in_ranks(work, stock.resolve(model, *argv), ranks, tmp_path)


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize(("argv", "ranks"), [((), 1), (("--tp-size", "2"), 2), (EP8, 8)], ids=["one GPU", "TP 2", "EP 8"])
def test_standard_mode(model, tmp_path, checkpoint, rows, argv, ranks):
    x = torch.cat(rows)
    for y, empty in run_standard(model, tmp_path, checkpoint, x, argv, ranks):
        assert agrees(y, wanted(checkpoint, x)) and empty.shape == (0, HIDDEN)


def test_a_batch_above_the_capacity_runs_in_pieces_with_the_same_bits(model, tmp_path, checkpoint, rows):
    x = torch.cat(rows)
    ((whole, _),) = run_standard(model, tmp_path, checkpoint, x, (), 1)
    os.environ["HOPPER_MOE_MAX_TOKENS_PER_RANK"] = "7"
    ((pieces, _),) = run_standard(model, tmp_path, checkpoint, x, (), 1)
    assert torch.equal(whole, pieces)


def test_ids_of_a_packed_layer_stay_global(model, checkpoint):
    """Making them local and back costs eight launches a layer."""
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    stock.publish(stock.resolve(model, *EP8), 3)
    layer = stock.fused_moe()
    stock.load(layer, checkpoint.tensors)
    layer.quant_method.process_weights_after_loading(layer)
    ids = torch.tensor([[0, 5, 6, 7, -1, 15]], dtype=torch.int32)
    topk = StandardTopKOutput(torch.ones(1, 6), ids, None)
    assert layer.dispatcher.dispatch(torch.zeros(1, HIDDEN), topk).topk_output.topk_ids is ids


# ---- the MegaMoE functions: every rank has its own rows and gets complete sums back


def run_exchange(model, tmp_path, checkpoint, rows, argv=EP8_EXCHANGE, sabotage=lambda block: None):
    def work(rank: int):
        from sglang.srt.layers.moe import mega_moe

        calls = []
        block = stock.moe_block(checkpoint)
        run = block.experts.quant_method.run_mega
        block.experts.quant_method.run_mega = lambda *args, **kwargs: calls.append((args, kwargs)) or run(*args, **kwargs)
        sabotage(block)
        assert mega_moe.should_use_mega_moe(block, rows[rank])
        y = block(rows[rank].clone())
        ((_, x, ids, weights), kwargs) = calls[0]
        taken_over = all(seams.resolve(hook.target).__wrapped__ for hook in TAKEOVERS + STAGE_LOOPS)
        return y, ids, weights, kwargs, taken_over, len(calls)

    return stock.in_ranks(work, stock.resolve(model, *argv), len(rows), tmp_path)


def test_the_mega_moe_call_at_ep8(model, tmp_path, checkpoint, rows):
    for x, (y, ids, weights, kwargs, taken_over, calls) in zip(
        rows, run_exchange(model, tmp_path, checkpoint, rows), strict=True
    ):
        assert taken_over and calls == 1
        assert kwargs["num_tokens"] == len(x) and kwargs["top_k"] == TOP_K and kwargs["hidden_size"] == HIDDEN
        assert kwargs["activation_clamp"] == stock.LIMIT and kwargs["routed_scaling_factor"] == 1.0, (
            "the factor is in the weights"
        )
        if not len(x):
            assert ids is None and weights is None and y.shape == (0, HIDDEN)
            continue
        own_ids, own_weights = stock.route(checkpoint, x)
        assert torch.equal(ids.sort(-1).values.long(), own_ids.sort(-1).values), "global ids"
        torch.testing.assert_close(weights.sum(-1).double(), own_weights.sum(-1))
        assert agrees(y, wanted(checkpoint, x))


def test_the_exchange_has_the_bits_of_one_rank_with_all_experts(model, tmp_path, checkpoint, rows):
    experts = stock.whole_experts(checkpoint)

    def no_shared_expert(block):
        block._forward_shared_experts = lambda hidden_states: None

    found = run_exchange(model, tmp_path, checkpoint, rows, sabotage=no_shared_expert)
    for x, (y, ids, weights, *_) in zip(rows, found, strict=True):
        if len(x):
            assert torch.equal(y, moe_layer(x, ids, weights, experts, swiglu_limit=stock.LIMIT))


def test_the_exchange_on_one_gpu(model, tmp_path, checkpoint, rows):
    ((y, *_),) = run_exchange(model, tmp_path, checkpoint, rows[:1], ("--moe-a2a-backend", "megamoe"))
    assert agrees(y, wanted(checkpoint, rows[0]))


@pytest.mark.one_seed_in(4)
def test_nobody_has_tokens(model, tmp_path, checkpoint, rows):
    for y, *_ in run_exchange(model, tmp_path, checkpoint, [rows[1]] * 8):
        assert y.shape == (0, HIDDEN)


def test_too_many_tokens_are_refused_not_rerouted(model, tmp_path, checkpoint):
    """SGLang leaves the fused path above its limit, into one that would add up rows of different tokens."""
    x = torch.randn(33, HIDDEN).bfloat16()

    def work(rank: int):
        block = stock.moe_block(checkpoint)
        try:
            block(x)
        except ValueError as refusal:
            return str(refusal)

    os.environ["HOPPER_MOE_MAX_TOKENS_PER_RANK"] = "32"
    args = stock.resolve(model, "--moe-a2a-backend", "megamoe", "--chunked-prefill-size", "32", "--max-running-requests", "8")
    (sentence,) = stock.in_ranks(work, args, 1, tmp_path)
    assert "33 tokens came past the fused exchange, whose limit is 32 per rank" in sentence


def test_layers_without_our_mark_go_to_the_original(model):
    from sglang.srt.layers.moe import mega_moe

    stock.publish(stock.resolve(model, "--moe-a2a-backend", "megamoe"))
    layer = stock.fused_moe()
    assert not getattr(layer, MARK, False) and not mega_moe.is_mega_moe_experts_ready(layer)
    original = mega_moe.run_mega_routed_experts.__wrapped__
    assert original.__module__ == mega_moe.__name__ and original.__name__ == "run_mega_routed_experts"


# ---- sabotage: what these tests are for. Each change must make the check above fail.


def factor_dropped(block):
    block.topk.topk_config.apply_routed_scaling_factor_on_output = False


def factor_doubled(block):
    backend = block.experts.quant_method._backend
    for name in ("run", "run_across_ranks"):
        run = getattr(backend, name)
        setattr(backend, name, lambda x, ids, weights, run=run: run(x, ids, weights * FACTOR))


def local_ids_as_global(block):
    block.experts.dispatcher.skip_local_expert_mapping = False


def global_ids_shifted(block):
    backend = block.experts.quant_method._backend
    run = backend.run
    backend.run = lambda x, ids, weights: run(x, torch.where(ids < 0, ids, ids + backend._shard.first_expert), weights)


def gate_and_up_swapped(block):
    for name in ("w13_packed", "w13_base"):
        tensor = getattr(block.experts, name).data
        if name == "w13_base":
            pairs = tensor.view(tensor.shape[0], -1, 2, 8)
            pairs.copy_(pairs.flip(2).clone())
        else:  # a unit is [warp, half, lane, g2, r8] words: r8 is gate or up
            words = tensor[..., :4096].unflatten(-1, (-1, 2, 4))
            words.copy_(words.flip(-2).clone())
            deltas = tensor[..., 4096:].unflatten(-1, (4, 2, 8, 4))
            deltas.copy_(deltas.flip(-3).clone())


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize(
    "sabotage", [factor_dropped, factor_doubled, local_ids_as_global, global_ids_shifted, gate_and_up_swapped]
)
def test_sabotage_is_noticed_in_standard_mode(model, tmp_path, checkpoint, rows, sabotage):
    x = torch.cat(rows)
    for y, _ in run_standard(model, tmp_path, checkpoint, x, EP8, 8, sabotage):
        assert not agrees(y, wanted(checkpoint, x))


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("sabotage", [factor_dropped, factor_doubled, gate_and_up_swapped])
def test_sabotage_is_noticed_in_the_exchange(model, tmp_path, checkpoint, rows, sabotage):
    found = run_exchange(model, tmp_path, checkpoint, rows, sabotage=sabotage)
    assert not any(agrees(y, wanted(checkpoint, x)) for x, (y, *_) in zip(rows, found, strict=True) if len(x))
