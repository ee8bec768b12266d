"""Times the fused FP4 layer: `python -m hopper_moe.kernels.benchmarks.mega_moe --shape flash --tokens 1 8 64 ...`.

A call is the whole layer: pre-dispatch and the fused kernel; with --ranks N on N GPUs at once, the slowest of which counts. The
calls of one timed launch have different tokens and routing and take turns over copies of the weights, so that no call finds in
the L2 cache what an earlier one has read.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from tqdm import tqdm

from hopper_moe.kernels import measured
from hopper_moe.kernels.benchmarks import measure, report
from hopper_moe.kernels.benchmarks.options import ListCommand, commit_option
from hopper_moe.kernels.benchmarks.ranks import check_ranks, run_on_ranks
from hopper_moe.kernels.benchmarks.workload import (
    ROUTINGS,
    SHAPES,
    ModelShape,
    make_layer,
    random_checkpoint,
    random_routing,
    random_tokens,
    widen_rows,
)
from hopper_moe.kernels.device import Device, current_device
from hopper_moe.kernels.mega_moe import MegaMoE
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import PackedExperts, WidePackedExperts, pack_experts

KERNEL = "mxfp4_mega"
NUM_LAUNCHES = 50  # timed, per token count
WEIGHT_COPIES = 4


def calls_per_launch(num_tokens: int) -> int:
    """Calls in one timed launch (one CUDA graph): enough to hide its start, few enough to be quick."""
    return 20 if num_tokens < 1024 else 4


def copies_of(packed: PackedExperts, count: int) -> list[PackedExperts]:
    """`packed` and count - 1 clones."""
    fields = [field.name for field in dataclasses.fields(packed)]
    return [packed] + [type(packed)(*(getattr(packed, name).clone() for name in fields)) for _ in range(count - 1)]


def layer_calls(
    layer: MegaMoE, shape: ModelShape, inputs: Sequence[tuple[torch.Tensor, ...]], weights: Sequence[Any]
) -> Callable[[], None]:
    """What a timed launch runs: one call of `layer` for each of `inputs` (tokens, ids and weights of as many tokens), with the
    copies of the experts in turn. Results go into one tensor."""
    y = torch.empty_like(inputs[0][0])

    def run() -> None:
        for (x, ids, topk_weights), packed in zip(inputs, itertools.cycle(weights), strict=False):
            layer(x, ids, topk_weights, packed, swiglu_limit=shape.swiglu_limit, out=y)

    return run


@dataclass(frozen=True)
class Setup:
    """One benchmark run. `tokens`: per rank; `local_experts`: of one rank."""

    shape_name: str
    tokens: tuple[int, ...]
    local_experts: int
    routing: str
    graph: bool
    fp8_combine: bool
    fp4_dispatch: bool
    scales: str  # of SCALES
    seed: int


SCALES: dict[str, tuple[type[PackedExperts], float]] = {
    "normal": (PackedExperts, 0.0),
    "normal_on_wide": (WidePackedExperts, 0.0),
    "wide": (WidePackedExperts, 0.01),
}
"""Format of the weights, and the share of their rows whose scales span 12 to 28 octaves."""


class LayerBenchmark:
    """One shape on one GPU, or on one rank of a group: weights, workspace, and timed calls."""

    def __init__(self, setup: Setup, group: dist.ProcessGroup | None = None) -> None:
        self.setup, self.shape = setup, SHAPES[setup.shape_name]
        self.rank, self.num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self.num_experts = setup.local_experts * self.num_ranks
        self.generator = torch.Generator("cuda").manual_seed(setup.seed + self.rank)
        weights, wide_share = SCALES[setup.scales]
        checkpoint = random_checkpoint(self.shape, setup.local_experts, self.generator)
        checkpoint = widen_rows(checkpoint, wide_share, self.generator) if wide_share else checkpoint
        self.weights = copies_of(pack_experts(*checkpoint, weights), WEIGHT_COPIES)
        self.layer = make_layer(
            self.shape,
            self.num_experts,
            max(setup.tokens),
            group=group,
            weights=weights,
            fp8_combine=setup.fp8_combine,
            fp4_dispatch=setup.fp4_dispatch,
        )

    def measure(self, num_tokens: int) -> tuple[list[float], float, float]:
        """(us per call of every timed launch, median us of the fused kernel alone, mean number of experts touched here)."""
        shape, num_calls, routing = self.shape, calls_per_launch(num_tokens), self.setup.routing
        routings = [random_routing(num_tokens, self.num_experts, shape.top_k, routing, self.generator) for _ in range(num_calls)]
        inputs = [(random_tokens(shape, num_tokens, self.generator), *routing) for routing in routings]
        run = layer_calls(self.layer, shape, inputs, self.weights)
        self.layer.buffer.barrier()
        times = measure.replay_times(run, num_calls, NUM_LAUNCHES, self.setup.graph)
        touched = statistics.mean(self._num_touched(ids) for ids, _ in routings)
        self.layer.buffer.barrier()
        return times, measure.kernel_time(run, "mega_moe_kernel"), touched

    def _num_touched(self, ids: torch.Tensor) -> int:
        """Local experts that some rank's tokens chose."""
        chosen = torch.bincount(ids.flatten().long(), minlength=self.num_experts)
        if self.num_ranks > 1:
            dist.all_reduce(chosen)
        return int((chosen.chunk(self.num_ranks)[self.rank] > 0).sum())


