"""Number formats and quantisers, against tables, bit arithmetic and the slow oracle."""

import layer_oracle
import numpy as np
import pytest
import torch
from layer_data import make_layer

from hopper_moe.kernels.reference import fp4_as_e4m3, pre_dispatch
from hopper_moe.quantization import codecs
from hopper_moe.quantization.errors import Refusal


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_e2m1_codes_decode_to_the_table_and_encode_back():
    codes = torch.arange(16, dtype=torch.uint8)
    values = codecs.decode_e2m1(codes)
    assert values.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert torch.equal(codecs.encode_e2m1(values), codes), "the sign of zero is kept"
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75, 7.0])
    assert codecs.decode_e2m1(codecs.encode_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4, -1, 6]


def test_low_nibble_is_the_even_index():
    packed = torch.tensor([[0x72, 0x0F]], dtype=torch.uint8)
    assert codecs.unpack_nibbles(packed).tolist() == [[2, 7, 15, 0]]
    assert torch.equal(codecs.pack_nibbles(codecs.unpack_nibbles(packed)), packed)
    assert codecs.unpack_nibbles(packed.view(torch.int8)).tolist() == [[2, 7, 15, 0]]


def test_ue8m0_is_exact_over_its_whole_range():
    data = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for dtype in (torch.float32, torch.float64):
        values = codecs.decode_ue8m0(data, dtype)
        assert values[:255].tolist() == [2.0 ** (s - 127) for s in range(255)] and values[255].isnan()
    assert torch.equal(codecs.decode_ue8m0(data.view(torch.float8_e8m0fnu))[:255], codecs.decode_ue8m0(data)[:255])
    assert codecs.encode_ue8m0(torch.tensor([-127, 0, 127])).tolist() == [0, 127, 254]
    with pytest.raises(Refusal, match=r"scale exponents -128\.\.3 leave the UE8M0 range"):
        codecs.encode_ue8m0(torch.tensor([-128, 3]))


def test_ceil_exponent_at_and_around_powers_of_two():
    values = torch.tensor([1.0, 1.0000001, 0.9999999, 4.0, 5.0, 2.0**-100], dtype=torch.float64)
    assert codecs.ceil_exponent(values).tolist() == [0, 1, 0, 2, 3, -100]


