"""DeepEP's two modes on four ranks of stock SGLang; only the transport is not its own."""

from __future__ import annotations

import ast
import os
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gloo_deepep
import pytest
import stock
import torch
from stock import EXPERTS, HIDDEN, ROUNDING

from hopper_moe.kernels.benchmarks.workload import SHAPES
from hopper_moe.kernels.expert_blocks import most_rows
from hopper_moe.kernels.reference import moe_layer
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends.sglang import compat
from hopper_moe.moe_backends.sglang.group_rules import DEEPEP_RANKS
from hopper_moe.moe_backends.sglang.launch_view import LaunchView
from hopper_moe.moe_backends.sglang.low_latency_rules import BUDGET, DEFAULT_BUDGET, HIDDEN_SIZES, low_latency_refusals
from hopper_moe.moe_backends.sglang.plan import ServingPlan
from hopper_moe.moe_backends.sglang.startup import block_memory
from hopper_moe.quantization.errors import Refusal

RANKS, HOT = 4, 5
TOKENS = (4, 0, 1, 3)
LOCAL = EXPERTS // RANKS
DEEPEP = ("--tp-size", "4", "--attn-dp-size", "4", "--moe-a2a-backend", "deepep")
LAUNCH = (*DEEPEP, "--deepep-mode", "normal")
BLOCK_TOKENS = 4  # that a rank may send in the low-latency mode
SMALL = ("--max-running-requests", "16", "--chunked-prefill-size", "16")


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
        pieces = [(len(x), ids.min().item(), ids.max().item()) for x, ids, *_ in calls if len(x)]
        alone = experts(rows[rank][-1:])
        nobody = experts(rows[rank][:0])
        return type(layer).__name__, whole, together, alone, nobody.shape, pieces

    return work