def measure_rank(group: dist.ProcessGroup | None, setup: Setup) -> list[tuple[list[float], float, float]]:
    """`LayerBenchmark.measure` for every token count, on one rank."""
    benchmark = LayerBenchmark(setup, group)
    sizes = tqdm(setup.tokens, desc=f"{setup.shape_name} {setup.routing}", unit="size", disable=benchmark.rank > 0)
    return [benchmark.measure(num_tokens) for num_tokens in sizes]


def rows_of(
    setup: Setup, by_rank: list[list[tuple[list[float], float, float]]], ceilings: tuple[float, float], of_run: dict[str, Any]
) -> tuple[list[report.Measurement], list[float]]:
    """(a line of results per token count, us of the fused kernel alone) from what every rank measured; times are rank 0's.

    `ceilings`, `of_run`: see `Measurement.of`.
    """
    shape, rows, alone = SHAPES[setup.shape_name], [], []
    for num_tokens, of_ranks in zip(setup.tokens, zip(*by_rank, strict=True), strict=True):
        times, kernel_us, touched = of_ranks[0]
        alone.append(kernel_us)
        rows.append(
            report.Measurement.of(
                measure.spread(times),
                slowest=max(statistics.median(times) for times, _, _ in of_ranks),
                touched=touched,
                num_bytes=report.weight_bytes(shape, touched),
                ceilings=ceilings,
                local_experts=setup.local_experts,
                tokens=num_tokens,
                routing=setup.routing,
                graph=setup.graph,
                **of_run,
            )
        )
    return rows, alone


def check_run(ranks: int, tokens: tuple[int, ...], local_experts: int, shape: ModelShape) -> Device:
    """The GPU of a run. Raises Refusal for a run that cannot be."""
    if ranks != 1:
        check_ranks(ranks)
    if min(tokens) < 1:
        raise Refusal(f"--tokens {min(tokens)} is below 1: there is nothing to time.")
    if local_experts < shape.top_k:
        raise Refusal(f"--local-experts {local_experts} is below top_k {shape.top_k}: a token needs that many distinct experts.")
    if (device := current_device()) is None:
        raise Refusal("this machine has no CUDA GPU: benchmarks need an SM90 GPU (Hopper).")
    return device


def deep_gemm_note() -> str:
    """Why nothing is compared with DeepGEMM. Raises Refusal when it has the kernel, which this benchmark cannot time yet."""
    if importlib.util.find_spec("deep_gemm") is None:
        return (
            "deep_gemm is not installed here, so nothing is compared (`pip install sgl-deep-gemm==0.1.5.post1`, with torch 2.11)."
        )
    try:
        import deep_gemm
    except (ImportError, OSError) as error:
        return f"the installed deep_gemm cannot be imported ({error}), so nothing is compared."
    version = getattr(deep_gemm, "__version__", "of unknown version")
    if not hasattr(deep_gemm, "fp8_mega_moe"):
        return f"the installed deep_gemm {version} has no fp8_mega_moe, so nothing is compared."
    raise Refusal(f"deep_gemm {version} has fp8_mega_moe, but this benchmark does not know its arguments: run without --compare.")


