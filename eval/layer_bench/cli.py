"""`hopper-moe bench`: the benchmark commands, each imported when it runs."""

from __future__ import annotations

import click

from hopper_moe.launch.lazy_group import Command, LazyGroup

COMMANDS = {
    "backends": Command("hopper_moe.eval.layer_bench.backends:main", "Time every kernel that runs here on the same layer."),
    "accuracy": Command("hopper_moe.eval.layer_bench.accuracy:main", "Measure how far every kernel is from exact arithmetic."),
    "skew": Command(
        "hopper_moe.eval.layer_bench.skew:main", "Time the fused kernel under skewed routing, with EPLB and without."
    ),
    "deepep": Command(
        "hopper_moe.eval.layer_bench.deepep:main", "Time a layer whose rows DeepEP moves, against the fused exchange."
    ),
    "layer": Command("hopper_moe.kernels.benchmarks.mega_moe:main", "Time the fused kernel on one layer, one rank or several."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS)
def main() -> None:
    """Time the kernels of one layer and measure how exact they are."""
