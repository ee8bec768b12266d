"""FP8 experts in stock SGLang: checkpoints that have them, and FP4 ones that the user wants expanded, on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import stock
import torch
from stock import EXPERTS, HIDDEN, INTERMEDIATE

from hopper_moe.quantization.codecs import dequantize_fp8_blocks
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts, unpack_fp8_w2, unpack_fp8_w13

SIZES = {"w1": (INTERMEDIATE, HIDDEN), "w3": (INTERMEDIATE, HIDDEN), "w2": (HIDDEN, INTERMEDIATE)}


@pytest.fixture(autouse=True)
def _reference(reference_in_place_of_fp8_mega):
    """In every test here."""


@pytest.fixture(scope="module")
def tensors(seed) -> dict[str, torch.Tensor]:
    return stock.random_fp8_tensors(seed)


@pytest.fixture(scope="module")
def fp8_model(tmp_path_factory) -> Path:
    return stock.write_model(tmp_path_factory.mktemp("fp8"), "F8_E4M3")


def packed(layer) -> PackedFp8Experts:
    layer.quant_method.process_weights_after_loading(layer)
    return PackedFp8Experts(*(getattr(layer, name).data for name in ("w13_packed", "w13_scale", "w2_packed", "w2_scale")))


@pytest.mark.parametrize(
    ("argv", "rank", "experts", "rows"),
    [
        ((), 0, range(EXPERTS), slice(0, 256)),
        (("--tp-size", "8", "--ep-size", "8"), 3, range(6, 8), slice(0, 256)),
        (("--tp-size", "2"), 1, range(EXPERTS), slice(128, 256)),
    ],
    ids=["one GPU", "EP 8", "TP 2"],
)
def test_an_fp8_checkpoint_is_packed_bit_for_bit(fp8_model, tensors, argv, rank, experts, rows):
    stock.publish(stock.resolve(fp8_model, *argv), rank)
    layer = stock.fused_moe(quant_config=stock.quant_config(is_fp4=False))
    stock.load(layer, tensors)
    found = packed(layer)
    blocks = slice(rows.start // 128, rows.stop // 128)

    def whole(expert: int, shard: str, part: str) -> torch.Tensor:
        return tensors[f"layers.0.ffn.experts.{expert}.{shard}.{part}"]

    for local, expert in enumerate(experts):
        w13, w13_scale = unpack_fp8_w13(found, local)
        w2, w2_scale = unpack_fp8_w2(found, local)
        for got, cut, part in ((w13, rows, "weight"), (w13_scale, blocks, "scale")):
            assert torch.equal(got.float(), torch.cat([whole(expert, shard, part)[cut] for shard in ("w1", "w3")]).float())
        assert torch.equal(w2.float(), whole(expert, "w2", "weight")[:, rows].float())
        assert torch.equal(w2_scale, whole(expert, "w2", "scale")[:, blocks])


def test_fp4_experts_are_expanded_when_the_user_asks(model, seed):
    os.environ["SGLANG_DSV4_FP4_DEQUANT"] = "1"
    stock.publish(stock.resolve(model))
    config = stock.quant_config()
    config.dequant_fp4_to_fp8 = True  # as SGLang's loader sets it
    layer = stock.fused_moe(quant_config=config)
    checkpoint = stock.random_checkpoint(seed)
    stock.load(layer, checkpoint.tensors)
    found = packed(layer)
    for expert in (0, 7):
        w13 = dequantize_fp8_blocks(*unpack_fp8_w13(found, expert), dtype=torch.float64)
        assert torch.equal(w13, torch.cat([checkpoint.dense(expert, shard) for shard in ("w1", "w3")]))
        w2 = dequantize_fp8_blocks(*unpack_fp8_w2(found, expert), dtype=torch.float64)
        assert torch.equal(w2, checkpoint.dense(expert, "w2"))


def test_fp4_experts_are_not_expanded_unasked(model):
    with pytest.raises(Refusal, match="experts are fp4, but fp8_mega serves fp8: .*set SGLANG_DSV4_FP4_DEQUANT=1"):
        stock.resolve(model)


def test_fp8_experts_need_the_fp8_kernel(fp8_model):
    os.environ["HOPPER_MOE_KERNEL"] = "mxfp4_mega"
    with pytest.raises(Refusal, match="experts are fp8, but mxfp4_mega serves fp4"):
        stock.resolve(fp8_model)
    os.environ["HOPPER_MOE_KERNEL"] = "auto"
    from hopper_moe.moe_backends.sglang.plan import ServingPlan

    for argv, exchange in ((), "none"), (("--tp-size", "4", "--attn-dp-size", "4", "--ep-size", "4"), "megamoe"):
        stock.resolve(fp8_model, *argv)
        plan = ServingPlan.read(os.environ)
        assert (plan.kernel, plan.exchange) == ("fp8_mega", exchange)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.view(torch.uint8), "w1.weight is torch.uint8, not float8_e4m3fn"),
        (lambda t: t[:128], r"w1.weight has shape \[128, 384\], not \[256, 384\]"),
    ],
    ids=["bytes", "shape"],
)
def test_weights_that_are_refused(fp8_model, tensors, change, sentence):
    stock.publish(stock.resolve(fp8_model))
    layer = stock.fused_moe(quant_config=stock.quant_config(is_fp4=False))
    name = "layers.0.ffn.experts.5.w1.weight"
    with pytest.raises(Refusal, match=sentence):
        stock.load(layer, {name: change(tensors[name])})


@pytest.mark.parametrize(
    ("value", "sentence"),
    [(torch.ones(2, 3, dtype=torch.uint8), "is torch.uint8, not float32"), (torch.full((2, 3), float("inf")), "holds inf")],
    ids=["bytes", "infinite"],
)
def test_scales_that_are_refused(fp8_model, value, sentence):
    stock.publish(stock.resolve(fp8_model))
    layer = stock.fused_moe(quant_config=stock.quant_config(is_fp4=False))
    with pytest.raises(Refusal, match=sentence):
        stock.load(layer, {"layers.0.ffn.experts.5.w1.scale": value})