def checked_block(checkpoint: stock.Checkpoint, x: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights of the rows, whose block (experts and shared expert) is `whole` as far as rounding goes."""
    ids, weights = stock.route(checkpoint, x)
    assert (ids == HOT).any(1).all()
    wanted = stock.expected(checkpoint, x, ids, weights) + stock.expected_shared(checkpoint, x)
    assert stock.relative_error(whole, wanted) < ROUNDING
    return ids, weights


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
        ids, weights = checked_block(checkpoint, x, whole)
        total = torch.zeros(x.shape)
        for owner in range(RANKS):  # BF16 on every rank, then summed
            mine = torch.where(ids // LOCAL == owner, ids, -1).int()
            total += moe_layer(x, mine, weights.float(), experts, swiglu_limit=stock.LIMIT).float()
        assert torch.equal(together, total.bfloat16())
        assert torch.equal(together[-1:], alone), "a row's bits do not depend on the rows beside it"


@pytest.fixture
def wide_model(tmp_path, monkeypatch) -> Path:
    """With rows as the low-latency mode sends them."""
    monkeypatch.setenv(BUDGET, str(BLOCK_TOKENS))
    return stock.write_model(tmp_path / "wide", hidden_size=4096)


@pytest.mark.parametrize(("mode", "backend"), [("normal", "disabled"), ("auto", "full"), ("low_latency", "full")])
def test_decoding_is_captured_where_it_can_be(wide_model, monkeypatch, mode, backend):
    monkeypatch.setenv("HOPPER_MOE_KERNEL", "mxfp4_mega")
    args = stock.resolve(wide_model, *DEEPEP, "--deepep-mode", mode, *SMALL)
    assert compat.view(args).graph_backend("decode") == backend
    assert compat.view(args).args.deepep_dispatcher_output_dtype == "bf16"


def test_requests_without_a_bound_are_refused_once_sglang_has_none(wide_model):
    """It has one for DeepSeek-V4, but not for every model."""
    resolved = compat.view(stock.resolve(wide_model, *DEEPEP, *SMALL)).args

    class Unbounded:
        max_running_requests = None

        def __getattr__(self, name: str) -> object:
            return getattr(resolved, name)

    words = f"at most 4 tokens per rank in decoding .{BUDGET}., but nothing bounds .* give --max-running-requests, 16 or less"
    (sentence,) = low_latency_refusals(LaunchView(Unbounded(), is_resolved=True), 4096, os.environ)
    assert re.search(words, sentence), sentence
    assert not list(low_latency_refusals(LaunchView(Unbounded(), is_resolved=False), 4096, os.environ))


def in_phases(checkpoint: stock.Checkpoint, phases: list[tuple[bool, list[torch.Tensor]]]):
    """What a rank finds in batches of prefill (True) and of decoding, each with the rows of all ranks."""

    def work(rank: int):
        from sglang.srt.layers.dp_attention import set_is_extend_in_batch

        found = []
        for is_extend, rows in phases:
            set_is_extend_in_batch(is_extend)
            found.append(on_ranks(checkpoint, rows)(rank))
        return found

    return work


def weighted_slots(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: object) -> torch.Tensor:
    """BF16 for every expert, weights and sum in FP32 where the row came from."""
    total, one = torch.zeros(x.shape), torch.ones(len(x), 1)
    for k in range(ids.shape[1]):
        total += weights[:, k, None].float() * moe_layer(x, ids[:, k, None].int(), one, experts, swiglu_limit=stock.LIMIT).float()
    return total.bfloat16()


@pytest.mark.parametrize("limit", [3, 40, 8192])
def test_blocks_of_rows_agree_with_float64_and_with_expert_after_expert(
    wide_model, tmp_path, checkpoint, seed, monkeypatch, limit
):
    """Ragged batches, a rank without tokens, an expert that all choose; rows that nobody sent are NaN. A list of rows is run in
    pieces of 3, in two, or whole."""
    gloo_deepep.install(monkeypatch)
    rng = torch.Generator().manual_seed(seed + 2)
    rows = [torch.randn(count, HIDDEN, generator=rng).bfloat16() for count in TOKENS]
    monkeypatch.setenv("HOPPER_MOE_MAX_TOKENS_PER_RANK", str(limit))
    args = stock.resolve(wide_model, *DEEPEP, "--deepep-mode", "low_latency", *SMALL)
    monkeypatch.delenv("HOPPER_MOE_MAX_TOKENS_PER_RANK")
    found = stock.in_ranks(on_ranks(checkpoint, rows), args, RANKS, tmp_path)
    experts = stock.whole_experts(checkpoint)
    for x, (name, whole, together, alone, of_nobody, pieces) in zip(rows, found, strict=True):
        assert name == "DeepEPMoE" and whole.shape == x.shape and of_nobody == (0, HIDDEN)
        sizes = [count for count, *_ in pieces]
        most = most_rows(LOCAL, BLOCK_TOKENS * RANKS, stock.TOP_K)
        assert sum(sizes) == 2 * most and max(sizes) == min(limit, most)
        assert all(-1 <= low and high < LOCAL for _, low, high in pieces), "local ids"
        if not len(x):
            continue
        ids, weights = checked_block(checkpoint, x, whole)
        assert torch.equal(together, weighted_slots(x, ids, weights, experts))
        assert torch.equal(together[-1:], alone), "a row's bits do not depend on the rows beside it"


def test_one_server_prefills_in_one_mode_and_decodes_in_the_other(wide_model, tmp_path, checkpoint, seed, monkeypatch):
    """More rows than the low-latency mode takes in prefill; the buffer is cleaned between the modes."""
    gloo_deepep.install(monkeypatch)
    rng = torch.Generator().manual_seed(seed + 3)
    few, many = ([torch.randn(count + more, HIDDEN, generator=rng).bfloat16() for count in TOKENS] for more in (0, 3))
    args = stock.resolve(wide_model, *DEEPEP, *SMALL)
    work = in_phases(checkpoint, [(False, few), (True, many), (False, few)])
    found = stock.in_ranks(work, args, RANKS, tmp_path)
    experts = stock.whole_experts(checkpoint)
    for x, longer, (decoded, prefilled, again) in zip(few, many, found, strict=True):
        ids, weights = stock.route(checkpoint, x)
        assert torch.equal(decoded[2], weighted_slots(x, ids, weights, experts)) and torch.equal(decoded[2], again[2])
        assert torch.equal(decoded[1], again[1])
        for rows, (_, whole, *_) in ((x, decoded), (longer, prefilled)):
            if len(rows):
                checked_block(checkpoint, rows, whole)


def test_the_report_of_a_worker_names_the_memory_of_blocks():
    shard = ExpertShard.of(SHAPES["flash"], 8192, num_ranks=16)
    plan = ServingPlan("mxfp4_mega", "deepep", 8192, block_rows=16 * 128)
    words = ", 0.69 GiB for 32768 rows in low-latency mode beside DeepEP's own buffers"
    assert block_memory(shard.alone(), plan) == block_memory(shard, plan) == words
    assert block_memory(shard, replace(plan, block_rows=0)) == ""


@pytest.mark.parametrize("mode", ["Normal", "LL"])
def test_rows_that_deepep_rounded_are_refused(model, checkpoint, monkeypatch, mode):
    from sglang.srt.layers.moe.token_dispatcher import deepep

    gloo_deepep.install(monkeypatch)
    stock.publish(stock.resolve(model))
    layer = stock.moe_block(checkpoint).experts
    output = getattr(deepep, f"DeepEP{mode}DispatchOutput")
    rest = [None] * (len(output._fields) - 2)
    rounded = output(torch.zeros(1, HIDDEN).to(torch.float8_e4m3fn), torch.ones(1, 3), *rest)
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


def test_the_low_latency_mode_is_that_of_the_installed_packages():
    """Rows that DeepEP's kernels were compiled for, as their names say, and SGLang's own default."""
    from sglang.srt.environ import envs

    library = next(Path(find_spec("deep_ep").origin).parent.glob("_C*.so")).read_bytes()
    for kernel in (b"8dispatch", b"7combine"):
        sizes = {int(size) for size in re.findall(rb"internode_ll" + kernel + rb"I(?:Lb[01]E)+Li(\d+)E", library)}
        assert sizes == set(HIDDEN_SIZES)
    assert envs.SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK.name == BUDGET
    assert envs.SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK.get() == DEFAULT_BUDGET
