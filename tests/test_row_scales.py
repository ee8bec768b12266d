"""How rows of any scales are packed: which stay as they are, which are moved to other scales without a change, which are rounded
and by how much.
"""

from itertools import product

import pytest
import torch

from hopper_moe.quantization import codecs, layout, row_scales
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.exactness import check_exact
from hopper_moe.quantization.fp8_blocks import expand_mxfp4
from hopper_moe.quantization.packing import (
    PackedExperts,
    WidePackedExperts,
    choose_format,
    pack_experts,
    pack_matrix,
    unpack_experts,
    unpack_matrix,
)
from hopper_moe.quantization.row_scales import E4M3_LIMITS, E5M2_LIMITS, RowKind

NUM_ROWS, NUM_GROUPS = 10_240, 8
CODE_SETS = ((0,), (2, 4), (5,), (7,), (3, 6), (1, 2, 4), tuple(range(8)))  # magnitude codes of a group


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(generator: torch.Generator, num_rows: int = NUM_ROWS) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [N, K/2], [N, K/32] whose scales span 0 to 30 octaves, with groups of zeros (of both signs) under any scale
    and groups of few different codes."""

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    span = integers(0, 31, num_rows, 1)
    lowest = (torch.rand(num_rows, 1, generator=generator) * (255 - span)).long()
    scale = lowest + (torch.rand(num_rows, NUM_GROUPS, generator=generator) * (span + 1)).long()
    sets = integers(0, len(CODE_SETS), num_rows, NUM_GROUPS)
    edge = torch.rand(num_rows, generator=generator) < 0.25  # spans around the last that fits, both ends in use
    scale[edge, 0] = lowest[edge, 0] = integers(0, 225, int(edge.sum()))
    scale[edge, 1] = lowest[edge, 0] + integers(27, 31, int(edge.sum()))
    sets[edge, :2] = len(CODE_SETS) - 1
    codes = torch.empty(num_rows, NUM_GROUPS, layout.MXFP4_GROUP, dtype=torch.uint8)
    for number, choices in enumerate(CODE_SETS):
        where = sets == number
        drawn = torch.tensor(choices)[integers(0, len(choices), int(where.sum()), layout.MXFP4_GROUP)]
        codes[where] = (drawn + 8 * integers(0, 2, *drawn.shape)).to(torch.uint8)
    zero = (codes & 7 == 0).all(-1) & (torch.rand(sets.shape, generator=generator) < 0.3)
    scale[zero] = integers(0, 255, int(zero.sum()))
    return codecs.pack_nibbles(codes.flatten(-2)), scale.to(torch.uint8)


def value_of(code: int) -> float:
    return (-1 if code >= 8 else 1) * layout.E2M1_VALUES[code % 8]


def scalar_kind(codes: list[list[int]], scales: list[int]) -> RowKind:
    """By trial: the kind as section 3 of the contract defines it."""

    def may_have(group: list[int], old: int, new: int) -> bool:
        return all(value_of(code) * 2.0 ** (old - new) in {value_of(c) for c in range(16)} for code in group)

    if max(scales) - min(scales) <= layout.MAX_DELTA:
        return RowKind.PLAIN
    others = [(group, scale) for group, scale in zip(codes, scales, strict=True) if any(code % 8 for code in group)]
    counted = [scale for _, scale in others] or [0]
    if max(counted) - min(counted) <= layout.MAX_DELTA:
        return RowKind.ZERO_GROUPS
    possible = [[new for new in range(max(old - 4, 0), min(old + 5, 255)) if may_have(group, old, new)] for group, old in others]
    for kind, octaves in ((RowKind.REENCODED, layout.MAX_DELTA), (RowKind.WIDE, layout.WIDE_MAX_DELTA)):
        if any(all(any(base <= new <= base + octaves for new in news) for news in possible) for base in range(255)):
            return kind
    return RowKind.BEYOND


def test_kinds_are_what_the_contract_says(generator):
    weight, scale = random_rows(generator, 300)
    codes = codecs.unpack_nibbles(weight).unflatten(-1, (-1, layout.MXFP4_GROUP)).tolist()
    want = [scalar_kind(*row) for row in zip(codes, scale.tolist(), strict=True)]
    assert row_scales.row_kinds(weight, scale).tolist() == want
    assert set(want) == set(RowKind)


def decoded(packed: torch.Tensor, base: torch.Tensor, shift: int, kind: torch.dtype) -> torch.Tensor:
    """What the kernel multiplies with, FP64: E4M3 or E5M2 numbers times the row's FP32 factor."""
    weight, scale = unpack_matrix(packed, base)
    delta = scale.int() - base.int()[:, None]
    small = codecs.decode_e2m1(codecs.unpack_nibbles(weight), torch.float64).unflatten(-1, (-1, layout.MXFP4_GROUP))
    small = small * codecs.power_of_two(delta - shift).unsqueeze(-1)
    held = small.float().to(kind).double()
    assert torch.equal(held, small), "the kernel's type does not hold a decoded weight"
    factor = codecs.power_of_two(base.int() + shift - layout.UE8M0_BIAS, torch.float32)
    assert factor.isfinite().all()
    return held.flatten(-2) * factor.double()[:, None]


