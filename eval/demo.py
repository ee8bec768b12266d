"""`hopper-moe demo`: serve the small model that comes with the package, ask it something, score it, print the table."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from hopper_moe.launch.secrets import NO_KEY
from hopper_moe.moe_backends.sglang.hyper_connections import FUSE
from hopper_moe.quantization.errors import Refusal

REQUIRED_ACCURACY = 0.80
QUESTION = "Mia has 7 apples and buys 5 more. How many apples does Mia have now?"


def tiny_model() -> Path:
    """The checkpoint that comes with the package."""
    import hopper_moe.eval

    return Path(hopper_moe.eval.__file__).parent / "data" / "tiny_dsv4"


def shown_here() -> tuple[Path, Path | None]:
    """(checkpoint, its held-out questions; None: the benchmark's own): SGLang serves the GPU model, the CPU host the tiny one."""
    from hopper_moe.launch import machine

    data = tiny_model().parent
    if machine.detect().is_hopper and importlib.util.find_spec("sglang"):
        return data / "gpu_dsv4", data / "word_problems_hard.jsonl"
    return tiny_model(), None


@click.command()
@click.option("--model", help="Checkpoint to show [default: a small model of this package, trained on word problems].")
@click.option("--kernels", help="Comma-separated [default: every kernel that serves the model on this machine].")
@click.option("--num-examples", type=click.IntRange(1), default=400, show_default=True, help="Held-out questions to ask.")
@click.option("--out", type=click.Path(path_type=Path), help="Where runs and logs go [default: a fresh temporary folder].")
def demo(model: str | None, kernels: str | None, num_examples: int, out: Path | None) -> None:
    """Serve a small FP4 model, ask it a question, evaluate it on held-out questions, print the table.

    Exit code 0 if every kernel answers at least 80 % of the questions right.
    """
    from hopper_moe.eval.serving import served, server_command

    shown, questions = (model, None) if model else shown_here()
    if questions:
        os.environ.setdefault(FUSE, "0")  # the GPU model's hidden size is 128
    folder = str(shown)
    names = kernels.split(",") if kernels else kernels_here(folder)
    out = out or Path(tempfile.mkdtemp(prefix="hopper-moe-demo-"))
    for name in names:
        server_command(folder, name, 0)  # refuses an unknown kernel before any server is started
    click.echo(f"model {folder}\nkernels {', '.join(names)}; runs and logs in {out}")
    rows = []
    for name in names:
        click.echo(f"\n--- {name}")
        with served(folder, name, out / f"server-{name}.log") as base_url:
            click.echo(f"serving on {base_url}")
            click.echo(f"question: {QUESTION}\nanswer:   {ask(base_url, QUESTION)}")
            rows.append((name, _evaluate(base_url, num_examples, questions, out / name)))
    click.echo("\n" + table(rows))
    low = [name for name, metrics in rows if not metrics["pass@1"] >= REQUIRED_ACCURACY]
    if low:
        click.echo(f"FAILED: {', '.join(low)} below {REQUIRED_ACCURACY:.0%}", err=True)
        sys.exit(1)
    click.echo(f"OK: every kernel answers at least {REQUIRED_ACCURACY:.0%} of {num_examples} questions it never saw in training")


def kernels_here(model: str) -> list[str]:
    """Kernels that can serve `model` on this machine, `reference` first."""
    from hopper_moe.eval.serving import uses_sglang
    from hopper_moe.launch import machine
    from hopper_moe.launch.cpu_host.kernels import CPU_KERNELS
    from hopper_moe.moe_backends.kernel_specs import REGISTRY

    if not uses_sglang(model):
        return list(CPU_KERNELS)
    capability = machine.detect().capability
    built = [s.name for s in REGISTRY.values() if s.factory and s.expert_dtype == "fp4" and s.capability in (None, capability)]
    return sorted(built, key=lambda name: name != "reference")


def ask(base_url: str, question: str) -> str:
    """One greedy chat answer. Raises `Refusal` with the server's words if it refuses."""
    from sgl_eval.types import GenConfig

    from hopper_moe.eval.sampler import Sampler

    sampler = Sampler(base_url, None, NO_KEY, tries=1, longest=600.0)
    sample = sampler([{"role": "user", "content": question}], GenConfig(max_tokens=64))
    if sample.finish_reason == "error":
        raise Refusal(f"{base_url} does not answer the demo question: {sampler.last_error}.")
    return sample.text


def _evaluate(base_url: str, num_examples: int, questions: Path | None, out: Path) -> dict[str, Any]:
    from hopper_moe.eval.asking import Asking
    from hopper_moe.eval.benchmark_cli import run_benchmark

    how = Asking(data=questions, num_examples=num_examples)
    status, folder = run_benchmark("word_problems", base_url, how, out=out, fresh=True, recorded_url="own")
    if status:
        sys.exit(status)
    return json.loads((folder / "metrics.json").read_text())


def table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """Accuracy of every kernel with its 95 % interval."""
    lines = [f"{'kernel':<14}{'accuracy':>9}   {'95 % interval':<18}{'tokens/s':>9}"]
    for name, m in rows:
        low, high = m["interval95"]
        speed = m["timing"]["output_tokens_per_second"] or 0
        lines.append(f"{name:<14}{m['pass@1']:>9.2%}   {f'{low:.2%} to {high:.2%}':<18}{speed:>9.0f}")
    return "\n".join(lines)