@click.command(cls=ListCommand)
@click.option("--shape", "shape_name", type=click.Choice(list(SHAPES)), required=True, help="Layer of which model.")
@click.option("--tokens", type=int, multiple=True, required=True, help="Tokens per rank; several may follow: --tokens 1 8 64.")
@click.option("--ranks", type=int, default=1, show_default=True, help="GPUs, one rank each.")
@click.option("--local-experts", type=int, help="Experts of a rank.  [default: 32 Flash, V3; 48 Pro, V4.1-Flash: EP 8]")
@click.option("--routing", type=click.Choice(ROUTINGS), default="uniform", show_default=True, help="How tokens choose experts.")
@click.option("--graph/--no-graph", default=True, show_default=True, help="Time CUDA graphs, or eager calls.")
@click.option("--fp8-combine", is_flag=True, help="Expert outputs travel as E4M3 (changes the result).")
@click.option("--fp4-dispatch", is_flag=True, help="Tokens travel as E2M1 (changes the result).")
@click.option(
    "--scales",
    type=click.Choice(list(SCALES)),
    default="normal",
    show_default=True,
    help="Weights in the normal format, the same in the wide one, or 1 % of the rows over 12 to 28 octaves.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the JSON lines and the plot.")
@click.option(
    "--compare", type=click.Choice(["deep_gemm"]), help="Also time the installed DeepGEMM FP8 MegaMoE, when it is there."
)
@commit_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights, tokens and routing.")
def main(
    shape_name: str,
    tokens: tuple[int, ...],
    ranks: int,
    local_experts: int | None,
    routing: str,
    graph: bool,
    fp8_combine: bool,
    fp4_dispatch: bool,
    scales: str,
    out: Path | None,
    compare: str | None,
    commit: str,
    seed: int,
) -> None:
    """Time the fused FP4 layer, whole calls (pre-dispatch and fused kernel), on cold weights, against the floors.

    Prints a table; with --out also writes JSON lines and a plot of us vs tokens. Both ceilings, HBM read (torch reductions over 4
    GiB) and FP8 matmul (torch._scaled_mm, 8192^3), are measured in the same run. "kernel us" is the fused kernel alone, from the
    profiler.
    """
    shape = SHAPES[shape_name]
    num_experts = shape.local_experts if local_experts is None else local_experts
    device = check_run(ranks, tokens, num_experts, shape)
    if compare is not None:
        click.echo(deep_gemm_note())
    sku = measured.label(device)
    hbm, fp8 = measure.hbm_read_tbps(), measure.fp8_matmul_tflops()
    setup = Setup(shape_name, tokens, num_experts, routing, graph, fp8_combine, fp4_dispatch, scales, seed)
    options = {"fp8_combine": fp8_combine, "fp4_dispatch": fp4_dispatch, scales: scales != "normal"}
    variant = [name for name, is_on in options.items() if is_on]
    by_rank = [measure_rank(None, setup)] if ranks == 1 else run_on_ranks(ranks, measure_rank, setup)
    of_run = {"kernel": "+".join((KERNEL, *variant)), "sku": sku, "shape": shape_name, "ranks": ranks, "commit": commit}
    rows, alone = rows_of(setup, by_rank, (hbm, fp8), of_run)
    calls = " to ".join(str(calls_per_launch(size)) for size in sorted({min(tokens), max(tokens)}))
    click.echo(
        f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: "
        f"HBM read {hbm:.2f} TB/s, FP8 matmul {fp8:.0f} TFLOP/s\n"
        f"{shape_name}: {ranks} rank{'s' * (ranks > 1)} of {num_experts} experts, {routing} routing, "
        f"{'CUDA graph' if graph else 'eager'}, room for {max(tokens)} tokens, {NUM_LAUNCHES} launches of {calls} calls each\n"
        f"us/call: pre-dispatch and fused kernel; kernel us: fused kernel alone\n{report.table(rows, alone)}"
    )
    if out is not None:
        suffix = "".join(f"_{name}" for name in (*variant, *(() if graph else ("eager",))))
        keep(rows, out / f"{report.file_label(sku)}{f'x{ranks}' * (ranks > 1)}_{shape_name}_{routing}{suffix}")


def keep(rows: list[report.Measurement], stem: Path) -> None:
    """Writes `<stem>.jsonl` and, where matplotlib is, `<stem>.png`."""
    lines, picture = stem.with_name(f"{stem.name}.jsonl"), stem.with_name(f"{stem.name}.png")
    report.save(rows, lines)
    click.echo(f"written: {lines}")
    if report.can_plot():
        report.plot(rows, picture)
        click.echo(f"drawn: {picture}")
    else:
        command = f"python -m hopper_moe.kernels.benchmarks.report {lines} --plot {picture}"
        click.echo(f"no plot, since matplotlib is not installed: run `{command}` where it is.")


if __name__ == "__main__":
    main()
