"""Make the tables and plots of `eval/README.md`: every CPU kernel and every sabotage against the reference.

    python -m hopper_moe.eval.accuracy_table.cpu_host          the tiny model: 1,200 held-out questions, minutes on one core
    python -m hopper_moe.eval.accuracy_table.cpu_host --gpu-model    the GPU model and its harder questions, half an hour

Everything goes through the real path: HTTP server, `hopper-moe eval`, `hopper-moe eval compare`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from hopper_moe.eval.asking import Asking
from hopper_moe.eval.benchmark_cli import run_benchmark
from hopper_moe.eval.benchmarks import DATA
from hopper_moe.eval.compare_cli import compare_folders
from hopper_moe.eval.demo import tiny_model
from hopper_moe.eval.sabotage import sabotages
from hopper_moe.launch.cpu_host.app import create_app
from hopper_moe.launch.cpu_host.engine import Engine
from hopper_moe.launch.cpu_host.experts import use_kernel
from hopper_moe.launch.cpu_host.model import load
from hopper_moe.launch.ports import free_port
from hopper_moe.moe_backends.kernel_specs import SPECS

MARGIN = 0.01
CONCURRENCY = 128  # the host batches prompts of equal length only: more waiting, larger batches
NAMES = {
    **{spec.name: spec.label for spec in SPECS},
    "transformers": "transformers' own experts, FP32",
    "exact": "exact arithmetic (FP64, nothing rounded)",
    "mxfp4_mega, 2 GPUs": "mxfp4_mega, tokens and experts over 2 GPUs",
}


@contextmanager
def serving(engine: Engine, kernel: str) -> Iterator[str]:
    """The CPU host in this process while the block runs; gives the base URL."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(create_app(engine, "tiny_dsv4", kernel), port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError(f"the CPU host did not start on port {port}: see its error above.")
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join()


def run_all(model: Path, out: Path, num_examples: int | None, data: Path | None = None) -> list[dict[str, Any]]:
    """One row per kernel and sabotage, `reference` first; each is compared with `reference`. `data`: other questions."""
    rows: list[dict[str, Any]] = []

    def score(engine: Engine, kernel: str, sabotage: bool) -> None:
        folder = out / kernel.replace(" ", "-")
        with serving(engine, kernel) as base_url:
            how = Asking(data=data, num_examples=num_examples, concurrency=CONCURRENCY)
            status, _ = run_benchmark("word_problems", base_url, how, out=folder, recorded_url="own")
        if status:
            raise SystemExit(status)
        metrics = json.loads((folder / "metrics.json").read_text())
        row = {"name": kernel, "sabotage": sabotage, "accuracy": metrics["pass@1"], "interval95": metrics["interval95"]}
        if kernel != "reference":
            compare_folders(out / "reference", folder, MARGIN, folder / "compare")
            row |= json.loads((folder / "compare" / "compare.json").read_text())
        rows.append(row)

    packed, tokenizer = load(model, "reference")
    engine = Engine(packed, tokenizer)
    score(engine, "reference", False)
    use_kernel(packed, "w4a16")
    score(engine, "w4a16", False)
    own, _ = load(model, "transformers")
    score(Engine(own, tokenizer), "transformers", False)
    for name, kernel in sabotages(packed.config.routed_scaling_factor).items():
        use_kernel(packed, name, kernel)
        score(engine, name, True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table, one row per kernel and sabotage."""
    lines = [
        "| experts computed by | accuracy | difference to reference, 95 % interval | won / lost | p (McNemar) | `compare` says |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"**sabotage:** {row['name']}" if row["sabotage"] else NAMES.get(row["name"], row["name"])
        accuracy = f"{row['accuracy']:.2%}"
        if "verdict" not in row:
            lines.append(f"| {name} | {accuracy} | | | | |")
            continue
        low, high = row["interval95"]
        difference = f"{row['difference'] * 100:+.2f} [{low * 100:+.2f}, {high * 100:+.2f}]"
        flips = f"{len(row['won'])} / {len(row['lost'])}"
        lines.append(f"| {name} | {accuracy} | {difference} | {flips} | {row['p_value']:.2g} | **{row['verdict']}** |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Differences to the reference with intervals and the margin."""
    from matplotlib.figure import Figure

    shown = [r for r in rows if "verdict" in r]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-100 * MARGIN, 100 * MARGIN, color="#d8ead3", label=f"margin of {100 * MARGIN:g} point")
    axes.axvline(0, color="black", linewidth=0.8)
    for y, row in enumerate(reversed(shown)):
        colour = "#b5523b" if row["sabotage"] else "#2f6f9f"
        low, high = (100 * v for v in row["interval95"])
        axes.hlines(y, low, high, color=colour, linewidth=3)
        axes.plot([100 * row["difference"]], [y], "o", color=colour)
        axes.annotate(row["verdict"], (high, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    labels = [("sabotage: " if r["sabotage"] else "") + r["name"] for r in reversed(shown)]
    axes.set(yticks=range(len(shown)), yticklabels=labels, ylim=(-0.6, len(shown) - 0.4))
    axes.set(
        xlabel="accuracy minus reference, percentage points (95 % interval, paired)", title=f"Held-out word problems, {title}"
    )
    axes.margins(x=0.12)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(path, dpi=130)


def write_table(readme: Path, name: str, table: str) -> None:
    """Put `table` between the two comment lines of that name in `readme`."""
    begin, end = f"<!-- {name}: begin (written by eval.accuracy_table) -->", f"<!-- {name}: end -->"
    before, rest = readme.read_text().split(begin)
    readme.write_text(f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-model", action="store_true", help="the model that SGLang serves, on the CPU host")
    parser.add_argument("--num-examples", type=int, help="only the first N questions [default: all]")
    parser.add_argument("--readme", type=Path, default=Path(__file__).parents[1] / "README.md")
    parser.add_argument("--out", type=Path, help="run folders; given again, what they hold is kept [default: temporary]")
    args = parser.parse_args()
    out = args.out or Path(tempfile.mkdtemp(prefix="table-of-truth-"))
    if args.gpu_model:
        name, title, picture = "accuracy table, GPU model", "GPU model", "gpu_model_on_cpu.png"
        rows = run_all(DATA / "gpu_dsv4", out, args.num_examples, DATA / "word_problems_hard.jsonl")
    else:
        name, title, picture = "accuracy table", "tiny model", "tiny_model.png"
        rows = run_all(tiny_model(), out, args.num_examples)
    table = markdown(rows)
    print(table)
    write_table(args.readme, name, table)
    plot(rows, args.readme.parent / "accuracy_table" / picture, title)
    if any((row["verdict"] == "worse") != row["sabotage"] for row in rows if "verdict" in row):
        raise SystemExit("a kernel is worse than the reference, or a sabotage was not caught")


if __name__ == "__main__":
    main()