@pytest.mark.parametrize(("num_features", "group"), [(384, 256), (256, 256), (384, 128), (64, 128)])
def test_activation_quantiser_is_bit_for_bit_the_contract(num_features, group, generator):
    x = torch.randn(5, num_features, generator=generator) * torch.exp(torch.randn(5, num_features, generator=generator) * 3)
    x[1] = 0
    x[2] *= 1e-35  # below the amax floor
    x[3, : num_features // 2] *= 2.0**60
    q, scale = codecs.quantize_activations(x, group)
    assert q.dtype is torch.float8_e4m3fn and q.shape == x.shape
    assert scale.dtype is torch.float32 and scale.shape == (5, -(-num_features // group))
    got = codecs.dequantize_activations(q, scale, group)
    for row in range(5):
        assert got[row].tolist() == layer_oracle.quant_e4m3(x[row].numpy(), group).tolist()
    floor = np.float32(2.0**-100) / np.float32(448)
    assert scale[1].tolist() == [floor] * scale.shape[1]


def test_activation_quantiser_does_not_divide_through_a_rounded_inverse(generator):
    x = torch.rand(4096, 256, generator=generator) + 0.5
    _, scale = codecs.quantize_activations(x, 256)
    wanted = x.numpy().max(1) / np.float32(448)
    assert (scale[:, 0].numpy() == wanted).all()
    assert (wanted != x.numpy().max(1) * (np.float32(1) / np.float32(448))).any(), "the data would not tell the two apart"


def test_activation_quantiser_multiplies_by_448_over_amax_rounded_once(generator):
    amax = torch.rand(4096, generator=generator) + 0.5
    # 17, 19, ... lie half way between two E4M3 values: the last bit of the multiplier decides which one these become.
    halves = torch.arange(17, 32, 2, dtype=torch.float32)
    x = torch.cat((amax[:, None], amax[:, None] * halves / 448), 1)
    q, _ = codecs.quantize_activations(x, 256)
    inverse = np.float32(448) / amax.numpy()
    other = np.float32(1) / (amax.numpy() / np.float32(448))
    wanted, through_scale = (torch.from_numpy(x.numpy() * factor[:, None]).to(torch.float8_e4m3fn) for factor in (inverse, other))
    assert torch.equal(q.float(), wanted.float())
    assert not torch.equal(wanted.float(), through_scale.float()), "the data would not tell the two apart"


def test_mxfp4_quantiser_is_a_fixed_point_on_its_own_values(generator):
    packed = torch.randint(0, 256, (64, 128), dtype=torch.uint8, generator=generator)
    packed[:, ::16] |= 0x07  # a 6 in every group of 32, so that the scale is determined
    scale = torch.randint(100, 112, (64, 8), generator=generator).to(torch.uint8)
    wide = codecs.dequantize_mxfp4(packed, scale)
    again, scale_again = codecs.quantize_mxfp4(wide)
    assert torch.equal(codecs.dequantize_mxfp4(again, scale_again), wide)
    assert torch.equal(scale_again, scale)


def test_mxfp4_quantiser_picks_the_better_of_two_exponents_and_the_nearest_value(generator):
    w = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    packed, scale = codecs.quantize_mxfp4(w)
    got = codecs.dequantize_mxfp4(packed, scale).view(32, 2, 32)
    groups = w.view(32, 2, 32)
    values = torch.tensor(layer_oracle.E2M1 + [-v for v in layer_oracle.E2M1], dtype=torch.float64)
    for exponent in range(-6, 4):
        grid = values * 2.0**exponent
        nearest = grid[(groups.unsqueeze(-1) - grid).abs().argmin(-1)]
        error = (nearest - groups).square().sum(-1)
        assert ((got - groups).square().sum(-1) <= error + 1e-12).all(), f"2**{exponent} would be better for some group"


def test_a_group_of_zeros_does_not_widen_the_row():
    w = torch.ones(2, 128)
    w[0, 32:64] = 0
    w[1] = 0
    packed, scale = codecs.quantize_mxfp4(w)
    assert len(set(scale[0].tolist())) == 1 and len(set(scale[1].tolist())) == 1
    assert torch.equal(codecs.dequantize_mxfp4(packed, scale), w.double())


@pytest.mark.parametrize(("shape", "value"), [((2, 48), 1.0), ((2, 64), float("nan")), ((2, 64), float("inf"))], ids=str)
def test_weights_that_cannot_be_quantised_are_refused(shape, value):
    w = torch.ones(shape)
    w[1, 5] = value
    error, words = (ValueError, "48 columns are not a multiple of 32") if shape[1] == 48 else (Refusal, "NaN or infinite")
    with pytest.raises(error, match=words):
        codecs.quantize_mxfp4(w)


@pytest.mark.parametrize("shape", [(256, 384), (64, 128), (200, 130)], ids=str)
def test_fp8_blocks_round_trip_within_half_a_step(shape, generator):
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    q, scale = codecs.quantize_fp8_blocks(w)
    assert q.shape == shape and scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = codecs.dequantize_fp8_blocks(q, scale)
    step = (
        codecs.decode_ue8m0(scale, torch.float64).repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    )
    assert ((back - w).abs() <= torch.maximum(w.abs() * 2.0**-4, step * 2.0**-10) * (1 + 1e-12)).all()
    assert q.float().abs().amax() >= 224 and torch.isfinite(q.float()).all()


def test_fp4_activations_survive_the_operand_format(generator):
    x = (torch.randn(9, 640, generator=generator) * torch.exp(torch.randn(9, 640, generator=generator))).bfloat16()
    x[3] = 0
    x[8] *= 2.0 ** -torch.arange(20).repeat_interleave(32)  # spans more than the operand format holds
    packed, scale = codecs.quantize_mxfp4_activations(x)
    q, token_scale = fp4_as_e4m3(x)
    assert (token_scale.shape, q.shape) == ((9, 1), (9, 640))
    assert torch.equal(token_scale, codecs.decode_ue8m0(scale.amax(1, keepdim=True)) / 2**6)
    got, fp4 = codecs.dequantize_activations(q, token_scale, 640), codecs.dequantize_mxfp4(packed, scale)
    assert torch.equal(got[:8], fp4[:8])
    step = token_scale[8].double() * 2.0**-9  # 2**(s - 15)
    assert torch.equal(got[8], (fp4[8] / step).round() * step) and not torch.equal(got[8], fp4[8])
    assert (codecs.decode_e2m1(codecs.unpack_nibbles(packed)).abs().unflatten(1, (20, 32)).amax(-1)[[0, 1, 2, 4]] >= 3).all()


def test_pre_dispatch_pads_masks_and_multiplies_the_factor_once(seed):
    layer = make_layer(seed, num_tokens=5, hidden_size=640)
    layer.topk_ids[2, 1] = -7
    tokens = pre_dispatch(layer.x, layer.topk_ids.long(), layer.topk_weights, routed_scaling_factor=2.5, num_padded_tokens=8)
    assert (tokens.x_q.shape, tokens.x_scale.shape, tokens.topk_ids.shape, tokens.num_tokens) == ((8, 640), (8, 1), (8, 3), 5)
    assert (tokens.topk_ids.dtype, tokens.topk_weights.dtype) == (torch.int32, torch.float32)
    assert torch.equal(tokens.topk_ids[:5], layer.topk_ids.clamp_min(-1)) and (tokens.topk_ids[5:] == -1).all()
    assert torch.equal(tokens.topk_weights[:5], layer.topk_weights * np.float32(2.5)) and (tokens.topk_weights[5:] == 0).all()
    assert (
        torch.equal(tokens.x_q[:5].float(), codecs.quantize_activations(layer.x, 640)[0].float())
        and (tokens.x_q[5:].float() == 0).all()
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_padded_tokens": 4}, "num_padded_tokens 4 is below the 5 tokens"),
        ({"x": torch.ones(5, 8, dtype=torch.int32)}, "x is torch.int32"),
        ({"topk_ids": torch.ones(4, 3, dtype=torch.int32)}, r"topk_ids is torch.int32 \[4, 3\]: give int32 \[5, top_k\]"),
        ({"topk_ids": torch.ones(5, 3)}, "topk_ids is torch.float32"),
        ({"topk_weights": torch.ones(5, 2)}, r"topk_weights is torch.float32 \[5, 2\]: give float32 \[5, 3\]"),
        ({"topk_ids": torch.ones(5, 17, dtype=torch.int32), "topk_weights": torch.ones(5, 17)}, "top_k 17 is above 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_tokens_that_do_not_belong_together_are_refused(change, sentence, seed):
    layer = make_layer(seed, num_tokens=5)
    arguments = {"x": layer.x, "topk_ids": layer.topk_ids, "topk_weights": layer.topk_weights} | change
    with pytest.raises(ValueError, match=sentence):
        pre_dispatch(**arguments)
