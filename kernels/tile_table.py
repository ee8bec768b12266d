"""How many tokens one WGMMA tile takes: one printable table per SKU, applied to every expert at run time on the device.

An expert with `count` rows is cut into blocks of `max_tile` rows and one last block whose tile the table gives for the rest. The
tile never changes a result's bits (the order of k does not depend on it), only its time. Neither does L1's taking two blocks of
the widest tile at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from hopper_moe.moe_backends.errors import Refusal

TILES = (8, 16, 32, 64, 96, 128)
MAX_TILE = 128
PAIR_FROM = 12  # Flash 1024 and 1536 tokens 0.7 % faster than with 6, 2048 and more the same


@dataclass(frozen=True)
class TileTable:
    """`tail_tile[r]`: tile for a last block of 8 * (r - 1) + 1 .. 8 * r rows. `pair_from`: L1 tasks per SM from which on
    neighbouring blocks of 128 rows are one L1 task (FP4 weights: each is decoded once for both); 0: always."""

    max_tile: int
    tail_tile: tuple[int, ...]
    pair_from: int = PAIR_FROM

    def __post_init__(self) -> None:
        if self.max_tile not in TILES:
            raise Refusal(f"max_tile {self.max_tile} is not one of the built tiles {list(TILES)}.")
        if len(self.tail_tile) != MAX_TILE // 8 + 1:
            raise Refusal(f"tail_tile has {len(self.tail_tile)} entries, not {MAX_TILE // 8 + 1} (0, 8, ... 128 rows).")
        if not 0 <= self.pair_from < 1 << 16:
            raise Refusal(f"pair_from {self.pair_from} is not in 0..{(1 << 16) - 1} L1 tasks per SM.")
        for eighths, tile in enumerate(self.tail_tile[: self.max_tile // 8 + 1]):
            if tile not in TILES or not eighths * 8 <= tile <= self.max_tile:
                raise Refusal(f"tile {tile} for up to {eighths * 8} rows is not a built tile {list(TILES)} that holds them.")

    def as_list(self) -> list[int]:
        """As the library takes it."""
        return [self.max_tile, self.pair_from, *self.tail_tile]

    def __str__(self) -> str:
        ranges, first = [], 1
        for eighths in range(1, self.max_tile // 8 + 1):
            tile = self.tail_tile[eighths]
            if eighths == self.max_tile // 8 or self.tail_tile[eighths + 1] != tile:
                ranges.append(f"{first}-{eighths * 8} rows: {tile}")
                first = eighths * 8 + 1
        return f"blocks of {self.max_tile}; last block " + ", ".join(ranges) + f"; pairs from {self.pair_from} L1 tasks per SM"


def smallest_tiles(max_tile: int = MAX_TILE) -> TileTable:
    """The smallest tile that holds the rows."""
    fits = [next((t for t in TILES if t >= 8 * r), MAX_TILE) for r in range(MAX_TILE // 8 + 1)]
    return TileTable(max_tile, tuple(min(t, max_tile) for t in fits))


def forced_tile(tile: int) -> TileTable:
    """Every block uses `tile`: for tests and measurements."""
    return TileTable(tile, (tile,) * (MAX_TILE // 8 + 1))


# SKU (torch.cuda device name contains the key) -> table. A measured one says on what; the others are the smallest tile that fits.
# `python -m hopper_moe.kernels.benchmarks.tune_tiles --write` rewrites a line between the marks.
# begin tables
TABLES = {
    "H200": smallest_tiles(),
    "H100": smallest_tiles(),
    "H20": smallest_tiles(),
}
# end tables


def sku_of(device_name: str) -> str:
    """The key of a GPU in TABLES. Longest key first, since "H20" is part of "H200". Refuses an unknown SKU."""
    for sku in sorted(TABLES, key=len, reverse=True):
        if sku in device_name:
            return sku
    known = sorted(TABLES)
    raise Refusal(f"no tile table for {device_name!r}: known are {known}; measure one with kernels/benchmarks/tune_tiles.py.")


def table_for(device_name: str) -> TileTable:
    """The table of a GPU by its name. Refuses an unknown SKU."""
    return TABLES[sku_of(device_name)]
