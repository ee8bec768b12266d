"""Table and plot of what `bench` measured.

\b
    python -m hopper_moe.eval.serving_bench.report DIR  # reads serving.jsonl and servers.json there, writes serving.md and .png
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import click

from hopper_moe.kernels.benchmarks.options import RefusingCommand
from hopper_moe.moe_backends.sglang.plan import BACKEND
from hopper_moe.quantization.errors import Refusal

Cell = dict[str, float]


def cells(rows: list[dict[str, Any]]) -> dict[tuple[int, int, int], dict[str, Cell]]:
    """(concurrency, input_len, output_len) -> backend -> median over rounds of each figure, and the spread of the throughput."""
    grouped: dict[tuple[int, int, int], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        grouped[row["concurrency"], row["input_len"], row["output_len"]][row["backend"]].append(row)
    return {key: {backend: _median(found) for backend, found in per.items()} for key, per in grouped.items()}


def _median(rows: list[dict[str, Any]]) -> Cell:
    figures = (
        "median_tpot_ms", "median_itl_ms", "median_ttft_ms", "output_throughput", "input_throughput", "total_throughput"
    )  # fmt: skip
    cell = {name: statistics.median(row[name] for row in rows) for name in figures}
    tpots = [row["median_tpot_ms"] for row in rows]
    paces = [row["decode_pace"] for row in rows if row.get("decode_pace")]
    pace = {"decode_pace": statistics.median(paces)} if paces else {}
    return cell | {"tpot_low": min(tpots), "tpot_high": max(tpots)} | pace


def markdown(rows: list[dict[str, Any]], servers: dict[str, Any]) -> str:
    """The decode table (times in ms, range over rounds), the prefill table, and the memory table; no line without a value.

    "decoding": the server's own pace with all requests running; the rest is what the client saw. "total" counts prompts too.
    """
    found, backends = sorted(cells(rows).items()), list(servers)
    heads = [f"{b}: TPOT (range), ITL, TTFT ms; out tok/s; decoding tok/s" for b in backends]
    decode = [_head("concurrency, prompt", [*heads, "against the better: out", "decoding"])]
    total = [_head("concurrency, prompt", [f"{b}: total tok/s per GPU" for b in backends] + ["against the better"])]
    gpus = {backend: servers[backend].get("gpus") for backend in backends}
    prefill = [_head("prompt", [f"{b}: TTFT ms, in tok/s" for b in backends] + ["against the better"])]
    for (concurrency, input_len, output_len), per in found:
        if output_len > 1:
            shown = [_decode(per[b]) if b in per else "" for b in backends]
            decode.append(
                _line(f"{concurrency}, {input_len}", [*shown, _ratio(per, "output_throughput"), _ratio(per, "decode_pace")])
            )
            for backend, cell in per.items():
                if gpus.get(backend):
                    cell["per_gpu"] = cell["total_throughput"] / gpus[backend]
            shown = [f"{per[b]['per_gpu']:.0f}" if "per_gpu" in per.get(b, {}) else "" for b in backends]
            if any(shown):
                total.append(_line(f"{concurrency}, {input_len}", [*shown, _ratio(per, "per_gpu")]))
        else:
            shown = [f"{per[b]['median_ttft_ms']:.1f}, {per[b]['input_throughput']:.0f}" if b in per else "" for b in backends]
            prefill.append(_line(input_len, [*shown, _ratio(per, "input_throughput")]))
    memory = [_head("GiB", backends)]
    for name, label in _MEMORY.items():
        values = [_with_pool(servers[b]).get(name) for b in backends]
        if any(value is not None for value in values):
            memory.append(
                _line(label, ["" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.0f}" for value in values])
            )
    return "\n\n".join("\n".join(table) for table in (decode, total, prefill, memory) if len(table) > 1) + "\n"


_MEMORY = {
    "weights_gib": "model weights",
    "packed_gib": "packed experts",
    "workspace_gib": "kernel workspace",
    "pool_gib": "KV pool",
    "kv_tokens": "tokens in it",
    "graph_gib": "CUDA graphs",
    "gpu_gib": "all processes of the server",
    "seconds_to_ready": "seconds to ready",
}


def _with_pool(server: dict[str, Any]) -> dict[str, Any]:
    """With what the KV pool took, from the free memory before and after."""
    before, after = server.get("available_after_load_gib"), server.get("available_after_pool_gib")
    return server if before is None or after is None else server | {"pool_gib": before - after}


def _line(first: object, values: list[str]) -> str:
    return f"| {first} | " + " | ".join(values) + " |"


def _head(first: str, values: list[str]) -> str:
    return _line(first, values) + "\n|" + "---|" * (len(values) + 1)


def _decode(cell: Cell) -> str:
    return (
        f"{cell['median_tpot_ms']:.2f} ({cell['tpot_low']:.2f}-{cell['tpot_high']:.2f}), {cell['median_itl_ms']:.2f}, "
        f"{cell['median_ttft_ms']:.0f}; {cell['output_throughput']:.0f}"
    ) + (f"; {cell['decode_pace']:.0f}" if "decode_pace" in cell else "")


def _ratio(per: dict[str, Cell], figure: str) -> str:
    others = [cell[figure] for backend, cell in per.items() if backend != BACKEND and figure in cell]
    return f"{per[BACKEND][figure] / max(others):.2f}x" if others and figure in per.get(BACKEND, {}) else ""


_PLOTTED = {"median_itl_ms": "time between tokens at the client, ms", "decode_pace": "tokens/s while all requests decode"}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """ITL and output throughput over concurrency, one line a backend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {key: per for key, per in sorted(cells(rows).items()) if key[2] > 1}
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, (name, label) in zip(axes, _PLOTTED.items(), strict=True):
        for backend in dict.fromkeys(row["backend"] for row in rows):
            values = [per.get(backend, {}).get(name, math.nan) for per in found.values()]  # no line over what was not measured
            axis.plot([key[0] for key in found], values, marker="o", label=backend)
        axis.set(xscale="log", xlabel="concurrency", ylabel=label)
        axis.set_xticks([key[0] for key in found], [str(key[0]) for key in found])
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@click.command(cls=RefusingCommand, help=__doc__)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    measured, described = folder / "serving.jsonl", folder / "servers.json"
    if not (measured.exists() and described.exists()):
        raise Refusal(f"{folder} lacks {measured.name} or {described.name}: let `bench` write it with --out.")
    rows = [json.loads(line) for line in measured.read_text().splitlines()]
    text = markdown(rows, json.loads(described.read_text()))
    (folder / "serving.md").write_text(text)
    plot(rows, folder / "serving.png")
    click.echo(text)


if __name__ == "__main__":
    main()
