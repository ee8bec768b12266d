"""Times a layer over several GPUs whose rows DeepEP moves, against the fused exchange, and measures how exact both are.

\b
    hopper-moe bench deepep --shape flash --ranks 2 --modes normal,low_latency --out DIR

The one-rank kernel computes what DeepEP brought, as in SGLang with `--moe-a2a-backend deepep`. The normal mode waits on the host
for counts, so it and the exchange beside it are timed eagerly; the low-latency mode and the exchange run as CUDA graphs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from hopper_moe.eval.layer_bench import contenders
from hopper_moe.kernels.benchmarks import measure
from hopper_moe.kernels.benchmarks.mega_moe import calls_per_launch, check_run, copies_of
from hopper_moe.kernels.benchmarks.options import ListCommand, commit_option
from hopper_moe.kernels.benchmarks.ranks import run_on_ranks
from hopper_moe.kernels.benchmarks.workload import (
    SHAPES,
    ModelShape,
    gaussian_checkpoint,
    make_layer,
    random_routing,
    random_tokens,
)
from hopper_moe.kernels.expert_blocks import most_rows, run_on_blocks
from hopper_moe.moe_backends.sglang.low_latency_rules import DEFAULT_BUDGET
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import pack_experts

NORMAL, LOW_LATENCY, EXCHANGE = "normal", "low_latency", "exchange"
NUM_LAUNCHES = 30  # timed
WEIGHT_COPIES = 2
CHECKED = 64  # tokens per rank whose result is compared with FP64
NVSHMEM_BYTES = 256 << 20  # the least that NVSHMEM starts with

Experts = Any  # a rank's experts, in the format of its kernel
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Experts], torch.Tensor]


@dataclass(frozen=True)
class Result:
    """us per call: the slowest rank's median, and its 10th and 90th percentile."""

    way: str
    graph: bool
    tokens: int  # per rank
    us: float
    us_p10: float
    us_p90: float


@dataclass(frozen=True)
class Check:
    """`error`: relative L2 against FP64, of the worst rank. `changed`: rows whose bits depend on the batch or the run."""

    way: str
    error: float
    changed: int


class Normal:
    """A row travels once to every rank that holds one of its experts; the sums that come back are added."""

    def __init__(self, buffer: Any, num_experts: int, layer: Layer) -> None:
        self._buffer, self._num_experts, self._layer = buffer, num_experts, layer

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, packed: Experts) -> torch.Tensor:
        ids = ids.long()
        per_rank, _, per_expert, is_in_rank, _ = self._buffer.get_dispatch_layout(ids, self._num_experts)
        rows, local_ids, local_weights, _, handle, _ = self._buffer.dispatch(
            x,
            topk_idx=ids,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=per_expert,
        )
        return self._buffer.combine(self._layer(rows, local_ids.int(), local_weights, packed), handle)[0]


class LowLatency:
    """A row travels to the block of every expert that it chose; the combine weights what comes back."""

    def __init__(self, buffer: Any, num_experts: int, layer: Layer, budget: int) -> None:
        self._buffer, self._num_experts, self._layer, self._budget = buffer, num_experts, layer, budget

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, packed: Experts) -> torch.Tensor:
        wide = ids.long()
        blocks, counts, handle, _, receive = self._buffer.low_latency_dispatch(
            x, wide, self._budget, self._num_experts, use_fp8=False, return_recv_hook=True
        )
        receive()

        def run(rows: torch.Tensor, local_ids: torch.Tensor, ones: torch.Tensor) -> torch.Tensor:
            return self._layer(rows, local_ids, ones, packed)

        done = run_on_blocks(blocks, counts, ids.shape[1], run)
        y, _, receive = self._buffer.low_latency_combine(done, wide, weights, handle, return_recv_hook=True)
        receive()
        return y