@pytest.mark.parametrize(
    "limits, shift, kind, last",
    [
        (E4M3_LIMITS, layout.BASE_SHIFT, torch.float8_e4m3fn, RowKind.REENCODED),
        (E5M2_LIMITS, layout.WIDE_BASE_SHIFT, torch.float8_e5m2, RowKind.WIDE),
    ],
    ids=["E4M3", "E5M2"],
)
def test_every_value_of_every_exact_row_comes_back(generator, limits, shift, kind, last):
    weight, scale = random_rows(generator)
    kinds = row_scales.row_kinds(weight, scale)
    assert torch.bincount(kinds, minlength=len(RowKind)).min() > 100, "a kind is hardly there"
    fits = (kinds <= last).nonzero().flatten()
    fits = fits[: fits.numel() // 128 * 128]
    weight, scale = weight[fits], scale[fits]
    packed, base = pack_matrix(weight, scale, limits)
    assert torch.equal(decoded(packed, base, shift, kind), codecs.dequantize_mxfp4(weight, scale)), "a value has changed"
    plain = row_scales.plain_base(scale, limits)[1]
    back, scale_back = unpack_matrix(packed, base)
    assert torch.equal(back[plain], weight[plain]) and torch.equal(scale_back[plain], scale[plain])
    assert not torch.equal(scale_back, scale), "no row has been moved"
    signs = codecs.unpack_nibbles(back) >> 3
    assert torch.equal(signs, codecs.unpack_nibbles(weight) >> 3), "a zero has another sign"


def test_e5m2_holds_28_octaves_and_no_more():
    held = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).double()
    held = set(held[held.isfinite()].tolist())
    exact = [shift for shift in range(-40, 40) if all(value * 2.0**shift in held for value in layout.E2M1_VALUES)]
    assert exact == list(range(-layout.WIDE_BASE_SHIFT, layout.WIDE_MAX_DELTA - layout.WIDE_BASE_SHIFT + 1))


