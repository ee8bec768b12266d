"""Quant method and loading in stock SGLang: what is created, loaded, packed and moved, and every checkpoint that is
refused."""

from __future__ import annotations

import os

import pytest
import stock
import torch
from stock import EXPERTS, HIDDEN, INTERMEDIATE

from hopper_moe.moe_backends.sglang import runner_backend
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import PackedExperts, WidePackedExperts, unpack_experts
from hopper_moe.quantization.sglang_checks import CHECKPOINT_PARAMETERS
from hopper_moe.quantization.sglang_loading import PACKED_PARAMETERS

EP8_RANK = 3


@pytest.fixture(scope="module")
def checkpoint(seed) -> stock.Checkpoint:
    return stock.random_checkpoint(seed)


@pytest.fixture
def one_gpu(model):
    stock.publish(stock.resolve(model))


@pytest.fixture
def ep8(model):
    stock.publish(stock.resolve(model, "--tp-size", "8", "--ep-size", "8"), EP8_RANK)


@pytest.fixture
def tp2(model):
    stock.publish(stock.resolve(model, "--tp-size", "2"), 1)


def shapes(layer) -> dict[str, tuple]:
    return {name: (tuple(param.shape), param.dtype) for name, param in layer.named_parameters()}


def finish(layer) -> PackedExperts:
    layer.quant_method.process_weights_after_loading(layer)
    return PackedExperts(**{name: getattr(layer, name).data for name in PACKED_PARAMETERS})


def whole(checkpoint: stock.Checkpoint, expert: int, shard: str, part: str) -> torch.Tensor:
    return checkpoint.tensors[f"layers.0.ffn.experts.{expert}.{shard}.{part}"].view(torch.uint8)


# ---- selection and parameters


def test_an_fp4_layer_gets_our_method(one_gpu):
    layer = stock.fused_moe()
    assert type(layer.quant_method).__name__ == "HopperMoEMethod"
    assert layer.should_fuse_routed_scaling_factor_in_topk and layer.runner_backend is None


def test_the_draft_of_speculative_decoding_gets_it_too(one_gpu):
    from sglang.srt.layers.moe.utils import speculative_moe_backend_context

    with speculative_moe_backend_context():
        assert type(stock.fused_moe().quant_method).__name__ == "HopperMoEMethod"


def test_layers_that_are_not_ours_stay_stock(model, one_gpu):
    assert (
        type(
            stock.fused_moe(quant_config=stock.quant_config(ignored_layers=["model.layers.0.mlp.experts"])).quant_method
        ).__name__
        == "UnquantizedFusedMoEMethod"
    )
    stock.publish(stock.resolve(model, backend="triton"))
    assert type(stock.fused_moe().quant_method).__name__ == "Fp8MoEMethod"


def test_fp8_experts_are_refused(one_gpu):
    with pytest.raises(
        Refusal, match="model.layers.0.mlp.experts: these experts are FP8 with blocks .*, but reference serves fp4"
    ):
        stock.fused_moe(quant_config=stock.quant_config(is_fp4=False))


def test_a_worker_without_resolved_arguments_is_refused(one_gpu):
    os.environ.pop("_HOPPER_MOE_PLAN")
    with pytest.raises(Refusal, match="without resolved arguments"):
        stock.fused_moe()


