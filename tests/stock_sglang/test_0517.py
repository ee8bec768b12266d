"""The compatibility branches, in stock SGLang 0.5.17: seams, hooks, command line, loading and forward passes on real ranks.

Its platform cannot be simulated, so arguments resolve as on a CPU machine: SM90's own rules are exercised with 0.5.23 only.
"""

from __future__ import annotations

import json
import os

import pytest
import stock
import torch
from stock import EXPERTS, HIDDEN, ROUNDING

from hopper_moe.moe_backends import compat, seams, sglang_hooks
from hopper_moe.moe_backends.errors import Refusal

TABLE = "0.5.17"
EP4 = ("--tp-size", "4", "--ep-size", "4")
EP4_EXCHANGE = ("--tp-size", "4", "--enable-dp-attention", "--dp-size", "4")
TOKENS = (4, 0, 1, 5)


@pytest.fixture(scope="module")
def checkpoint() -> stock.Checkpoint:
    return stock.random_checkpoint(int(os.environ["TEST_SEED"]))


def plan() -> dict:
    return json.loads(os.environ["_HOPPER_MOE_PLAN"])


def agrees(checkpoint: stock.Checkpoint, got: torch.Tensor, x: torch.Tensor) -> bool:
    want = stock.expected(checkpoint, x, *stock.route(checkpoint, x)) + stock.expected_shared(checkpoint, x)
    return got.shape == want.shape and (not want.numel() or stock.relative_error(got, want) < ROUNDING)


@pytest.mark.parametrize("tables", [seams.LAUNCHER, seams.WORKER], ids=["launcher", "worker"])
def test_every_seam_is_as_pinned(tables):
    assert compat.installed_version() == TABLE
    assert seams.check(tables[TABLE]) == []


def test_every_hook_is_in_place():
    from sglang.srt.plugins.hook_registry import HookRegistry

    assert {hook.target for hook in sglang_hooks.AROUND[TABLE]} <= HookRegistry._patched
    targets = {hook.target for hook in sglang_hooks.TAKEOVERS[TABLE] + sglang_hooks.AROUND[TABLE]}
    assert targets <= set(seams.LAUNCHER[TABLE]) | set(seams.WORKER[TABLE])


@pytest.mark.parametrize(
    ("argv", "a2a", "ep_size"),
    [((), "none", 1), (EP4, "none", 4), (EP4_EXCHANGE, "megamoe", 4)],
    ids=["one GPU", "EP 4", "EP 4 with attention DP"],
)
def test_resolution(model, argv, a2a, ep_size):
    args = stock.resolve(model, *argv)
    assert (args.moe_runner_backend, args.moe_a2a_backend, args.ep_size) == ("auto", a2a, ep_size)
    assert plan()["kernel"] == "reference" and plan()["exchange"] == a2a
    assert args.cuda_graph_config.decode.backend == "disabled"


def test_other_launches_are_left_alone_even_after_ours(model, tmp_path):
    stock.resolve(model)
    args = stock.resolve(model, backend="triton")
    assert args.moe_runner_backend == "triton" and "_HOPPER_MOE_PLAN" not in os.environ
    assert stock.in_ranks(lambda rank: type(stock.fused_moe().quant_method).__name__, args, 1, tmp_path) == ["Fp8MoEMethod"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--enable-two-batch-overlap",), "--enable-two-batch-overlap"),
        (("--enable-lora",), "--enable-lora"),
        ((*EP4, "--moe-a2a-backend", "deepep"), "--moe-a2a-backend deepep"),
        (("--tp-size", "4"), "intermediate_size 64"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_arguments_that_are_refused(model, argv, sentence):
    with pytest.raises(Refusal, match=sentence):
        stock.resolve(model, *argv)


def test_fp8_experts_are_refused(tmp_path):
    with pytest.raises(Refusal, match="experts are fp8"):
        stock.resolve(stock.write_model(tmp_path, "F8_E4M3"))


def test_the_budget_counts_what_a_rank_gets(model):
    argv = (*EP4_EXCHANGE, "--chunked-prefill-size", "65536")
    os.environ["HOPPER_MOE_MAX_TOKENS_PER_RANK"] = "2048"
    with pytest.raises(
        ValueError, match="required_per_rank=16384|below the 16384 tokens"
    ):  # this SGLang divides once, and says so first
        stock.resolve(model, *argv)
    del os.environ["HOPPER_MOE_MAX_TOKENS_PER_RANK"], os.environ["SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK"]
    stock.resolve(model, *argv)
    assert plan()["capacity"] == 16384
    assert os.environ["SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK"] == "16384"


def factor_dropped(block) -> None:
    """0.5.17 leaves the routed scaling factor to the quant method (standard) or to the caller of the kernel (MegaMoE)."""
    block.experts.quant_method._config.routed_scaling_factor = block.routed_scaling_factor = 1.0


@pytest.mark.parametrize(("argv", "ranks"), [((), 1), (EP4, 4)], ids=["one GPU", "EP 4"])
def test_standard_mode(model, tmp_path, checkpoint, argv, ranks):
    """Parameters, loading, dispatched ids and forward; the same without the factor must not agree."""
    x = torch.randn(19, HIDDEN).bfloat16()

    def work(rank: int):
        created = {name: (tuple(p.shape), p.dtype) for name, p in stock.fused_moe().named_parameters()}
        block = stock.moe_block(checkpoint)
        y, empty = block(x.clone()), block(x[:0])
        factor_dropped(block)
        return (
            type(block.experts.quant_method).__name__,
            created,
            block.experts.dispatcher.skip_local_expert_mapping,
            y,
            empty,
            block(x.clone()),
        )

    for name, created, global_ids, y, empty, sabotaged in stock.in_ranks(work, stock.resolve(model, *argv), ranks, tmp_path):
        assert name == "HopperMoEMethod" and global_ids
        assert created["w13_weight"] == ((EXPERTS // ranks, 2 * stock.INTERMEDIATE, HIDDEN // 2), torch.int8)
        assert created["w13_weight_scale_inv"] == ((EXPERTS // ranks, 2 * stock.INTERMEDIATE, HIDDEN // 32), torch.float8_e8m0fnu)
        assert agrees(checkpoint, y, x) and empty.shape == (0, HIDDEN)
        assert not agrees(checkpoint, sabotaged, x)


def test_the_mega_moe_call_at_ep4(model, tmp_path, checkpoint):
    rows = [torch.randn(count, HIDDEN).bfloat16() for count in TOKENS]

    def work(rank: int):
        from sglang.srt.layers.moe import mega_moe

        block = stock.moe_block(checkpoint)
        assert mega_moe.should_use_mega_moe(block, rows[rank])
        y = block(rows[rank].clone())
        factor_dropped(block)
        return y, block(rows[rank].clone())

    for x, (y, sabotaged) in zip(rows, stock.in_ranks(work, stock.resolve(model, *EP4_EXCHANGE), 4, tmp_path), strict=True):
        assert agrees(checkpoint, y, x)
        assert not len(x) or not agrees(checkpoint, sabotaged, x)