def layer_of(weight: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows [N, 256], N a multiple of 256, as w13 of N / 256 experts of hidden_size 256 and intermediate_size 128, beside a plain
    w2."""
    experts = weight.shape[0] // 256
    return (
        weight.view(experts, 256, -1),
        scale.view(experts, 256, -1),
        torch.zeros(experts, 256, 64, dtype=torch.uint8),
        torch.full((experts, 256, 4), 127, dtype=torch.uint8),
    )


def test_a_report_counts_every_kind_and_the_rounding_is_as_small_as_it_says(generator):
    weight, scale = random_rows(generator)
    layer, kinds = layer_of(weight, scale), row_scales.row_kinds(weight, scale)
    report = check_exact(*layer)
    counts = torch.bincount(kinds, minlength=len(RowKind)).tolist()
    assert report.rows == (counts[0] + layer[2].shape[0] * 256, *counts[1:])
    with pytest.raises(Refusal, match="above the 28 that"):
        pack_experts(*layer)

    packed = pack_experts(*layer, may_round=True)
    assert type(packed) is WidePackedExperts
    wanted = codecs.dequantize_mxfp4(layer[0], layer[1])
    got = codecs.dequantize_mxfp4(*unpack_experts(packed)[:2])
    error, beyond = (got - wanted).abs(), (kinds == RowKind.BEYOND).view(layer[0].shape[:2])
    assert not error[~beyond].any()
    assert int((error > 0).sum()) == report.num_rounded_values > 0
    assert error.max() <= 2.0 ** (report.largest_rounded_base + row_scales.ERROR_EXPONENT)
    relative = error.amax(-1)[beyond] / wanted.abs().amax(-1)[beyond]
    assert relative.max() <= 2.0**row_scales.RELATIVE_ERROR_EXPONENT
    sentence = report.rounding_sentence("layers.3")
    assert sentence.startswith(f"layers.3: {report.num_rounded_values} weights in {counts[RowKind.BEYOND]} of ")


def test_formats_are_chosen_by_what_rows_need():
    def rows(**counts: int) -> list[int]:
        return [counts.get(kind.name, 0) for kind in RowKind]

    assert choose_format(rows(PLAIN=9, ZERO_GROUPS=3, REENCODED=1)) is PackedExperts
    assert choose_format(rows(PLAIN=9, WIDE=1)) is WidePackedExperts
    assert choose_format(rows(PLAIN=9, BEYOND=1)) is None
    assert choose_format(rows(PLAIN=9, BEYOND=1), may_round=True) is WidePackedExperts


def test_a_row_of_zeros_packs_whatever_its_scales(generator):
    weight = torch.zeros(128, 64, dtype=torch.uint8)
    weight[::2] = 0x88
    scale = torch.randint(0, 255, (128, 4), generator=generator).to(torch.uint8)
    packed, base = pack_matrix(weight, scale, E4M3_LIMITS)
    assert torch.equal(unpack_matrix(packed, base)[0], weight)
    assert (row_scales.row_kinds(weight, scale) <= RowKind.ZERO_GROUPS).all()


def test_fp8_expansion_ignores_zero_groups_and_small_codes(generator):
    weight = torch.full((128, 64), 0x71, dtype=torch.uint8)  # .5 and 6
    scale = torch.randint(110, 125, (128, 4), generator=generator).to(torch.uint8)
    weight[5, :16], scale[5, 0] = 0x80, 254  # zeros
    weight[6, :16], scale[6, 0] = 0x08, 0
    weight[7, :16], scale[7, 0] = 0x11, 127  # .5, which is a 4 at 124
    q, block = expand_mxfp4(weight, scale)
    assert torch.equal(q.double() * block.double(), codecs.dequantize_mxfp4(weight, scale))
    scale[8, 0] = 0  # not a zero: so far below that FP32 would make it one
    scale[9, 1] = 124
    with pytest.raises(Refusal, match="too far below"):
        expand_mxfp4(weight, scale)


def test_moves_are_those_that_arithmetic_allows():
    """Every magnitude at every distance, against the table that the rule is made from."""
    for magnitude, distance in product(range(1, 8), range(-5, 6)):
        codes = torch.full((1, 16), magnitude * 17, dtype=torch.uint8)
        low, high = row_scales.exact_scales(codes, torch.full((1, 1), 100, dtype=torch.uint8))
        allowed = layout.E2M1_VALUES[magnitude] * 2.0**-distance in layout.E2M1_VALUES
        assert (int(low) <= 100 + distance <= int(high)) == allowed, (magnitude, distance)
