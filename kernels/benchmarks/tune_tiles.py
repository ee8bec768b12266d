"""Measures which token tile is fastest for how many rows, and keeps the table in `kernels/measured.json`.

`python -m hopper_moe.kernels.benchmarks.tune_tiles --shape flash [--write]`. Every expert gets the same number of rows, so that
one tile serves the whole call; the fused layer's whole call is timed as in the benchmark, on cold weights.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping

import click
import torch
from tqdm import tqdm

from hopper_moe.kernels import measured, tile_table
from hopper_moe.kernels.benchmarks import measure
from hopper_moe.kernels.benchmarks.mega_moe import WEIGHT_COPIES, copies_of
from hopper_moe.kernels.benchmarks.options import RefusingCommand, commit_option
from hopper_moe.kernels.benchmarks.workload import SHAPES, ModelShape, make_layer, random_experts, random_tokens
from hopper_moe.kernels.device import current_device
from hopper_moe.kernels.tile_table import MAX_TILE, TILES, TileTable, forced_tile
from hopper_moe.quantization.errors import Refusal

LARGE_ROWS = 768  # rows per expert at which the largest tile is chosen: a multiple of every tile
NUM_CALLS, NUM_LAUNCHES = 8, 10
NEAR = 1.01  # a smaller tile that is this close to the best one is taken: less padding


def even_routing(num_rows: int, num_experts: int, top_k: int, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    """(int32 ids [M, top_k], float32 weights) that give every expert exactly `num_rows` rows; slots left over are -1."""
    num_slots = num_rows * num_experts
    num_tokens = -(-num_slots // top_k)
    ids = torch.full((num_tokens * top_k,), -1, dtype=torch.int32, device=device)
    ids[:num_slots] = torch.arange(num_slots, dtype=torch.int32, device=device) % num_experts
    return ids.view(num_tokens, top_k), torch.full((num_tokens, top_k), 1 / top_k, device=device)


def choose(us: Mapping[int, float]) -> int:
    """The smallest tile within NEAR of the fastest. us: tile -> time."""
    return min(tile for tile, time in us.items() if time <= NEAR * min(us.values()))


def build_table(max_tile: int, us: Mapping[int, Mapping[int, float]]) -> TileTable:
    """us: rows (8, 16, ... max_tile) -> tile -> time. Entries beyond max_tile are never used and repeat the last one."""
    tail = [choose(us[rows]) for rows in range(8, max_tile + 1, 8)]
    return TileTable(max_tile, tuple([tail[0], *tail] + [max_tile] * (MAX_TILE // 8 - len(tail))))


class Tuner:
    """Times calls in which every expert has the same number of rows."""

    def __init__(self, shape: ModelShape, num_experts: int) -> None:
        self.shape, self.num_experts = shape, num_experts
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.weights = copies_of(random_experts(shape, num_experts, self.generator), WEIGHT_COPIES)

    def time(self, num_rows: int, tiles: TileTable) -> float:
        """Median us of a call."""
        ids, topk_weights = even_routing(num_rows, self.num_experts, self.shape.top_k)
        x = random_tokens(self.shape, ids.shape[0], self.generator)
        layer, y = make_layer(self.shape, self.num_experts, ids.shape[0], tiles=tiles), torch.empty_like(x)
        weights = list(itertools.islice(itertools.cycle(self.weights), NUM_CALLS))

        def run() -> None:
            for packed in weights:
                layer(x, ids, topk_weights, packed, swiglu_limit=self.shape.swiglu_limit, out=y)

        return statistics.median(measure.replay_times(run, NUM_CALLS, NUM_LAUNCHES, graph=True))


@click.command(cls=RefusingCommand)
@click.option("--shape", "shape_name", type=click.Choice(list(SHAPES)), default="flash", show_default=True)
@click.option("--sku", help='Label of this GPU type in the tables, such as "H200"; with --write a GPU without one needs it.')
@commit_option
@click.option("--write", is_flag=True, help="Keep the table in kernels/measured.json.")
def main(shape_name: str, sku: str | None, commit: str, write: bool) -> None:
    """Measure every built tile for 8, 16, ... 128 rows per expert and print the table."""
    device = current_device()
    if device is None:
        raise Refusal("this machine has no CUDA GPU: tuning needs an SM90 GPU (Hopper).")
    sku = measured.label_to_write(device, sku) if write else sku or measured.label(device)
    shape = SHAPES[shape_name]
    tuner = Tuner(shape, shape.local_experts)
    large = {tile: tuner.time(LARGE_ROWS, forced_tile(tile)) for tile in tqdm(TILES, desc=f"{LARGE_ROWS} rows")}
    max_tile = choose(large)
    us: dict[int, dict[int, float]] = {}
    for rows in tqdm(range(8, max_tile + 1, 8), desc="rows per expert"):
        us[rows] = {tile: tuner.time(rows, forced_tile(tile)) for tile in TILES if rows <= tile <= max_tile}
    click.echo("us per call\n" + "rows".rjust(6) + "".join(f"tile {tile}".rjust(11) for tile in TILES))
    for rows, times in {**us, LARGE_ROWS: large}.items():
        cells = (f"{times[tile]:.1f}" if tile in times else "-" for tile in TILES)
        click.echo(f"{rows:6}" + "".join(cell.rjust(11) for cell in cells) + f"   -> {choose(times)}")
    table = build_table(max_tile, us)
    click.echo(f"\n{sku}: {table}")
    if write:
        click.echo(f"written: {tile_table.keep(sku, table, f'{shape_name}, {commit}')}")


if __name__ == "__main__":
    main()
