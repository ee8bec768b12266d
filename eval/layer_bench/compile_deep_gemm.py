"""Compiles DeepGEMM's FP8 MegaMoE for a benchmark, all batch sizes at once: 20 s each, one after the other inside the benchmark.

`python -m hopper_moe.eval.layer_bench.compile_deep_gemm --shape flash --tokens 1 8 64 2048`, then the benchmark with the same
shape and the same largest batch. DeepGEMM keeps what it compiled in DG_JIT_CACHE_DIR.
"""

from __future__ import annotations

import subprocess
import sys

import click
import torch

from hopper_moe.eval.layer_bench.baselines import create_baseline
from hopper_moe.eval.layer_bench.baselines.deep_gemm_mega import DeepGemmExperts
from hopper_moe.kernels.benchmarks.options import ListCommand
from hopper_moe.kernels.benchmarks.workload import SHAPES, random_routing, random_tokens
from hopper_moe.kernels.shard import ExpertShard


def run_once(shape_name: str, num_tokens: int, capacity: int) -> None:
    """One call on experts of zeros: compiles what this batch size needs."""
    shape, generator = SHAPES[shape_name], torch.Generator("cuda").manual_seed(0)
    runner = create_baseline("deep_gemm_mega")
    experts = DeepGemmExperts.empty(shape.local_experts, shape.hidden_size, shape.intermediate_size, "cuda")
    for weight, scale in ((experts.w13, experts.w13_scale), (experts.w2, experts.w2_scale)):
        weight.view(torch.uint8).zero_()
        scale.fill_(1)
    runner.prepare(experts, ExpertShard.of(shape, capacity, num_experts=shape.local_experts))
    routing = random_routing(num_tokens, shape.local_experts, shape.top_k, "uniform", generator)
    runner.run(random_tokens(shape, num_tokens, generator), *routing)
    torch.cuda.synchronize()


@click.command(cls=ListCommand)
@click.option("--shape", "shape_name", type=click.Choice(list(SHAPES)), required=True, help="Layer of which model.")
@click.option("--tokens", type=int, multiple=True, required=True, help="Batch sizes; several may follow.")
@click.option("--capacity", type=int, help="Room of the exchange buffer.  [default: the largest batch]")
def main(shape_name: str, tokens: tuple[int, ...], capacity: int | None) -> None:
    """Compile for every batch size, each in a process of its own, at the same time."""
    capacity = capacity or max(tokens)
    if len(tokens) == 1:
        run_once(shape_name, tokens[0], capacity)
        return
    command = [sys.executable, "-m", __spec__.name, "--shape", shape_name, "--capacity", f"{capacity}", "--tokens"]
    processes = [subprocess.Popen([*command, f"{size}"]) for size in tokens]
    failed = [size for size, process in zip(tokens, processes, strict=True) if process.wait()]
    if failed:
        raise SystemExit(f"deep_gemm could not be run at {failed} tokens, see above.")


if __name__ == "__main__":
    main()