def make_buffer(modes: Sequence[str], shape: ModelShape, budget: int, group: dist.ProcessGroup) -> Any:
    """DeepEP's buffer, as large as SGLang makes it."""
    from deep_ep import Buffer

    num_ranks, of_nvlink, of_nvshmem = dist.get_world_size(group), 0, 0
    if NORMAL in modes:
        configs = (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks))
        row = shape.hidden_size * torch.bfloat16.itemsize
        of_nvlink = max(config.get_nvl_buffer_size_hint(row, num_ranks) for config in configs)
    if LOW_LATENCY in modes:
        hint = Buffer.get_low_latency_rdma_size_hint(budget, shape.hidden_size, num_ranks, shape.num_experts)
        of_nvshmem = max(hint, NVSHMEM_BYTES)
    return Buffer(
        group,
        of_nvlink,
        of_nvshmem,
        low_latency_mode=LOW_LATENCY in modes,
        num_qps_per_rank=max(Buffer.num_sms, shape.num_experts // num_ranks),
        explicitly_destroy=True,
    )


class OneRank:
    """All ways of one layer on this rank."""

    def __init__(
        self, group: dist.ProcessGroup, shape: ModelShape, modes: Sequence[str], capacity: int, budget: int, seed: int
    ) -> None:
        self.rank, self.num_ranks, self.shape = dist.get_rank(group), dist.get_world_size(group), shape
        self.checkpoint = gaussian_checkpoint(shape, shape.num_experts, torch.Generator("cuda").manual_seed(seed))
        num_local = shape.num_experts // self.num_ranks
        mine = slice(self.rank * num_local, (self.rank + 1) * num_local)
        w13, w13_scale, w2, w2_scale = self.checkpoint
        packed = pack_experts(w13[mine], w13_scale[mine], w2[mine], w2_scale[mine])
        self.weights = copies_of(packed, WEIGHT_COPIES)
        self.generator = torch.Generator("cuda").manual_seed(seed + 1 + self.rank)
        self.fused = make_layer(shape, shape.num_experts, capacity, group=group)
        self.buffer = make_buffer(modes, shape, budget, group)
        self.ways: dict[str, Layer] = {EXCHANGE: self._call(self.fused)}
        if NORMAL in modes:
            alone = self._call(make_layer(shape, num_local, capacity * self.num_ranks))
            self.ways[NORMAL] = Normal(self.buffer, shape.num_experts, alone)
        if LOW_LATENCY in modes:
            alone = self._call(make_layer(shape, num_local, most_rows(num_local, budget * self.num_ranks, shape.top_k)))
            self.ways[LOW_LATENCY] = LowLatency(self.buffer, shape.num_experts, alone, budget)

    def _call(self, layer: Any) -> Layer:
        return lambda x, ids, weights, packed: layer(x, ids, weights, packed, swiglu_limit=self.shape.swiglu_limit)

    def batch(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        routing = random_routing(num_tokens, self.shape.num_experts, self.shape.top_k, "uniform", self.generator)
        return random_tokens(self.shape, num_tokens, self.generator), *routing

    def checks(self) -> list[tuple[str, float, int]]:
        """Of every way: error of ragged ranks, and rows whose bits are others when run again or with fewer rows beside them."""
        batch = self.batch(CHECKED // (1 + self.rank))
        want = contenders.exact_result(self.checkpoint, self.shape, *batch)
        x, ids, weights = (
            tensor[: 5 - 5 * self.rank].clone() for tensor in batch
        )  # of the second rank none: no address, as DeepEP wants
        found = []
        for name, way in self.ways.items():
            first, again, part = (way(*given, self.weights[0]) for given in (batch, batch, (x, ids, weights)))
            changed = (first != again).any(1).sum() + (first[: len(part)] != part).any(1).sum()
            found.append((name, contenders.errors(first, want)[0], int(changed)))
        return found

    def times(self, num_tokens: int, names: Sequence[str], graph: bool) -> dict[str, tuple[float, float, float]]:
        """(median, p10, p90) us per call of the ways `names`, whose launches take turns."""
        inputs = [self.batch(num_tokens) for _ in range(calls_per_launch(num_tokens))]

        def launch_of(way: Layer) -> Callable[[], object]:
            return lambda: [way(*given, packed) for given, packed in zip(inputs, itertools.cycle(self.weights), strict=False)]

        self.fused.buffer.barrier()
        runs = {name: launch_of(self.ways[name]) for name in names}
        found = measure.interleaved_times(runs, len(inputs), NUM_LAUNCHES, graph)
        return {name: measure.spread(times) for name, times in found.items()}


def groups_of(modes: Sequence[str], num_tokens: int, budget: int) -> list[tuple[tuple[str, ...], bool]]:
    """Which ways are timed in turn, and whether as CUDA graphs."""
    found: list[tuple[tuple[str, ...], bool]] = []
    if NORMAL in modes:
        found.append(((EXCHANGE, NORMAL), False))
    if LOW_LATENCY in modes and num_tokens <= budget:
        found.append(((EXCHANGE, LOW_LATENCY), True))
    return found


def measure_rank(
    group: dist.ProcessGroup, shape_name: str, modes: list[str], tokens: tuple[int, ...], budget: int, seed: int
) -> tuple[list[Any], list[Any]]:
    """(checks, [(way, graph, tokens, spread)]) of this rank."""
    layer = OneRank(group, SHAPES[shape_name], modes, max(*tokens, CHECKED), budget, seed)
    checks, found = layer.checks(), []
    for num_tokens in tokens:
        for names, graph in groups_of(modes, num_tokens, budget):
            times = layer.times(num_tokens, names, graph)
            found += [(name, graph, num_tokens, spread) for name, spread in times.items()]
    torch.cuda.synchronize()
    layer.buffer.destroy()
    return checks, found


def of_all_ranks(by_rank: Sequence[tuple[list[Any], list[Any]]]) -> tuple[list[Check], list[Result]]:
    """The worst rank's error and time, and all ranks' changed rows."""
    checks = []
    for of_ranks in zip(*(checks for checks, _ in by_rank), strict=True):
        checks.append(Check(of_ranks[0][0], max(error for _, error, _ in of_ranks), sum(changed for *_, changed in of_ranks)))
    results = []
    for of_ranks in zip(*(found for _, found in by_rank), strict=True):
        way, graph, tokens, _ = of_ranks[0]
        results.append(Result(way, graph, tokens, *(round(value, 2) for value in max(spread for *_, spread in of_ranks))))
    return checks, results


def table(checks: list[Check], results: list[Result]) -> str:
    """Errors and bits first, then times."""
    lines = ["| way | error against FP64 | rows that changed |", "|---|---|---|"]
    lines += [f"| {check.way} | {check.error:.3%} | {check.changed} |" for check in checks]
    lines += ["", "| tokens per rank | way | us (p10-p90) |", "|---|---|---|"]
    for result in results:
        way = f"{result.way}, {'CUDA graph' if result.graph else 'eager'}"
        lines.append(f"| {result.tokens} | {way} | {result.us:.1f} ({result.us_p10:.1f}-{result.us_p90:.1f}) |")
    return "\n".join(lines)


def chosen_modes(text: str) -> list[str]:
    """Those of DeepEP that a text such as normal,low_latency names."""
    modes = [part.strip() for part in text.split(",")]
    if wrong := [mode for mode in modes if mode not in (NORMAL, LOW_LATENCY)]:
        raise Refusal(f"--modes {wrong[0]!r}: DeepEP has {NORMAL} and {LOW_LATENCY}, write one or both with a comma.")
    return modes


@click.command(cls=ListCommand)
@click.option("--shape", "shape_name", type=click.Choice(list(SHAPES)), default="flash", show_default=True)
@click.option(
    "--tokens",
    type=int,
    multiple=True,
    default=(1, 8, 64, 128, 512, 2048),
    show_default=True,
    help="Per rank; several may follow.",
)
@click.option("--ranks", type=int, default=2, show_default=True, help="GPUs, one rank each.")
@click.option("--modes", default=f"{NORMAL},{LOW_LATENCY}", show_default=True, help="Of DeepEP.")
@click.option("--budget", type=click.IntRange(1), default=DEFAULT_BUDGET, show_default=True, help="Tokens of a low-latency call.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights, tokens and routing.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the JSON lines.")
@commit_option
def main(
    shape_name: str, tokens: tuple[int, ...], ranks: int, modes: str, budget: int, seed: int, out: Path | None, commit: str
) -> None:
    """Time a layer whose rows DeepEP moves between GPUs, against the fused exchange, and measure how exact both are."""
    asked = chosen_modes(modes)
    check_run(ranks, tokens, SHAPES[shape_name].num_experts // ranks, SHAPES[shape_name])
    if find_spec("deep_ep") is None:
        raise Refusal("the package deep_ep is not installed: install sgl-deep-ep.")
    checks, results = of_all_ranks(run_on_ranks(ranks, measure_rank, shape_name, asked, tokens, budget, seed))
    click.echo(table(checks, results))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        facts = {"shape": shape_name, "ranks": ranks, "budget": budget, "commit": commit, "gpu": torch.cuda.get_device_name()}
        lines = [json.dumps({**facts, **found}) for found in (*map(asdict, checks), *map(asdict, results))]
        (out / f"{shape_name}_deepep_{'_'.join(asked)}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