@pytest.mark.parametrize(("place", "experts", "intermediate"), [("one_gpu", 16, 256), ("ep8", 2, 256), ("tp2", 16, 128)])
def test_parameters_have_the_checkpoints_types(place, experts, intermediate, request):
    request.getfixturevalue(place)
    e8m0 = torch.float8_e8m0fnu
    assert shapes(stock.fused_moe()) == {
        "w13_weight": ((experts, 2 * intermediate, HIDDEN // 2), torch.int8),
        "w2_weight": ((experts, HIDDEN, intermediate // 2), torch.int8),
        "w13_weight_scale_inv": ((experts, 2 * intermediate, HIDDEN // 32), e8m0),
        "w2_weight_scale_inv": ((experts, HIDDEN, intermediate // 32), e8m0),
    }


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"activation": "gelu"}, "activation=gelu is not DeepSeek-V4's SwiGLU"),
        ({"gemm1_clamp_limit": 7.0}, "gemm1_clamp_limit=7.0"),
        ({"apply_router_weight_on_input": True}, "apply_router_weight_on_input=True"),
        ({"no_combine": True}, "no_combine=True"),
        ({"with_bias": True}, "with a bias"),
        ({"hidden_size": 320}, "hidden_size 320 is not a positive multiple of 128"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_layers_that_are_refused(one_gpu, change, sentence):
    with pytest.raises(Refusal, match=sentence):
        stock.fused_moe(**change)


# ---- loading and packing


@pytest.mark.parametrize(
    ("place", "experts", "columns"),
    [("one_gpu", range(EXPERTS), slice(None)), ("ep8", range(6, 8), slice(None)), ("tp2", range(EXPERTS), slice(128, 256))],
)
def test_the_packed_experts_are_this_ranks_slice_bit_for_bit(place, experts, columns, checkpoint, request):
    request.getfixturevalue(place)
    layer = stock.fused_moe()
    stock.load(layer, checkpoint.tensors)
    w13, w13_scale, w2, w2_scale = unpack_experts(finish(layer))
    halves = slice(columns.start // 2, columns.stop // 2) if columns.start is not None else columns
    groups = slice(columns.start // 32, columns.stop // 32) if columns.start is not None else columns
    for local, expert in enumerate(experts):
        for part, (got13, got2, cut) in {"weight": (w13, w2, halves), "scale": (w13_scale, w2_scale, groups)}.items():
            wanted = torch.cat([whole(checkpoint, expert, shard, part)[columns] for shard in ("w1", "w3")])
            assert torch.equal(got13[local], wanted), (expert, part)
            assert torch.equal(got2[local], whole(checkpoint, expert, "w2", part)[:, cut]), (expert, part)


def test_the_originals_are_freed_and_a_second_call_changes_nothing(one_gpu, checkpoint):
    layer = stock.fused_moe()
    stock.load(layer, checkpoint.tensors)
    packed = finish(layer)
    before = {name: (param.data_ptr(), param.clone()) for name, param in layer.named_parameters() if param.numel()}
    assert set(before) == set(PACKED_PARAMETERS)
    assert packed.num_bytes == sum(t.numel() for t in checkpoint.tensors.values()) + EXPERTS * (2 * INTERMEDIATE + HIDDEN)
    finish(layer)
    for name, (address, value) in before.items():
        assert getattr(layer, name).data_ptr() == address and torch.equal(getattr(layer, name), value)


def test_eplb_moves_exactly_the_packed_parameters(one_gpu, checkpoint):
    """SGLang's EPLB takes every named parameter whose dim 0 is the number of local experts; moving rows must move experts."""
    from sglang.srt.models.deepseek_v2 import DeepseekV2MoE

    layer = stock.fused_moe()
    stock.load(layer, checkpoint.tensors)
    finish(layer)
    moved = DeepseekV2MoE.get_moe_weights(type("Block", (), {"experts": layer, "num_fused_shared_experts": 0}))
    assert sorted(t.data_ptr() for t in moved) == sorted(getattr(layer, name).data_ptr() for name in PACKED_PARAMETERS)
    x = torch.randn(3, HIDDEN).bfloat16()
    ids, weights = torch.tensor([[0, 5, 9, -1]] * 3, dtype=torch.int32), torch.rand(3, 4)
    runner = layer.quant_method._backend._runner
    wanted = runner.run(x, ids, weights)
    for tensor in moved:  # expert 5 and 9 change places
        tensor[[5, 9]] = tensor[[9, 5]].clone()
    assert torch.equal(runner.run(x, torch.tensor([[0, 9, 5, -1]] * 3, dtype=torch.int32), weights), wanted)
    assert not torch.equal(runner.run(x, ids, weights), wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_scales_of_other_types_are_taken_bit_for_bit(one_gpu, checkpoint, dtype):
    tensors = dict(checkpoint.tensors)
    for name in (n for n in tensors if n.endswith(".scale")):
        tensors[name] = tensors[name].view(torch.uint8) if dtype is torch.uint8 else tensors[name].to(dtype)
    plain, other = stock.fused_moe(), stock.fused_moe()
    stock.load(plain, checkpoint.tensors)
    stock.load(other, tensors)
    packed, again = finish(plain), finish(other)
    assert all(torch.equal(getattr(packed, name), getattr(again, name)) for name in PACKED_PARAMETERS)


# ---- checkpoints that are refused: each with tensor, expert and value, before anything wrong is stored

NAME = "layers.0.ffn.experts.{}.{}.{}"
HERE = "model.layers.0.mlp.experts.{}.{}.{}"


def nan_at(tensor: torch.Tensor) -> torch.Tensor:
    data = tensor.view(torch.uint8).clone()
    data[7, 2] = 255
    return data.view(torch.float8_e8m0fnu)


def not_a_power(tensor: torch.Tensor) -> torch.Tensor:
    values = tensor.float()
    values[3, 1] = 0.3
    return values


@pytest.mark.parametrize(
    ("key", "change", "sentence"),
    [
        ((6, "w1", "scale"), nan_at, r"experts.6.w1.scale holds 255 \(NaN\) at row 7, group 2"),
        ((7, "w2", "scale"), nan_at, r"experts.7.w2.scale holds 255 \(NaN\)"),
        ((6, "w3", "scale"), not_a_power, "experts.6.w3.scale holds 0.30.* no power of two"),
        ((6, "w3", "scale"), lambda t: -t.float(), "experts.6.w3.scale holds -.* no power of two"),
        ((6, "w1", "scale"), lambda t: t.to(torch.float64), "experts.6.w1.scale is torch.float64, not UE8M0"),
        ((6, "w1", "weight"), lambda t: t.to(torch.bfloat16), "experts.6.w1.weight is torch.bfloat16, not packed FP4"),
        (
            (6, "w1", "weight"),
            lambda t: t.view(torch.float8_e4m3fn),
            "experts.6.w1.weight is torch.float8_e4m3fn, not packed FP4",
        ),
        ((6, "w1", "weight"), lambda t: t[:-1], r"experts.6.w1.weight has shape \[255, 192\], not \[256, 192\]"),
        ((7, "w2", "weight"), lambda t: t.T.contiguous(), r"experts.7.w2.weight has shape \[128, 384\], not \[384, 128\]"),
        ((7, "w2", "scale"), lambda t: t[:, :-1], r"experts.7.w2.scale has shape \[384, 7\], not \[384, 8\]"),
    ],
    ids=[
        "NaN w1",
        "NaN w2",
        "not a power of two",
        "negative",
        "float64 scale",
        "bf16 weight",
        "fp8 weight",
        "short weight",
        "transposed",
        "short scale",
    ],
)
@pytest.mark.parametrize("place", ["one_gpu", "ep8"])
def test_bad_tensors_are_refused(place, key, change, sentence, checkpoint, request):
    request.getfixturevalue(place)
    layer = stock.fused_moe()
    with pytest.raises(Refusal, match=sentence):
        stock.load(layer, checkpoint.tensors | {NAME.format(*key): change(checkpoint.tensors[NAME.format(*key)])})


def test_another_ranks_damage_is_not_this_ranks_business(ep8, checkpoint):
    layer, name = stock.fused_moe(), NAME.format(0, "w1", "scale")
    stock.load(layer, checkpoint.tensors | {name: nan_at(checkpoint.tensors[name])})
    finish(layer)


@pytest.mark.parametrize("key", [(6, "w1", "weight"), (7, "w3", "scale"), (6, "w2", "weight")], ids=str)
def test_a_missing_tensor_is_refused(ep8, checkpoint, key):
    layer = stock.fused_moe()
    stock.load(layer, {name: t for name, t in checkpoint.tensors.items() if name != NAME.format(*key)})
    with pytest.raises(Refusal, match=rf"{HERE.format(*key)} is not in the checkpoint \(1 of 12 "):
        finish(layer)


def test_experts_that_never_came_are_refused(one_gpu):
    with pytest.raises(Refusal, match=r"experts.0.w1.weight is not in the checkpoint \(96 of 96 "):
        finish(stock.fused_moe())


def test_a_duplicate_is_refused(one_gpu, checkpoint):
    layer = stock.fused_moe()
    stock.load(layer, checkpoint.tensors)
    name = NAME.format(4, "w3", "weight")
    with pytest.raises(Refusal, match="experts.4.w3.weight is in the checkpoint twice"):
        stock.load(layer, {name: checkpoint.tensors[name]})


# ---- rows that cannot be packed exactly


def wide(checkpoint: stock.Checkpoint, span: int = 40) -> stock.Checkpoint:
    """Two rows of expert 3 whose scales span this many powers of two and whose codes do not allow others; more than 28: no packed
    format holds them."""
    names = [NAME.format(3, "w2", part) for part in ("weight", "scale")]
    weight, scale = (checkpoint.tensors[name].view(torch.uint8).clone() for name in names)
    scale[[1, 9]] = 123
    scale[[1, 9], 0] = 123 - span
    weight[[1, 9]] = 0x71  # .5 and 6
    changed = dict(zip(names, (weight.view(torch.int8), scale.view(torch.float8_e8m0fnu)), strict=True))
    return stock.Checkpoint(checkpoint.tensors | changed, checkpoint.gate, checkpoint.bias, checkpoint.shared)


def test_inexact_rows_are_refused_and_counted(model, checkpoint):
    os.environ["HOPPER_MOE_KERNEL"] = "mxfp4_mega"
    stock.publish(stock.resolve(model))
    layer = stock.fused_moe()
    stock.load(layer, wide(checkpoint).tensors)
    with pytest.raises(Refusal, match="w2 expert 3: the scales of 2 rows span up to 40 powers of two"):
        finish(layer)


@pytest.mark.parametrize(
    "environ",
    [{"HOPPER_MOE_KERNEL": "reference"}, {"HOPPER_MOE_KERNEL": "mxfp4_mega", "HOPPER_MOE_INEXACT_ROWS": "reference"}],
    ids=str,
)
def test_inexact_rows_run_on_the_reference_if_asked(model, checkpoint, environ, monkeypatch):
    os.environ.update(environ)
    stock.publish(stock.resolve(model))
    said = []
    monkeypatch.setattr(runner_backend.logger, "warning", lambda line, *values: said.append(line % values))
    layer, bad = stock.fused_moe(), wide(checkpoint)
    stock.load(layer, bad.tensors)
    layer.quant_method.process_weights_after_loading(layer)
    assert len(said) == 1 and "2 of 14336 rows cannot be packed exactly" in said[0]
    assert all(getattr(layer, name).numel() for name in CHECKPOINT_PARAMETERS)
    x = torch.randn(8, HIDDEN).bfloat16()
    ids, weights = stock.route(bad, x)
    got = layer.quant_method._backend._runner.run(x, ids.int(), weights.float())
    assert stock.relative_error(got, stock.expected(bad, x, ids, weights)) < stock.ROUNDING


@pytest.mark.parametrize("span, rule, words", [(28, "refuse", None), (40, "round", "weights in 2 of 14336 rows are rounded")])
def test_wide_rows_are_packed_in_the_wide_format(model, checkpoint, monkeypatch, span, rule, words):
    """On the reference, which takes every format; the self-check compares it with the tensors as they were loaded."""
    os.environ.update(HOPPER_MOE_KERNEL="reference", HOPPER_MOE_INEXACT_ROWS=rule)
    stock.publish(stock.resolve(model))
    said = []
    monkeypatch.setattr(runner_backend.logger, "warning", lambda line, *values: said.append(line % values))
    layer, rows = stock.fused_moe(), wide(checkpoint, span)
    stock.load(layer, rows.tensors)
    layer.quant_method.process_weights_after_loading(layer)
    runner = layer.quant_method._backend._runner
    assert type(runner._experts) is WidePackedExperts
    assert [words in line for line in said] == ([True] if words else [])
    x = torch.randn(8, HIDDEN).bfloat16()
    ids, weights = stock.route(rows, x)
    got = runner.run(x, ids.int(), weights.float())
    assert stock.relative_error(got, stock.expected(rows, x, ids, weights)) < stock.ROUNDING


def test_ranks_that_exchange_tokens_run_an_inexact_layer_alike(model, checkpoint, tmp_path):
    """Expert 3 is rank 0's. Its reference would wait for the others' collectives, their fused kernels for rank 0."""
    os.environ.update(HOPPER_MOE_KERNEL="mxfp4_mega", HOPPER_MOE_INEXACT_ROWS="reference", HOPPER_MOE_SELF_CHECK="0")
    bad = wide(checkpoint)

    def work(rank: int) -> tuple[str, list[str]]:
        said = []
        runner_backend.logger.warning = lambda line, *values: said.append(line % values)
        layer = stock.fused_moe()
        stock.load(layer, bad.tensors)
        layer.quant_method.process_weights_after_loading(layer)
        return type(layer.quant_method._backend._runner).__name__, said

    args = stock.resolve(model, "--tp-size", "4", "--attn-dp-size", "4")
    for runner, said in stock.in_ranks(work, args, 4, tmp_path):
        assert runner == "ReferenceRunner" and "2 of 14336 rows cannot be packed exactly" in said[0]


def test_an_inexact_layer_does_not_stand_for_the_fused_kernel_in_the_self_check(model, checkpoint):
    """It runs on the reference, so the kernel that runs all other layers has still to be checked."""
    from hopper_moe.moe_backends import self_check

    os.environ.update(HOPPER_MOE_KERNEL="mxfp4_mega", HOPPER_MOE_INEXACT_ROWS="reference")
    self_check._seen.cache_clear()
    stock.publish(stock.resolve(model))
    layer = stock.fused_moe()
    stock.load(layer, wide(checkpoint).tensors)
    layer.quant_method.process_weights_after_loading(layer)
    assert {kernel for kernel, *_ in self_check._seen()} == {"reference"}


def test_inexact_rows_cannot_be_moved_by_eplb(model, checkpoint):
    stock.publish(stock.resolve(model, "--tp-size", "8", "--ep-size", "8", "--ep-num-redundant-experts", "8"), 1)
    layer = stock.fused_moe(num_experts=EXPERTS + 8)
    assert layer.num_local_experts == 3
    stock.load(layer, wide(checkpoint).tensors)
    with pytest.raises(Refusal, match="2 rows cannot be packed, .*--ep-num-redundant-experts"):
        finish(layer)
