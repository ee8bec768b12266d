"""DeepEP's normal mode on four ranks of stock SGLang; only the transport is not its own."""

from __future__ import annotations

import ast
import os
from importlib.util import find_spec
from pathlib import Path

import gloo_deepep
import pytest
import stock
import torch
from stock import EXPERTS, HIDDEN, ROUNDING

from hopper_moe.kernels.reference import moe_layer
from hopper_moe.moe_backends.sglang.group_rules import DEEPEP_RANKS
from hopper_moe.quantization.errors import Refusal

RANKS, HOT = 4, 5
TOKENS = (4, 0, 1, 3)
LOCAL = EXPERTS // RANKS
LAUNCH = ("--tp-size", "4", "--attn-dp-size", "4", "--moe-a2a-backend", "deepep", "--deepep-mode", "normal")


@pytest.fixture(scope="module")
def checkpoint(seed) -> stock.Checkpoint:
    """One expert that every token chooses."""
    found = stock.random_checkpoint(seed)
    found.bias[HOT] = 100
    return found


def on_ranks(checkpoint: stock.Checkpoint, rows: list[torch.Tensor]):
    def work(rank: int):
        from sglang.srt.layers.moe.topk import StandardTopKOutput

        def experts(x: torch.Tensor) -> torch.Tensor:
            ids, weights = stock.route(checkpoint, x)
            return layer(x.clone(), StandardTopKOutput(weights.float(), ids.int(), None))

        block, calls = stock.moe_block(checkpoint), []
        layer, runner = block.experts, block.experts.quant_method._backend._runner
        run = runner.run
        runner.run = lambda *args: calls.append(args) or run(*args)
        whole, together = block(rows[rank].clone()), experts(rows[rank])
        pieces = [(len(x), ids.min().item(), ids.max().item()) for x, ids, _ in calls if len(x)]
        alone = experts(rows[rank][-1:])
        nobody = experts(rows[rank][:0])
        return type(layer).__name__, whole, together, alone, nobody.shape, pieces

    return work


def test_four_ranks_agree_with_float64_and_with_one_rank_after_the_other(model, tmp_path, checkpoint, seed, monkeypatch):
    """Ragged batches, a rank without tokens, an expert that all choose; the rows of its rank take several calls."""
    gloo_deepep.install(monkeypatch)
    rng = torch.Generator().manual_seed(seed + 1)
    rows = [torch.randn(count, HIDDEN, generator=rng).bfloat16() for count in TOKENS]
    os.environ["HOPPER_MOE_MAX_TOKENS_PER_RANK"] = "3"
    args = stock.resolve(model, *LAUNCH)
    del os.environ["HOPPER_MOE_MAX_TOKENS_PER_RANK"]
    found = stock.in_ranks(on_ranks(checkpoint, rows), args, RANKS, tmp_path)
    experts = stock.whole_experts(checkpoint)
    for rank, (x, (name, whole, together, alone, of_nobody, pieces)) in enumerate(zip(rows, found, strict=True)):
        assert name == "DeepEPMoE" and whole.shape == x.shape and of_nobody == (0, HIDDEN)
        assert all(1 <= count <= 3 and -1 <= low and high < LOCAL for count, low, high in pieces), "pieces, local ids"
        if rank == HOT // LOCAL:
            assert sum(count for count, *_ in pieces) == 2 * sum(TOKENS), "all rows, once for the block and once for its experts"
        if not len(x):
            continue
        ids, weights = stock.route(checkpoint, x)
        assert (ids == HOT).any(1).all()
        wanted = stock.expected(checkpoint, x, ids, weights) + stock.expected_shared(checkpoint, x)
        assert stock.relative_error(whole, wanted) < ROUNDING
        total = torch.zeros(x.shape)
        for owner in range(RANKS):  # BF16 on every rank, then summed
            mine = torch.where(ids // LOCAL == owner, ids, -1).int()
            total += moe_layer(x, mine, weights.float(), experts, swiglu_limit=stock.LIMIT).float()
        assert torch.equal(together, total.bfloat16())
        assert torch.equal(together[-1:], alone), "a row's bits do not depend on the rows beside it"


def test_rows_that_deepep_rounded_are_refused(model, checkpoint, monkeypatch):
    from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalDispatchOutput

    gloo_deepep.install(monkeypatch)
    stock.publish(stock.resolve(model))
    layer = stock.moe_block(checkpoint).experts
    rounded = DeepEPNormalDispatchOutput(torch.zeros(1, HIDDEN).to(torch.float8_e4m3fn), torch.ones(1, 3), None, None, [])
    with pytest.raises(Refusal, match="DeepEP brought torch.float8_e4m3fn rows, but the kernel takes BF16"):
        layer.quant_method.apply(layer, rounded)


@pytest.mark.parametrize("missing", ["deep_ep", "deep_gemm"])
def test_a_worker_where_a_package_does_not_load_is_refused_before_weights(model, monkeypatch, missing):
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.moe.token_dispatcher import deepep

    from hopper_moe.moe_backends.sglang import hooks

    gloo_deepep.install(monkeypatch)
    if missing == "deep_ep":
        monkeypatch.setattr(deepep, "use_deepep", False)
    else:
        monkeypatch.setattr(deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", False)
    hooks.take_over.cache_clear()
    stock.publish(stock.resolve(model, *LAUNCH), 1)
    with pytest.raises(Refusal, match=f"because {missing} does not load here"):
        stock.fused_moe()
    hooks.take_over.cache_clear()


def test_the_sizes_are_those_of_the_installed_package():
    """Read from its source: it cannot be imported without a GPU."""
    source = (Path(find_spec("deep_ep").origin).parent / "buffers" / "legacy.py").read_text()
    tables = [
        tuple(key.value for key in node.value.keys)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "config_map"
    ]
    assert tables == [DEEPEP_RANKS] * 2
