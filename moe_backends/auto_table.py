"""The measured table behind `HOPPER_MOE_KERNEL=auto`: times of our kernels by GPU, layer, ranks and batch size.

`hopper-moe bench backends --update-auto` writes it. Pure arithmetic: no torch, no SGLang.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hopper_moe.kernels.benchmarks.report import Measurement

PATH = Path(__file__).with_name("auto_table.json")
DECODE = (1, 128)  # batch sizes that decide, unless a server only prefills
PREFILL = (129, 1 << 30)


@dataclass(frozen=True)
class MeasuredLayer:
    """One layer on one GPU type: what was timed, per rank."""

    sku: str
    hidden_size: int
    intermediate_size: int
    num_local_experts: int
    top_k: int
    ranks: int

    def distance(self, other: MeasuredLayer) -> float:
        """0 for the same layer; octaves of the sizes otherwise, another GPU type counting as 100."""
        sizes = ("hidden_size", "intermediate_size", "num_local_experts", "top_k", "ranks")
        octaves = sum(abs(math.log2(getattr(self, name) / getattr(other, name))) for name in sizes)
        return octaves + (0 if self.sku == other.sku else 100)

    def __str__(self) -> str:
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        sizes = f"{self.hidden_size} x {self.intermediate_size}, {self.num_local_experts} experts, top {self.top_k}"
        return f"{sizes} on {self.sku}{ranks}"


@dataclass(frozen=True)
class Entry:
    """Median us per call of every kernel that was timed at one batch size."""

    layer: MeasuredLayer
    tokens: int
    us: dict[str, float]
    commit: str


def load(path: Path = PATH) -> list[Entry]:
    """The table. A missing file is an empty table."""
    if not path.exists():
        return []
    return [Entry(MeasuredLayer(**line.pop("layer")), **line) for line in json.loads(path.read_text())]


def save(entries: Sequence[Entry], path: Path = PATH) -> None:
    """One entry a line, sorted."""
    lines = sorted(entries, key=lambda entry: (dataclasses.astuple(entry.layer), entry.tokens))
    path.write_text("[\n" + ",\n".join(json.dumps(dataclasses.asdict(line)) for line in lines) + "\n]\n")


def update(rows: Sequence[Measurement], path: Path = PATH) -> Path:
    """Puts a benchmark's rows into the table, in place of older ones of the same layer and batch size; returns its path."""
    from hopper_moe.kernels.benchmarks.workload import SHAPES
    from hopper_moe.moe_backends.registry import REGISTRY

    entries = {(entry.layer, entry.tokens): entry for entry in load(path)}
    fresh: dict[tuple[MeasuredLayer, int], Entry] = {}
    for row in rows:
        if row.kernel not in REGISTRY or not row.graph:
            continue
        shape = SHAPES[row.shape]
        layer = MeasuredLayer(row.sku, shape.hidden_size, shape.intermediate_size, row.local_experts, shape.top_k, row.ranks)
        entry = fresh.setdefault((layer, row.tokens), Entry(layer, row.tokens, {}, row.commit))
        entry.us[row.kernel] = row.us_median
    save(list((entries | fresh).values()), path)
    return path


def fastest(
    kernels: Sequence[str], layer: MeasuredLayer, tokens: tuple[int, int] = DECODE, path: Path = PATH
) -> tuple[str, str] | None:
    """(kernel, reason): the lowest geometric mean over the batch sizes in `tokens` that were timed for all `kernels`.

    The nearest measured layer decides. None: the table has no entry with all of them.
    """
    usable = [
        entry for entry in load(path) if tokens[0] <= entry.tokens <= tokens[1] and all(name in entry.us for name in kernels)
    ]
    if not usable:
        return None
    nearest = min((entry.layer for entry in usable), key=layer.distance)
    sizes = [entry for entry in usable if entry.layer == nearest]
    mean = {name: math.exp(sum(math.log(entry.us[name]) for entry in sizes) / len(sizes)) for name in kernels}
    best, *others = sorted(kernels, key=mean.__getitem__)
    wins = sum(entry.us[best] == min(entry.us[name] for name in kernels) for entry in sizes)
    span = f"{min(entry.tokens for entry in sizes)} to {max(entry.tokens for entry in sizes)} tokens"
    margins = ", ".join(f"{mean[name] / mean[best]:.2f}x before {name}" for name in others)
    exactly = layer.distance(nearest) == 0
    return best, (
        f"the fastest at {wins} of {len(sizes)} batch sizes of {span} in the measured table, {margins}, for "
        f"{'this layer' if exactly else 'the nearest layer measured'} ({nearest})"
    )
