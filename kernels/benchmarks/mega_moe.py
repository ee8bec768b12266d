"""Times the fused FP4 layer: `python -m hopper_moe.kernels.benchmarks.mega_moe --shape flash --tokens 1 8 64 ...`.

A call is the whole layer on one rank: pre-dispatch and the fused kernel. The calls of one timed launch have different tokens and
routing and take turns over copies of the weights, so that no call finds in the L2 cache what an earlier one has read.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import statistics
import subprocess
from pathlib import Path

import click
import torch
from tqdm import tqdm

from hopper_moe.kernels.benchmarks import measure, report
from hopper_moe.kernels.benchmarks.options import ListCommand
from hopper_moe.kernels.benchmarks.workload import (
    ROUTINGS,
    SHAPES,
    ModelShape,
    make_layer,
    random_experts,
    random_routing,
    random_tokens,
)
from hopper_moe.kernels.tile_table import sku_of
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.quantization.packing import PackedExperts

KERNEL = "mxfp4_mega"
NUM_LAUNCHES = 50  # timed, per token count
WEIGHT_COPIES = 4


def calls_per_launch(num_tokens: int) -> int:
    """Calls in one timed launch (one CUDA graph): enough to hide its start, few enough to be quick."""
    return 20 if num_tokens < 1024 else 4


def copies_of(packed: PackedExperts, count: int) -> list[PackedExperts]:
    """`packed` and count - 1 clones."""
    fields = [field.name for field in dataclasses.fields(packed)]
    return [packed] + [PackedExperts(*(getattr(packed, name).clone() for name in fields)) for _ in range(count - 1)]


class LayerBenchmark:
    """One shape on one GPU: weights, workspace, and timed calls."""

    def __init__(self, shape_name: str, num_experts: int, capacity: int, routing: str, seed: int) -> None:
        self.shape_name, self.shape, self.num_experts, self.routing = shape_name, SHAPES[shape_name], num_experts, routing
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.weights = copies_of(random_experts(self.shape, num_experts, self.generator), WEIGHT_COPIES)
        self.layer = make_layer(self.shape, num_experts, capacity)

    def measure(self, num_tokens: int, graph: bool) -> tuple[list[float], float, float]:
        """(us per call of every timed launch, median us of the fused kernel alone, mean number of touched experts)."""
        shape, num_calls = self.shape, calls_per_launch(num_tokens)
        routings = [
            random_routing(num_tokens, self.num_experts, shape.top_k, self.routing, self.generator) for _ in range(num_calls)
        ]
        inputs = [(random_tokens(shape, num_tokens, self.generator), *routing) for routing in routings]
        y = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device="cuda")
        weights = list(itertools.islice(itertools.cycle(self.weights), num_calls))

        def run() -> None:
            for (x, ids, topk_weights), packed in zip(inputs, weights, strict=True):
                self.layer(x, ids, topk_weights, packed, swiglu_limit=shape.swiglu_limit, out=y)

        times = measure.replay_times(run, num_calls, NUM_LAUNCHES, graph)
        touched = statistics.mean(int(ids.unique().numel()) for ids, _ in routings)
        return times, measure.kernel_time(run, "mega_moe_kernel"), touched


def current_commit() -> str:
    """Short hash of the checkout this file is in; "unknown" outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def check_run(ranks: int, tokens: tuple[int, ...], local_experts: int, shape: ModelShape) -> None:
    """Raises Refusal for a run that cannot be."""
    if ranks != 1:
        raise Refusal(f"--ranks {ranks}: the fused kernel runs on one rank so far, so give --ranks 1.")
    if min(tokens) < 1:
        raise Refusal(f"--tokens {min(tokens)} is below 1: there is nothing to time.")
    if local_experts < shape.top_k:
        raise Refusal(f"--local-experts {local_experts} is below top_k {shape.top_k}: a token needs that many distinct experts.")
    if not torch.cuda.is_available():
        raise Refusal("this machine has no CUDA GPU: benchmarks need an SM90 GPU (H20, H100, H200).")


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
@click.option("--ranks", type=int, default=1, show_default=True, help="GPUs. Only 1 so far.")
@click.option("--local-experts", type=int, help="Experts of a rank.  [default: 32 Flash, V3; 48 Pro, V4.1-Flash: EP 8]")
@click.option("--routing", type=click.Choice(ROUTINGS), default="uniform", show_default=True, help="How tokens choose experts.")
@click.option("--graph/--no-graph", default=True, show_default=True, help="Time CUDA graphs, or eager calls.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the JSON lines and the plot.")
@click.option(
    "--compare", type=click.Choice(["deep_gemm"]), help="Also time the installed DeepGEMM FP8 MegaMoE, when it is there."
)
@click.option("--commit", help="What to write as the commit.  [default: of this checkout]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights, tokens and routing.")
def main(
    shape_name: str,
    tokens: tuple[int, ...],
    ranks: int,
    local_experts: int | None,
    routing: str,
    graph: bool,
    out: Path | None,
    compare: str | None,
    commit: str | None,
    seed: int,
) -> None:
    """Time the fused FP4 layer, whole calls (pre-dispatch and fused kernel), on cold weights, against the floors.

    Prints a table; with --out also writes JSON lines and a plot of us vs tokens. Both ceilings, HBM read (torch reductions over 4
    GiB) and FP8 matmul (torch._scaled_mm, 8192^3), are measured in the same run. "kernel us" is the fused kernel alone, from the
    profiler.
    """
    shape = SHAPES[shape_name]
    num_experts = shape.local_experts if local_experts is None else local_experts
    check_run(ranks, tokens, num_experts, shape)
    if compare is not None:
        click.echo(deep_gemm_note())
    sku = sku_of(torch.cuda.get_device_name())
    hbm, fp8 = measure.hbm_read_tbps(), measure.fp8_matmul_tflops()
    benchmark = LayerBenchmark(shape_name, num_experts, max(tokens), routing, seed)
    rows, alone = [], []
    for num_tokens in tqdm(tokens, desc=f"{shape_name} {routing}", unit="size"):
        times, kernel_us, touched = benchmark.measure(num_tokens, graph)
        median, p10, p90 = measure.spread(times)
        alone.append(kernel_us)
        rows.append(
            report.Measurement(
                kernel=KERNEL,
                sku=sku,
                shape=shape_name,
                ranks=ranks,
                local_experts=num_experts,
                tokens=num_tokens,
                touched_experts=round(touched, 2),
                routing=routing,
                graph=graph,
                us_median=round(median, 2),
                us_p10=round(p10, 2),
                us_p90=round(p90, 2),
                us_max=round(median, 2),  # of one rank
                weights_tbps=round(report.weight_bytes(shape, touched) / median / 1e6, 3),
                hbm_read_tbps=round(hbm, 3),
                tflops=round(report.layer_flops(shape, num_tokens) / median / 1e6, 2),
                fp8_matmul_tflops=round(fp8, 1),
                commit=current_commit() if commit is None else commit,
            )
        )
    calls = " to ".join(str(calls_per_launch(size)) for size in sorted({min(tokens), max(tokens)}))
    click.echo(
        f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: "
        f"HBM read {hbm:.2f} TB/s, FP8 matmul {fp8:.0f} TFLOP/s\n"
        f"{shape_name}: {num_experts} local experts, {routing} routing, {'CUDA graph' if graph else 'eager'}, "
        f"room for {max(tokens)} tokens, {NUM_LAUNCHES} launches of {calls} calls each\n"
        f"us/call: pre-dispatch and fused kernel; kernel us: fused kernel alone\n{report.table(rows, alone)}"
    )
    if out is not None:
        keep(rows, out / f"{sku.lower()}_{shape_name}_{routing}{'' if graph else '_eager'}")


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
