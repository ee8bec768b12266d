"""`hopper-moe eval`: score a served model, or compare two runs.

Exit codes of a benchmark: 0 done, 2 refused, 3 requests failed, 4 no server answered, 130 interrupted; `compare` adds its own.
"""

from __future__ import annotations

import click

from hopper_moe.eval.benchmark_cli import BENCHMARKS, benchmark_command
from hopper_moe.eval.compare_cli import compare


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Score a model behind any OpenAI-compatible endpoint, on sgl-eval's prompts and graders."""


for _name in BENCHMARKS:
    main.add_command(benchmark_command(_name))
main.add_command(compare)
