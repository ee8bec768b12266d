"""Baselines of the layer comparison against the code of stock SGLang that they stand for: same arguments, same conversion."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import stock
import torch

from hopper_moe.eval.layer_bench.baselines import create_baseline
from hopper_moe.eval.layer_bench.baselines.checkpoint_experts import CheckpointExperts
from hopper_moe.eval.layer_bench.baselines.flashinfer_mxfp4 import FlashInferMxfp4Runner
from hopper_moe.eval.layer_bench.baselines.humming import checkpoint_layer
from hopper_moe.eval.layer_bench.contenders import fill
from hopper_moe.kernels.benchmarks.workload import ModelShape, random_checkpoint, random_routing
from hopper_moe.kernels.shard import ExpertShard

SHAPE = ModelShape(256, 128, 4, 2, 4, 3.0)
TOKENS, CAPACITY = 5, 64


def runner_on_cpu(precision: str) -> FlashInferMxfp4Runner:
    """A runner as `prepare` leaves it, but with made-up tensors: FlashInfer's conversion is a CUDA kernel."""
    runner = FlashInferMxfp4Runner(precision)
    runner._w13, runner._w2 = torch.zeros(1, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)
    runner._scales = [torch.full((4,), value, dtype=torch.int32) for value in range(5 if precision == "fp8" else 2)]
    runner._limit, runner._tuned_tokens = torch.full((4,), SHAPE.swiglu_limit), CAPACITY
    return runner


def stock_arguments(monkeypatch, runner: FlashInferMxfp4Runner, x, ids, weights) -> dict:
    """What SGLang's fused function hands FlashInfer for a layer of the same tensors."""
    from flashinfer.fused_moe.core import ActivationType
    from sglang.srt.layers.moe.moe_runner import flashinfer_cutlass as stock_call
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput
    from sglang.srt.runtime_context import get_parallel

    seen: dict = {}
    kernel = lambda **given: seen.update(given)  # noqa: E731
    monkeypatch.setattr(stock_call, "_flashinfer_cutlass_fused_moe", lambda: (kernel, ActivationType))  # it asks for a GPU
    scales = iter(runner._scales)
    if runner._precision == "fp8":
        names = ("w13_weight_scale", "w13_humming_residual_scale", "humming_fc2_act_scale", "w2_weight_scale",
                 "w2_humming_residual_scale")  # fmt: skip
    else:
        names = ("w13_weight_scale", "w2_weight_scale")
    info = stock_call.FlashInferCutlassMxfp4MoeQuantInfo(
        w13_weight=runner._w13, w2_weight=runner._w2, swiglu_limit=runner._limit, **{name: next(scales) for name in names}
    )
    placed = SimpleNamespace(moe_tp_size=1, moe_tp_rank=0, moe_ep_size=1, moe_ep_rank=0)
    given = StandardDispatchOutput(x, None, StandardTopKOutput(weights, ids, weights))
    with get_parallel().override(tp_group=None):  # one rank
        stock_call.fused_experts_none_to_flashinfer_mxfp4(given, info, MoeRunnerConfig(layer=placed))
    return seen


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_flashinfer_gets_what_sglang_gives_it(model, monkeypatch, precision):
    args = stock.resolve(model, "--chunked-prefill-size", str(CAPACITY), backend="flashinfer_mxfp4")
    stock.publish(args)
    runner = runner_on_cpu(precision)
    ids, weights = random_routing(TOKENS, 4, 2, "uniform", torch.Generator().manual_seed(0), "cpu")
    x = torch.randn(TOKENS, SHAPE.hidden_size, dtype=torch.bfloat16)
    theirs = stock_arguments(monkeypatch, runner, x, ids, weights)
    ours = runner.arguments(x, ids, weights, torch.empty_like(x))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if name == "quant_scales":
            assert len(value) == len(theirs[name]) and all(map(torch.equal, value, theirs[name]))
        elif name != "output" and isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[name]), name
        elif name != "output":
            assert value == theirs[name], name
    from flashinfer.fused_moe import cutlass_fused_moe

    inspect.signature(cutlass_fused_moe).bind(**ours)


@pytest.mark.parametrize("name", ["flashinfer_mxfp4", "flashinfer_mxfp4_fp8"])
def test_flashinfer_measures_its_tiles_at_the_sizes_that_are_timed(monkeypatch, name):
    """With FlashInfer's own `autotune`: a keyword that it does not know would fail here."""
    from flashinfer.autotuner import AutoTuner

    runner, seen = create_baseline(name, (1, 7, 8, 2 * CAPACITY)), []
    runner._tuned_tokens, runner._w2 = CAPACITY, torch.ones(1)
    runner.run = lambda *_batch: seen.append((AutoTuner.get().is_tuning_mode, AutoTuner.get()._override_tuning_buckets))
    runner.tune(ExpertShard.of(SHAPE, CAPACITY, num_experts=4))
    assert seen == [(True, (1, 8, CAPACITY))]


def test_humming_is_handed_the_checkpoints_layer(seed):
    """The tensors that `Mxfp4HummingMoEMethod` hands its helper: names, types, bytes and order."""
    from humming.schema import BaseWeightSchema

    checkpoint = random_checkpoint(SHAPE, 4, torch.Generator().manual_seed(seed), "cpu")
    layer = checkpoint_layer(fill(CheckpointExperts, checkpoint), ExpertShard.of(SHAPE, CAPACITY, num_experts=4))
    schema = BaseWeightSchema.from_config({"quant_method": "mxfp4"})
    for name, weight, scale in (("w13", *checkpoint[:2]), ("w2", *checkpoint[2:])):
        tensors = {key.removeprefix(f"{name}_"): value for key, value in layer.state_dict().items() if key.startswith(name)}
        _, converted = schema.convert_humming(tensors, [], [], torch.bfloat16, 4)
        assert torch.equal(converted["weight"].view(torch.uint8), weight)
        assert torch.equal(converted["weight_scale"].view(torch.uint8), scale)
