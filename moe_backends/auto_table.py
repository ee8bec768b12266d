"""Measured times that `HOPPER_MOE_KERNEL=auto` decides from: our kernels by GPU type, layer, ranks and batch size.

`hopper-moe bench backends --update-auto` writes them (`kernels/measured.json`). Imports neither torch nor SGLang.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hopper_moe.kernels import measured
from hopper_moe.kernels.device import Device
from hopper_moe.kernels.measured import PATH
from hopper_moe.moe_backends.kernel_specs import KERNELS

if TYPE_CHECKING:
    from hopper_moe.kernels.benchmarks.report import Measurement
    from hopper_moe.kernels.shard import ExpertShard

DECODE = (1, 128)  # tokens; batch sizes that are compared, unless the server only prefills
PREFILL = (129, 1 << 30)


@dataclass(frozen=True)
class MeasuredLayer:
    """One layer as one rank computed it: the key of its times."""

    hidden_size: int
    intermediate_size: int
    num_local_experts: int
    top_k: int
    ranks: int

    @classmethod
    def of(cls, shard: ExpertShard) -> Self:
        """The key of a shard's layer."""
        local = max(shard.num_local_experts, 1)
        return cls(shard.hidden_size, shard.intermediate_size, local, shard.top_k, shard.num_ranks)

    def distance(self, other: MeasuredLayer) -> float:
        """0 for the same layer; octaves between the sizes otherwise."""
        return sum(
            abs(math.log2(mine / theirs))
            for mine, theirs in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        )

    def __str__(self) -> str:
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.hidden_size} x {self.intermediate_size}, {self.num_local_experts} experts, top {self.top_k}{ranks}"


@dataclass(frozen=True)
class Entry:
    """Median us per call of every kernel that was timed on one GPU type at one batch size."""

    sku: str
    layer: MeasuredLayer
    tokens: int
    us: dict[str, float]
    commit: str


def load(path: Path = PATH) -> list[Entry]:
    """The table. A missing file is an empty table."""
    return [
        Entry(
            record["sku"],
            MeasuredLayer(**{field.name: record[field.name] for field in dataclasses.fields(MeasuredLayer)}),
            record["tokens"],
            record["us"],
            record["commit"],
        )
        for record in measured.read(path)["layers"]
    ]


def _key(record: measured.Record) -> tuple:
    return (record["sku"], *(record[field.name] for field in dataclasses.fields(MeasuredLayer)), record["tokens"])


def update(rows: Sequence[Measurement], path: Path = PATH) -> Path:
    """Write a benchmark's rows into the table, replacing those of the same layer and batch size; returns its path.

    The rows' `sku` must be a label of section `gpus` (`measured.label_to_write`).
    """
    from hopper_moe.kernels.benchmarks.workload import SHAPES

    fresh: dict[tuple, measured.Record] = {}
    for row in rows:
        if row.kernel not in KERNELS or not row.graph:
            continue
        shape = SHAPES[row.shape]
        layer = MeasuredLayer(shape.hidden_size, shape.intermediate_size, row.local_experts, shape.top_k, row.ranks)
        record = {"sku": row.sku, **dataclasses.asdict(layer), "tokens": row.tokens, "us": {}, "commit": row.commit}
        fresh.setdefault(_key(record), record)["us"][row.kernel] = row.us_median
    return measured.put("layers", list(fresh.values()), _key, path)


def fastest(
    kernels: Sequence[str], device: Device, shard: ExpertShard, tokens: tuple[int, int] = DECODE, path: Path = PATH
) -> tuple[str, str] | None:
    """(kernel, reason): the lowest geometric mean over the batch sizes in `tokens` that were timed for all `kernels`.

    Uses the measured GPU type nearest to `device`, and of its layers the nearest one. None: no entry has all kernels.
    """
    layer = MeasuredLayer.of(shard)
    usable = [
        entry for entry in load(path) if tokens[0] <= entry.tokens <= tokens[1] and all(name in entry.us for name in kernels)
    ]
    picked = measured.pick(device, {entry.sku for entry in usable}, path)
    if picked is None:
        return None
    usable = [entry for entry in usable if entry.sku == picked.sku]
    nearest = min((entry.layer for entry in usable), key=layer.distance)
    sizes = [entry for entry in usable if entry.layer == nearest]
    mean = {name: math.exp(sum(math.log(entry.us[name]) for entry in sizes) / len(sizes)) for name in kernels}
    best, *others = sorted(kernels, key=mean.__getitem__)
    wins = sum(entry.us[best] == min(entry.us[name] for name in kernels) for entry in sizes)
    span = f"{min(entry.tokens for entry in sizes)} to {max(entry.tokens for entry in sizes)} tokens"
    margins = ", ".join(f"{mean[name] / mean[best]:.2f}x before {name}" for name in others)
    which = "this layer" if layer.distance(nearest) == 0 else "the nearest layer measured"
    return best, (
        f"the fastest at {wins} of {len(sizes)} batch sizes of {span} in the measured table, {margins}, for {which} "
        f"({nearest} on {picked.sku})" + ("" if picked.is_exact else f"; {picked.reason}")
    )
