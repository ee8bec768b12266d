"""`hopper-moe bench backends`: all kernels that run here on the same layer and routing in one run, and who is fastest where."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from hopper_moe.eval.layer_bench import contenders
from hopper_moe.eval.layer_bench.contenders import Contender
from hopper_moe.kernels import measured
from hopper_moe.kernels.benchmarks import measure, report
from hopper_moe.kernels.benchmarks.mega_moe import calls_per_launch, check_run, keep
from hopper_moe.kernels.benchmarks.options import ListCommand, commit_option
from hopper_moe.kernels.benchmarks.workload import ROUTINGS, SHAPES, random_checkpoint, random_routing, random_tokens
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends import auto_table

NUM_LAUNCHES = 30  # timed, per kernel and token count
WEIGHT_COPIES = 2  # each is far larger than the L2 cache


class Comparison:
    """One layer, one set of kernels, on one GPU."""

    def __init__(
        self, shape_name: str, num_experts: int, tokens: tuple[int, ...], routing: str, seed: int, kernels: tuple[str, ...]
    ) -> None:
        self.shape_name, self.shape, self.num_experts, self.routing = shape_name, SHAPES[shape_name], num_experts, routing
        self.generator = torch.Generator("cuda").manual_seed(seed)
        self.checkpoint = random_checkpoint(self.shape, num_experts, self.generator)
        shard = ExpertShard.of(self.shape, max(tokens), num_experts=num_experts)
        self.contenders, self.left_out = contenders.make_all(kernels, self.checkpoint, shard, WEIGHT_COPIES, tokens)

    def leave_out_wrong_ones(self) -> dict[str, float]:
        """Error of every kernel on a few tokens; those above `MAX_ERROR` are not timed."""
        x = random_tokens(self.shape, 16, self.generator)
        ids, weights = random_routing(16, self.num_experts, self.shape.top_k, self.routing, self.generator)
        want = contenders.exact_result(self.checkpoint, self.shape, x, ids, weights)
        found = {}
        for contender in list(self.contenders):
            try:
                found[contender.name] = contenders.errors(contender.run(0, x, ids, weights), want)[0]
            except Exception as error:  # other projects' code: anything may be raised
                self._leave_out(contender, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
                continue
            if not found[contender.name] <= contenders.MAX_ERROR:
                self._leave_out(contender, f"relative L2 {found[contender.name]:.3g} against exact arithmetic")
        return found

    def _leave_out(self, contender: Contender, reason: str) -> None:
        self.contenders.remove(contender)
        self.left_out[contender.name] = reason

    def measure(self, num_tokens: int, graph: bool) -> tuple[dict[str, list[float]], float]:
        """(kernel -> us per call of every timed launch, mean number of touched experts)."""
        shape, num_calls = self.shape, calls_per_launch(num_tokens)
        inputs = [
            (
                random_tokens(shape, num_tokens, self.generator),
                *random_routing(num_tokens, self.num_experts, shape.top_k, self.routing, self.generator),
            )
            for _ in range(num_calls)
        ]

        def calls_of(contender: Contender):
            return lambda: [contender.run(call, *given) for call, given in enumerate(inputs)]

        runs = {contender.name: calls_of(contender) for contender in self.contenders}
        times = measure.interleaved_times(runs, num_calls, NUM_LAUNCHES, graph)
        return times, statistics.mean(int(ids.unique().numel()) for _, ids, _ in inputs)


def measure_all(
    comparison: Comparison, tokens: tuple[int, ...], graph: bool, ceilings: tuple[float, float], of_run: dict[str, Any]
) -> list[report.Measurement]:
    """A line of results per token count and kernel. `ceilings`, `of_run`: see `Measurement.of`."""
    rows = []
    for num_tokens in tqdm(tokens, desc=f"{comparison.shape_name} {comparison.routing}", unit="size"):
        times, touched = comparison.measure(num_tokens, graph)
        for contender in comparison.contenders:
            spread = measure.spread(times[contender.name])
            rows.append(
                report.Measurement.of(
                    spread,
                    slowest=spread[0],  # of one rank
                    touched=touched,
                    num_bytes=touched * contender.expert_bytes,
                    ceilings=ceilings,
                    kernel=contender.name,
                    local_experts=comparison.num_experts,
                    tokens=num_tokens,
                    routing=comparison.routing,
                    graph=graph,
                    **of_run,
                )
            )
    return rows


def table(rows: list[report.Measurement]) -> str:
    """Median us of every kernel by tokens, with the 10th to 90th percentile, the fastest marked with *."""
    names = list(dict.fromkeys(row.kernel for row in rows))
    lines = [("tokens", *names)]
    for tokens in sorted({row.tokens for row in rows}):
        at = {row.kernel: row for row in rows if row.tokens == tokens}
        best = min(row.us_median for row in at.values())
        cells = [
            f"{at[name].us_median:.1f}{'*' if at[name].us_median == best else ' '} ({at[name].us_p10:.0f}-{at[name].us_p90:.0f})"
            if name in at
            else "-"
            for name in names
        ]
        lines.append((f"{tokens}", *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def winners(rows: list[report.Measurement]) -> str:
    """One line per kernel that is the fastest somewhere: at which token counts, and by how much over the next one."""
    won: dict[str, list[str]] = {}
    for tokens in sorted({row.tokens for row in rows}):
        first, *rest = sorted((row for row in rows if row.tokens == tokens), key=lambda row: row.us_median)
        margin = f" ({rest[0].us_median / first.us_median:.2f}x before {rest[0].kernel})" if rest else ""
        won.setdefault(first.kernel, []).append(f"{tokens}{margin}")
    return "\n".join(f"{kernel} is the fastest at {', '.join(where)}" for kernel, where in won.items())


@click.command(cls=ListCommand)
@click.option(
    "--shape", "shape_name", type=click.Choice(list(SHAPES)), default="flash", show_default=True, help="Layer of which model."
)
@click.option(
    "--tokens", type=int, multiple=True, default=(1, 2, 4, 8, 16, 32, 64, 128), show_default=True, help="Several may follow."
)
@click.option("--kernels", type=click.Choice(contenders.KERNELS), multiple=True, default=contenders.KERNELS, help="Default: all.")
@click.option("--local-experts", type=int, help="Experts of the rank.  [default: 32 Flash, V3; 48 Pro, V4.1-Flash: EP 8]")
@click.option("--routing", type=click.Choice(ROUTINGS), default="uniform", show_default=True, help="How tokens choose experts.")
@click.option("--graph/--no-graph", default=True, show_default=True, help="Time CUDA graphs, or eager calls.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the JSON lines and the plot.")
@click.option("--sku", help='Label of this GPU type, such as "H200"; with --update-auto a GPU without one needs it.')
@click.option("--update-auto", is_flag=True, help="Write the medians into the table that HOPPER_MOE_KERNEL=auto decides from.")
@commit_option
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights, tokens and routing.")
def main(
    shape_name: str,
    tokens: tuple[int, ...],
    kernels: tuple[str, ...],
    local_experts: int | None,
    routing: str,
    graph: bool,
    out: Path | None,
    sku: str | None,
    update_auto: bool,
    commit: str,
    seed: int,
) -> None:
    """Time every kernel that runs here on the same layer, and say who wins where: whole calls, cold weights, launches in turn.

    Besides ours: SGLang's marlin and flashinfer_mxfp4 and DeepGEMM's FP8 MegaMoE, where they are installed. FP8 kernels get the
    same experts expanded to FP8. A kernel that cannot be made, or whose result is wrong, is left out with its reason.
    """
    shape = SHAPES[shape_name]
    num_experts = shape.local_experts if local_experts is None else local_experts
    device = check_run(1, tokens, num_experts, shape)
    sku = measured.label_to_write(device, sku) if update_auto else sku or measured.label(device)
    hbm, fp8 = measure.hbm_read_tbps(), measure.fp8_matmul_tflops()
    comparison = Comparison(shape_name, num_experts, tokens, routing, seed, kernels)
    found = comparison.leave_out_wrong_ones()
    for contender in comparison.contenders:
        error = found[contender.name]
        click.echo(f"{contender.name}: ready after {contender.seconds:.1f} s, relative L2 {error:.2e} against exact arithmetic")
    for name, reason in comparison.left_out.items():
        click.echo(f"{name}: left out, {reason}")
    of_run = {"sku": sku, "shape": shape_name, "ranks": 1, "commit": commit}
    rows = measure_all(comparison, tokens, graph, (hbm, fp8), of_run)
    if not rows:
        click.echo("no kernel runs here.")
        return
    click.echo(
        f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: HBM read {hbm:.2f} TB/s, FP8 matmul {fp8:.0f} TFLOP/s\n"
        f"{shape_name}: {num_experts} experts, {routing} routing, {'CUDA graph' if graph else 'eager'}, room for "
        f"{max(tokens)} tokens, {NUM_LAUNCHES} launches of each kernel in turn\n"
        f"us per call, median (10th-90th percentile):\n{table(rows)}\n{winners(rows)}"
    )
    if out is not None:
        keep(rows, out / f"{report.file_label(sku)}_{shape_name}_{routing}_backends{'' if graph else '_eager'}")
    if update_auto:
        click.echo(f"written: {auto_table.update(rows)}")
