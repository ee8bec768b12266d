"""The tile tables: what they promise the kernel, which GPU gets which, and the commands that print and rewrite them."""

import pytest
from click.testing import CliRunner

from hopper_moe.kernels.build import main
from hopper_moe.kernels.tile_table import MAX_TILE, TABLES, TILES, TileTable, forced_tile, sku_of, smallest_tiles, table_for
from hopper_moe.moe_backends.errors import Refusal


def test_every_table_holds_every_rest():
    for table in (*TABLES.values(), *map(smallest_tiles, TILES), *map(forced_tile, TILES)):
        for rows in range(1, table.max_tile):
            tile = table.tail_tile[-(-rows // 8)]
            assert tile in TILES and rows <= tile <= table.max_tile, (table, rows)
        assert table.as_list() == [table.max_tile, table.pair_from, *table.tail_tile] and len(table.as_list()) == 19


@pytest.mark.parametrize(
    "max_tile, tail_tile",
    [
        (24, (8,) * 17),  # no such tile
        (128, (128,) * 16),  # one entry short
        (128, (8,) * 17),  # 16 rows do not fit 8
        (64, (128,) * 17),  # above max_tile
        (128, (128,) * 16 + (112,)),  # no such tile at the end
    ],
)
def test_a_table_that_would_lose_rows_is_refused(max_tile, tail_tile):
    with pytest.raises(Refusal):
        TileTable(max_tile, tail_tile)


@pytest.mark.parametrize("pair_from", [-1, 1 << 16])
def test_a_number_of_tasks_the_kernel_cannot_hold_is_refused(pair_from):
    with pytest.raises(Refusal, match=f"pair_from {pair_from} "):
        TileTable(8, (8,) * 17, pair_from)


def test_smallest_tiles_are_the_smallest():
    assert smallest_tiles().tail_tile == (8, 8, 16, 32, 32, *(64,) * 4, *(96,) * 4, *(128,) * 4)
    assert forced_tile(32).tail_tile == (32,) * (MAX_TILE // 8 + 1)


@pytest.mark.parametrize(
    "name, sku", [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H20", "H20"), ("NVIDIA H20-3e", "H20")]
)
def test_gpus_get_their_own_table(name, sku):
    assert sku_of(name) == sku
    assert table_for(name) is TABLES[sku]


def test_an_unknown_gpu_is_refused():
    with pytest.raises(Refusal, match="A100.*tune_tiles"):
        table_for("NVIDIA A100-SXM4-80GB")


def test_table_command_prints_every_sku():
    printed = CliRunner().invoke(main, ["table"], catch_exceptions=False).output
    for sku, table in TABLES.items():
        assert f"{sku}: {table}" in printed
    assert (
        str(smallest_tiles())
        == "blocks of 128; last block 1-8 rows: 8, 9-16 rows: 16, 17-32 rows: 32, 33-64 rows: 64, "
        "65-96 rows: 96, 97-128 rows: 128; pairs from 12 L1 tasks per SM"
    )
