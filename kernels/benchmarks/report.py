"""What a benchmark run leaves behind: JSON lines with fixed keys, a table, and a plot of us vs tokens against the floors.

`python -m hopper_moe.kernels.benchmarks.report FILE.jsonl ... --plot FILE.png` draws kept runs again, on any machine.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hopper_moe.kernels.benchmarks.workload import SHAPES, ModelShape
from hopper_moe.quantization import layout


def file_label(sku: str) -> str:
    """A GPU's label as it begins the names of result files."""
    return sku.lower().replace(" ", "_")


@dataclass(frozen=True)
class Measurement:
    """One line of a results file; exactly these keys. Times are of whole calls of the layer: pre-dispatch and fused kernel."""

    kernel: str
    sku: str
    shape: str  # key of workload.SHAPES
    ranks: int
    local_experts: int  # per rank
    tokens: int  # per rank
    touched_experts: float  # of one rank, mean over the calls
    routing: str
    graph: bool
    us_median: float
    us_p10: float
    us_p90: float
    us_max: float  # median of the slowest rank
    weights_tbps: float  # bytes of the touched experts / us_median
    hbm_read_tbps: float  # ceiling measured in the same run
    tflops: float  # 2 flops per multiply-add of both layers / us_median
    fp8_matmul_tflops: float  # ceiling measured in the same run
    commit: str

    @classmethod
    def of(
        cls,
        spread: tuple[float, float, float],
        *,
        slowest: float,
        touched: float,
        num_bytes: float,
        ceilings: tuple[float, float],
        **run: Any,
    ) -> Measurement:
        """A line from what was measured: us (median, 10th, 90th percentile), the slowest rank's median, experts touched and the
        bytes of them that were read, (TB/s read, FP8 TFLOP/s) of the same run. `run`: the other keys."""
        median, p10, p90 = spread
        hbm, fp8 = ceilings
        return cls(
            **run,
            touched_experts=round(touched, 2),
            us_median=round(median, 2),
            us_p10=round(p10, 2),
            us_p90=round(p90, 2),
            us_max=round(slowest, 2),
            weights_tbps=round(num_bytes / median / 1e6, 3),
            hbm_read_tbps=round(hbm, 3),
            tflops=round(layer_flops(SHAPES[run["shape"]], run["tokens"]) / median / 1e6, 2),
            fp8_matmul_tflops=round(fp8, 1),
        )

    @property
    def hbm_floor_us(self) -> float:
        """Reading every touched expert once at the measured read rate."""
        return weight_bytes(SHAPES[self.shape], self.touched_experts) / self.hbm_read_tbps / 1e6

    @property
    def compute_floor_us(self) -> float:
        """All products at the measured FP8 matmul rate."""
        return layer_flops(SHAPES[self.shape], self.tokens) / self.fp8_matmul_tflops / 1e6

    @property
    def floor_us(self) -> float:
        return max(self.hbm_floor_us, self.compute_floor_us)


def weight_bytes(shape: ModelShape, num_experts: float) -> float:
    """Packed bytes of `num_experts` experts."""
    return num_experts * layout.packed_expert_bytes(shape.hidden_size, shape.intermediate_size)


def layer_flops(shape: ModelShape, num_tokens: int) -> float:
    """Multiply and add of w1, w3 and w2 for every slot of `num_tokens` tokens."""
    return 6.0 * num_tokens * shape.top_k * shape.hidden_size * shape.intermediate_size


def save(rows: Sequence[Measurement], path: Path) -> None:
    """Writes JSON lines. Existing files are replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))


def load(path: Path) -> list[Measurement]:
    """Reads JSON lines. A missing or an unknown key is a TypeError."""
    return [Measurement(**json.loads(line)) for line in path.read_text().splitlines()]


def table(rows: Sequence[Measurement], kernel_us: Sequence[float | None] | None = None) -> str:
    """A table for people. `kernel_us`: the fused kernel alone, from the profiler, per row; it is not part of a results file."""
    head = (
        "tokens",
        "us/call",
        "p10",
        "p90",
        "slowest",
        "kernel us",
        "floor us",
        "of floor",
        "experts",
        "TB/s",
        "of read",
        "TFLOP/s",
        "of fp8",
    )
    lines = []
    for row, alone in zip(rows, kernel_us or [None] * len(rows), strict=True):
        us = (f"{value:.1f}" for value in (row.us_median, row.us_p10, row.us_p90, row.us_max))
        memory = (f"{row.weights_tbps:.2f}", f"{row.weights_tbps / row.hbm_read_tbps:.0%}")
        compute = (f"{row.tflops:.1f}", f"{row.tflops / row.fp8_matmul_tflops:.0%}")
        floor = (f"{row.floor_us:.1f}", f"{row.floor_us / row.us_median:.0%}", f"{row.touched_experts:.1f}")
        lines.append((f"{row.tokens}", *us, "-" if alone is None else f"{alone:.1f}", *floor, *memory, *compute))
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *lines))


def plot(rows: Sequence[Measurement], path: Path) -> None:
    """us per call against tokens, one line per (kernel, shape, ranks, routing, graph), and its floors. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    series: dict[tuple, list[Measurement]] = {}
    for row in rows:
        series.setdefault((row.kernel, row.shape, row.ranks, row.routing, row.graph), []).append(row)
    floors_of = set()  # one pair of floors for all kernels of a shape
    for (kernel, shape, ranks, routing, graph), points in series.items():
        points.sort(key=lambda row: row.tokens)
        tokens = [row.tokens for row in points]
        label = f"{kernel} {shape}, {ranks} rank{'s' * (ranks > 1)}, {routing}{'' if graph else ', eager'}"
        (line,) = axes.plot(tokens, [row.us_max for row in points], "o-", label=label)
        color = line.get_color()
        axes.fill_between(tokens, [row.us_p10 for row in points], [row.us_p90 for row in points], color=color, alpha=0.2)
        if (shape, ranks, routing) in floors_of:
            continue
        floors_of.add((shape, ranks, routing))
        label = f"{shape}: touched FP4 weights / HBM read"
        axes.plot(tokens, [row.hbm_floor_us for row in points], "--", color=color, label=label)
        axes.plot(tokens, [row.compute_floor_us for row in points], ":", color=color, label=f"{shape}: flops / FP8 matmul")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5 * min(row.hbm_floor_us for row in rows))
    axes.set_xlabel("tokens per rank")
    axes.set_ylabel("us per layer call")
    axes.set_title(f"{rows[0].sku}, commit {rows[0].commit}")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="Also draw them into this file.")
def main(files: tuple[Path, ...], plot_path: Path | None) -> None:
    """Print the tables of results files, and draw them."""
    every = []
    for path in files:
        rows = load(path)
        every += rows
        click.echo(f"{path}\n{table(rows)}\n")
    if plot_path is not None:
        plot(every, plot_path)
        click.echo(f"drawn: {plot_path}")


if __name__ == "__main__":
    main()
