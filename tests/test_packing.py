"""Packed layout: against a scalar transcription of kernels/CONTRACT.md section 3, and back again bit for bit."""

import pytest
import torch

from hopper_moe.quantization import layout
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.exactness import check_exact
from hopper_moe.quantization.packing import PackedExperts, WidePackedExperts, interleave_rows, pack_experts, unpack_experts

# Every shape of the kernel design: (hidden_size, intermediate_size, experts that make 10,000 rows or more).
SHAPES = {"flash": (4096, 2048, 2), "pro": (7168, 3072, 1), "v3_like": (7168, 2048, 1), "v4_1_flash": (5120, 2304, 2)}


def random_scales(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Deltas over the whole exact range 0..11; the row minimum stays at or below 249 even where no delta is 0."""
    low = torch.randint(0, layout.MAX_BASE - layout.MAX_DELTA + 1, (*shape[:-1], 1), generator=generator)
    return (low + torch.randint(0, layout.MAX_DELTA + 1, shape, generator=generator)).to(torch.uint8)


def random_layer(num_experts: int, hidden_size: int, intermediate_size: int, generator: torch.Generator) -> tuple:
    def nibbles(rows: int, cols: int) -> torch.Tensor:
        return torch.randint(0, 256, (num_experts, rows, cols // 2), dtype=torch.uint8, generator=generator)

    return (
        nibbles(2 * intermediate_size, hidden_size),
        random_scales((num_experts, 2 * intermediate_size, hidden_size // 32), generator),
        nibbles(hidden_size, intermediate_size),
        random_scales((num_experts, hidden_size, intermediate_size // 32), generator),
    )


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scalar_pack_unit(nibble_of, scale_of, base_of) -> bytes:
    """One unit, bit by bit, straight from the contract. Callables take (row 0..63, k 0..127) / (row, k32 group) / (row)."""
    unit = bytearray(4352)
    for warp in range(4):
        for half in range(2):
            for lane in range(32):
                for step in range(4):
                    row = 16 * warp + 8 * half + lane // 4
                    word = 0
                    for j in range(4):
                        k = 32 * (lane % 4) + 8 * step + j
                        a, b = nibble_of(row, k), nibble_of(row, k + 4)
                        word |= (a & 7) << (4 * j) | (b & 7) << (16 + 4 * j)
                        word |= (a >> 3) << (8 * j + 7) | (b >> 3) << (8 * j + 3)
                    offset = ((warp * 2 + half) * 32 + lane) * 16 + step * 4
                    unit[offset : offset + 4] = word.to_bytes(4, "little")
    for row in range(64):
        for group in range(4):
            unit[4096 + row * 4 + group] = scale_of(row, group) - base_of(row)
    return bytes(unit)


def test_every_unit_of_a_small_expert_is_what_the_contract_says(generator):
    hidden_size, intermediate_size = 256, 384
    w13, w13_scale, w2, w2_scale = random_layer(2, hidden_size, intermediate_size, generator)
    packed = pack_experts(w13, w13_scale, w2, w2_scale)
    expert = 1
    w13_rows = [(p // 16) * 8 + p % 8 + (intermediate_size if (p // 8) % 2 else 0) for p in range(2 * intermediate_size)]
    matrices = (
        (w13[expert].tolist(), w13_scale[expert].tolist(), w13_rows, packed.w13_packed[expert], packed.w13_base[expert].tolist()),
        (
            w2[expert].tolist(),
            w2_scale[expert].tolist(),
            list(range(hidden_size)),
            packed.w2_packed[expert],
            packed.w2_base[expert].tolist(),
        ),
    )
    for weight, scale, source, tiles, base in matrices:
        assert base == [min(scale[row]) for row in source]
        for row_block in range(tiles.shape[0]):
            for k_block in range(tiles.shape[1]):
                for which in range(2):
                    first = row_block * 128 + which * 64

                    def nibble(row: int, k: int) -> int:
                        byte = weight[source[first + row]][(k_block * 128 + k) // 2]  # noqa: B023 (used within the iteration)
                        return byte >> 4 if k % 2 else byte & 15

                    unit = scalar_pack_unit(
                        nibble,
                        lambda row, group: scale[source[first + row]][k_block * 4 + group],  # noqa: B023
                        lambda row: base[first + row],  # noqa: B023
                    )
                    assert bytes(tiles[row_block, k_block, which].tolist()) == unit, (row_block, k_block, which)


def test_lane_of_a_wgmma_meets_one_block_of_a_row():
    """What lane q reads as columns 4q.. and 16+4q.. of every k32 step is MXFP4 block q, in order."""
    k_at = {layout.wgmma_position(k): k for k in range(128)}
    assert sorted(k_at) == list(range(128))
    for lane in range(4):
        read = [32 * step + 16 * half + 4 * lane + i for step in range(4) for half in range(2) for i in range(4)]
        assert [k_at[position] for position in read] == list(range(32 * lane, 32 * lane + 32))


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_of_10000_rows_is_bit_exact(shape, generator):
    hidden_size, intermediate_size, num_experts = SHAPES[shape]
    layer = random_layer(num_experts, hidden_size, intermediate_size, generator)
    before = [tensor.clone() for tensor in layer]
    packed = pack_experts(*layer)
    assert packed.w13_base.numel() + packed.w2_base.numel() >= 10_000
    assert (packed.num_experts, packed.hidden_size, packed.intermediate_size) == (num_experts, hidden_size, intermediate_size)
    assert packed.num_bytes == num_experts * layout.packed_expert_bytes(hidden_size, intermediate_size)
    for name, given, back, kept in zip(
        ("w13", "w13_scale", "w2", "w2_scale"), layer, unpack_experts(packed), before, strict=True
    ):
        assert torch.equal(given, kept), f"{name} was changed in place"
        assert torch.equal(back, kept), f"{name} did not come back bit for bit"


def test_interleave_puts_gate_and_up_of_a_feature_eight_rows_apart():
    rows = interleave_rows(128).tolist()
    assert sorted(rows) == list(range(256))
    for packed_row in range(0, 256, 16):
        for lane_row in range(8):
            gate, up = rows[packed_row + lane_row], rows[packed_row + lane_row + 8]
            assert gate < 128 and up == gate + 128


def test_checkpoint_types_and_views_pack_like_plain_bytes(generator):
    w13, w13_scale, w2, w2_scale = random_layer(3, 128, 128, generator)
    plain = pack_experts(w13, w13_scale, w2, w2_scale)
    e8m0 = torch.float8_e8m0fnu
    typed = pack_experts(w13.view(torch.int8), w13_scale.view(e8m0), w2.view(torch.int8), w2_scale.view(e8m0))
    reversed_experts = pack_experts(*(t.flip(0) for t in (w13, w13_scale, w2, w2_scale)))
    for name in ("w13_packed", "w13_base", "w2_packed", "w2_base"):
        assert torch.equal(getattr(plain, name), getattr(typed, name)), name
        assert torch.equal(getattr(plain, name).flip(0), getattr(reversed_experts, name)), name


def test_row_at_the_edge_of_exactness_packs_and_one_step_beyond_is_refused(generator):
    layer = random_layer(2, 256, 128, generator)
    w13_scale = layer[1]
    w13_scale[1, 7] = 100
    w13_scale[1, 7, 3] = 111
    layer[0][1, [7, 9], ::16] = 0x71  # a .5 and a 6 in every group, so that none can be moved
    packed = pack_experts(*layer)
    assert type(packed) is PackedExperts
    for given, back in zip(layer, unpack_experts(packed), strict=True):
        assert torch.equal(given, back)
    w13_scale[1, 7, 3] = 112
    w13_scale[1, 9] = 20
    w13_scale[1, 9, 1] = 48
    packed = pack_experts(*layer)
    assert type(packed) is WidePackedExperts
    for given, back in zip(layer, unpack_experts(packed), strict=True):
        assert torch.equal(given, back)
    w13_scale[1, 7, 3] = 140
    w13_scale[1, 9, 1] = 49
    report = check_exact(*layer)
    assert (report.num_inexact_rows, report.inexact[0].worst_span, report.has_nan) == (2, 40, False)
    with pytest.raises(Refusal, match=r"w13 expert 1: the scales of 2 rows span up to 40 .* above the 28 .*ROWS=round"):
        pack_experts(*layer)


@pytest.mark.parametrize("experts_type", [PackedExperts, WidePackedExperts])
def test_large_scales_come_back(generator, experts_type):
    """The factor of a row of such scales would be no FP32 number: the base stays below them."""
    layer = random_layer(2, 128, 128, generator)
    layer[3][0, 5] = 254
    layer[3][1, 6, 1:] = torch.tensor([250, 254, 252])
    layer[3][1, 6, 0] = 253
    packed = pack_experts(*layer, experts_type)
    assert packed.w2_base[0, 5] == packed.w2_base[1, 6] == experts_type.limits.max_base
    for given, back in zip(layer, unpack_experts(packed), strict=True):
        assert torch.equal(given, back)


def test_nan_scales_are_refused(generator):
    layer = random_layer(2, 128, 128, generator)
    w2_scale = layer[3]
    w2_scale[1, 2, 1] = 255
    w2_scale[1, 3] = 255
    report = check_exact(*layer)
    assert report.has_nan and report.num_rows == 2 * 384
    with pytest.raises(Refusal, match=r"layers\.3\.w2 expert 1: 5 scale bytes are 255 \(NaN\)"):
        report.require_exact("layers.3")
    with pytest.raises(Refusal, match="NaN"):
        pack_experts(*layer, may_round=True)


def test_a_format_that_does_not_hold_a_layer_is_the_callers_mistake(generator):
    layer = random_layer(1, 128, 128, generator)
    layer[0][0, 3, ::16] = 0x71
    layer[1][0, 3] = torch.tensor([100, 112, 100, 100], dtype=torch.uint8)
    with pytest.raises(ValueError, match="PackedExperts cannot hold: pack them as WidePackedExperts"):
        pack_experts(*layer, PackedExperts)
    assert type(pack_experts(*layer, WidePackedExperts)) is WidePackedExperts


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.update(w13=t["w13"][:, :, :-1]), "w13_scale has shape"),
        (lambda t: t.update(w13_scale=t["w13_scale"][:1]), r"w13_scale has shape \[1, 256, 4\]"),
        (lambda t: t.update(w2=t["w2"].transpose(1, 2)[:, :32]), "w2 has shape"),
        (lambda t: t.update(w2_scale=t["w2_scale"].float()), "torch.float32 was given where bytes"),
        (lambda t: t.update(w13=t["w13"][0]), r"not \[experts, rows, columns\]"),
    ],
    ids=["odd_columns", "missing_expert", "w2_rows", "float_scale", "no_expert_dim"],
)
def test_tensors_that_do_not_belong_together_are_refused(change, sentence, generator):
    tensors = dict(zip(("w13", "w13_scale", "w2", "w2_scale"), random_layer(2, 128, 128, generator), strict=True))
    change(tensors)
    with pytest.raises(ValueError, match=sentence):
        pack_experts(**tensors)


def test_sizes_that_are_no_multiple_of_128_are_refused(generator):
    with pytest.raises(Refusal, match="intermediate_size 64 is not a positive multiple of 128"):
        pack_experts(*random_layer(1, 128, 64, generator))
    packed = pack_experts(*random_layer(1, 128, 128, generator))
    with pytest.raises(ValueError, match=r"w2_packed is torch.int8 \[1, 1, 1, 2, 4352\], not a contiguous torch.uint8"):
        PackedExperts(packed.w13_packed, packed.w13_base, packed.w2_packed.view(torch.int8), packed.w2_base)


def test_defines_hold_the_contract_numbers():
    wanted = {
        "UNIT_ROWS": 64,
        "UNIT_K": 128,
        "UNIT_BYTES": 4352,
        "H_GROUP": 128,
        "MAX_DELTA": 11,
        "MAX_BASE": 249,
        "WIDE_MAX_DELTA": 28,
        "WIDE_BASE_SHIFT": 15,
        "WIDE_MAX_BASE": 239,
    }
    defines = layout.as_defines()
    assert wanted.items() <= defines.items()
    assert all(type(value) is int for value in defines.values())


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((4000, 2048, 256, 6), "hidden_size 4000"),
        ((4096, 0, 256, 6), "intermediate_size 0"),
        ((4096, 2048, 0, 6), "num_experts 0"),
        ((4096, 2048, 256, 17), "top_k 17 is outside"),
        ((4096, 2048, 4, 6), "top_k 6 is above num_experts 4"),
    ],
    ids=str,
)
def test_check_shape_refuses(shape, sentence):
    with pytest.raises(Refusal, match=sentence):
        layout.check_shape(*shape)
    layout.check_shape(4096, 2048, 256, 6)
