"""Tokens per WGMMA tile: one printable table per GPU type, applied to every expert on the device at run time.

The rows of an expert are divided into blocks of `max_tile` rows and one last block, whose tile the table gives for the remaining
rows. Tiles, and pairs of blocks in L1, change only the time and never the bits of a result, since the order of k does not depend
on them.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path

from hopper_moe.kernels import measured
from hopper_moe.kernels.device import Device

logger = logging.getLogger("hopper_moe")

TILES = (8, 16, 32, 64, 96, 128)
MAX_TILE = 128
PAIR_FROM = 12  # default of tables that were not measured


@dataclass(frozen=True)
class TileTable:
    """`tail_tile[r]`: tile for a last block of 8 * (r - 1) + 1 .. 8 * r rows. `pair_from`: L1 tasks per SM from which on
    neighbouring blocks of 128 rows are one L1 task (FP4 weights: each is decoded once for both); 0: always."""

    max_tile: int
    tail_tile: tuple[int, ...]
    pair_from: int = PAIR_FROM

    def __post_init__(self) -> None:
        if self.max_tile not in TILES:
            raise ValueError(f"max_tile {self.max_tile} is not one of the built tiles {list(TILES)}.")
        if len(self.tail_tile) != MAX_TILE // 8 + 1:
            raise ValueError(f"tail_tile has {len(self.tail_tile)} entries, not {MAX_TILE // 8 + 1} (0, 8, ... 128 rows).")
        if not 0 <= self.pair_from < 1 << 16:
            raise ValueError(f"pair_from {self.pair_from} is not in 0..{(1 << 16) - 1} L1 tasks per SM.")
        for eighths, tile in enumerate(self.tail_tile[: self.max_tile // 8 + 1]):
            if tile not in TILES or not eighths * 8 <= tile <= self.max_tile:
                raise ValueError(f"tile {tile} for up to {eighths * 8} rows is not a built tile {list(TILES)} that holds them.")

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


def keep(sku: str, table: TileTable, note: str, path: Path = measured.PATH) -> Path:
    """Write the table of a GPU type into section `tiles`, replacing an older one; `note`: what it was measured on. Returns the
    path."""
    record = {"sku": sku, **dataclasses.asdict(table), "note": note}
    return measured.put("tiles", [record], lambda record: record["sku"], path)


def tables(path: Path = measured.PATH) -> dict[str, TileTable]:
    """Label of a measured GPU type -> its table."""
    return {
        record["sku"]: TileTable(record["max_tile"], tuple(record["tail_tile"]), record["pair_from"])
        for record in measured.read(path)["tiles"]
    }


@functools.cache
def table_for(device: Device, path: Path = measured.PATH) -> TileTable:
    """The table of any SM90 GPU: the one measured on it, else that of the nearest measured GPU. Logs which, once."""
    known = tables(path)
    picked = measured.pick(device, known, path)
    if picked is None:
        logger.info("token tiles: the smallest that hold the rows, since no GPU was measured")
        return smallest_tiles()
    logger.info("token tiles of %s: %s", picked.sku, picked.reason)
    return known[picked.sku]
