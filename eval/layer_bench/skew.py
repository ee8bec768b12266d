"""Times the fused layer where some experts are chosen far more often than others, without EPLB and with it.

\b
    hopper-moe bench skew --shape flash --ranks 2 --tokens 512 --tokens 8192 --out DIR

Expert e is chosen in proportion to 1 / (e + 1)^s, so without EPLB the first rank has the hot ones. "ideal" is one GPU alone with
as many rows as the busiest rank got, spread evenly over as many experts: what no exchange and no skew inside a rank would leave.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from tqdm import tqdm

from hopper_moe.eval.layer_bench.placement import Placement, balanced, in_order
from hopper_moe.kernels.benchmarks import measure
from hopper_moe.kernels.benchmarks.mega_moe import calls_per_launch, check_run, copies_of, layer_calls
from hopper_moe.kernels.benchmarks.options import ListCommand, commit_option, counts, decimals
from hopper_moe.kernels.benchmarks.ranks import run_on_ranks
from hopper_moe.kernels.benchmarks.workload import SHAPES, ModelShape, make_layer, random_experts, random_routing, random_tokens
from hopper_moe.kernels.mega_moe import MegaMoE
from hopper_moe.quantization.errors import Refusal

NUM_LAUNCHES = 30  # timed
WEIGHT_COPIES = 2
COUNTED_TOKENS = 65536  # that EPLB's counts are of: other tokens than the timed ones


@dataclass(frozen=True)
class Case:
    """`exponent` s of the popularity 1 / (e + 1)^s, 0 is uniform; `redundant`: None is without EPLB."""

    tokens: int  # per rank
    exponent: float
    redundant: int | None


@dataclass(frozen=True)
class Result:
    """us per call: the slowest rank's median, and its 10th and 90th percentile. `rows`: of each rank, mean of the timed calls."""

    tokens: int
    exponent: float
    redundant: int | None
    us: float
    us_p10: float
    us_p90: float
    rows: list[float]
    ideal_us: float | None = None  # of one GPU alone with the rows of the busiest rank


def cases(tokens: tuple[int, ...], exponents: list[float], redundant: list[int]) -> list[Case]:
    """Uniform first, then each exponent without EPLB, with rearrangement, and with redundant experts."""
    kinds = [(0.0, None), *itertools.product(exponents, (None, *redundant))]
    return [Case(count, exponent, extra) for exponent, extra in kinds for count in tokens]


def placed(case: Case, num_experts: int, top_k: int, num_ranks: int) -> Placement:
    if case.redundant is None:
        return in_order(num_experts, num_ranks)
    generator = torch.Generator().manual_seed(1)
    ids, _ = random_routing(COUNTED_TOKENS, num_experts, top_k, "zipf", generator, "cpu", exponent=case.exponent)
    return balanced(torch.bincount(ids.flatten().long(), minlength=num_experts), num_ranks, case.redundant)


def timed(
    layer: MegaMoE, shape: ModelShape, inputs: Sequence[tuple[torch.Tensor, ...]], weights: Sequence[Any]
) -> tuple[float, float, float]:
    """us per call (median, 10th, 90th percentile) of a launch with a call for each of `inputs`."""
    run = layer_calls(layer, shape, inputs, weights)
    return measure.spread(measure.replay_times(run, len(inputs), NUM_LAUNCHES, graph=True))


def measure_rank(
    group: dist.ProcessGroup | None, shape_name: str, num_experts: int, planned: list[Case]
) -> list[tuple[Any, ...]]:
    """((median, p10, p90), rows that this rank's tokens send to each rank) for each case."""
    shape, found = SHAPES[shape_name], []
    rank, num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    generator = torch.Generator("cuda").manual_seed(rank)
    for case in tqdm(planned, desc=f"{shape_name} skew", unit="case", disable=rank > 0):
        placement = placed(case, num_experts, shape.top_k, num_ranks)
        layer = make_layer(shape, len(placement.logical_of), case.tokens, group=group)
        weights = copies_of(random_experts(shape, placement.places_per_rank, generator), WEIGHT_COPIES)
        place_for, inputs, rows = placement.place_for[rank].cuda(), [], torch.zeros(num_ranks)
        for _ in range(calls_per_launch(case.tokens)):
            ids, topk_weights = random_routing(case.tokens, num_experts, shape.top_k, "zipf", generator, exponent=case.exponent)
            places = place_for[ids.long()]
            inputs.append((random_tokens(shape, case.tokens, generator), places, topk_weights))
            rows += torch.bincount((places.flatten() // placement.places_per_rank).cpu(), minlength=num_ranks)
        layer.buffer.barrier()
        found.append((timed(layer, shape, inputs, weights), (rows / len(inputs)).tolist()))
        layer.buffer.barrier()
    return found


def ideal(shape_name: str, num_local: int, num_rows: float) -> float:
    """us of one GPU with `num_rows` rows over `num_local` experts, uniform."""
    shape = SHAPES[shape_name]
    num_tokens = max(1, round(num_rows / shape.top_k))
    generator = torch.Generator("cuda").manual_seed(7)
    layer = make_layer(shape, num_local, num_tokens)
    weights = copies_of(random_experts(shape, num_local, generator), WEIGHT_COPIES)
    inputs = [
        (random_tokens(shape, num_tokens, generator), *random_routing(num_tokens, num_local, shape.top_k, "uniform", generator))
        for _ in range(calls_per_launch(num_tokens))
    ]
    return timed(layer, shape, inputs, weights)[0]


def results(planned: list[Case], by_rank: list[list[tuple[Any, ...]]]) -> list[Result]:
    """The slowest rank's times, and each rank's rows from all ranks' tokens."""
    found = []
    for case, of_ranks in zip(planned, zip(*by_rank, strict=True), strict=True):
        median, p10, p90 = max(spread for spread, _ in of_ranks)
        rows = [sum(part) for part in zip(*(rows for _, rows in of_ranks), strict=True)]
        found.append(Result(case.tokens, case.exponent, case.redundant, round(median, 2), round(p10, 2), round(p90, 2), rows))
    return found


def table(found: list[Result]) -> str:
    """Against uniform routing of as many tokens, and against the busiest rank's ideal."""
    uniform = {result.tokens: result.us for result in found if result.exponent == 0}
    lines = [
        "| tokens | zipf | EPLB | us (p10-p90) | of uniform | rows, busiest of mean | ideal us | of ideal |",
        "|---" * 8 + "|",
    ]
    for result in found:
        eplb = "none" if result.redundant is None else f"{result.redundant} redundant" if result.redundant else "rearranged"
        share = max(result.rows) / statistics.fmean(result.rows)
        against = "" if result.ideal_us is None else f"{result.ideal_us:.1f} | {result.us / result.ideal_us:.3f}"
        lines.append(
            f"| {result.tokens} | {result.exponent:g} | {eplb} | {result.us:.1f} ({result.us_p10:.1f}-{result.us_p90:.1f}) "
            f"| {result.us / uniform[result.tokens]:.3f} | {share:.2f} | {against or ' | '} |"
        )
    return "\n".join(lines)


@click.command(cls=ListCommand)
@click.option("--shape", "shape_name", type=click.Choice(list(SHAPES)), default="flash", show_default=True)
@click.option("--tokens", type=int, multiple=True, default=(512, 8192), show_default=True, help="Per rank; several may follow.")
@click.option("--ranks", type=int, default=2, show_default=True, help="GPUs, one rank each.")
@click.option("--exponents", default="1.0,1.2", show_default=True, help="Of the popularity 1 / (e + 1)^s.")
@click.option("--redundant", default="0,16,64", show_default=True, help="Redundant experts with EPLB; 0: rearranged only.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the JSON lines.")
@commit_option
def main(
    shape_name: str, tokens: tuple[int, ...], ranks: int, exponents: str, redundant: str, out: Path | None, commit: str
) -> None:
    """Time the fused layer under skewed routing, without EPLB and with it, against uniform routing and an ideal."""
    shape = SHAPES[shape_name]
    check_run(ranks, tokens, shape.num_experts // ranks, shape)
    extra = counts("--redundant", redundant)
    if uneven := [count for count in extra if (shape.num_experts + count) % ranks]:
        raise Refusal(f"--redundant {uneven[0]}: {shape.num_experts + uneven[0]} places are no multiple of {ranks} ranks.")
    planned = cases(tokens, decimals("--exponents", exponents), extra)
    found = []
    for result in results(planned, run_on_ranks(ranks, measure_rank, shape_name, shape.num_experts, planned)):
        places = (shape.num_experts + (result.redundant or 0)) // ranks
        found.append(replace(result, ideal_us=ideal(shape_name, places, max(result.rows))))
    click.echo(table(found))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        facts = {"shape": shape_name, "ranks": ranks, "commit": commit, "gpu": torch.cuda.get_device_name()}
        lines = [json.dumps({**facts, **asdict(result)}) for result in found]
        (out / f"{shape_name}_skew.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
