"""`measured.json`: measurements per GPU type, and the choice of a record for a GPU that was not measured.

Section `gpus` says what a label ("H200") stands for. Section `tiles` holds the token tiles (`tile_table`), section `layers` the
times behind `HOPPER_MOE_KERNEL=auto` (`moe_backends/auto_table`). Every record is one line of the file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hopper_moe.kernels.device import Device
from hopper_moe.quantization.errors import Refusal

PATH = Path(__file__).with_name("measured.json")
SECTIONS = ("gpus", "tiles", "layers")
SAME_NUMBERS = 0.25  # octaves: boards of one type differ a little in clocks; a MIG slice or a GPU shared by MPS differs by more

Record = dict[str, Any]


class Pick(NamedTuple):
    """The measured GPU type whose records a GPU uses, and why."""

    sku: str
    reason: str
    is_exact: bool


def read(path: Path = PATH) -> dict[str, list[Record]]:
    """The records of every section. A missing file has none."""
    found = json.loads(path.read_text()) if path.exists() else {}
    return {name: found.get(name, []) for name in SECTIONS}


def put(section: str, records: Sequence[Record], key: Callable[[Record], Any], path: Path = PATH) -> Path:
    """Write records, replacing those of the same section and key; returns the path."""
    sections = read(path)
    merged = {key(record): record for record in (*sections[section], *records)}
    sections[section] = [merged[at] for at in sorted(merged)]
    parts = [f'"{name}": [\n' + ",\n".join(map(json.dumps, lines)) + "\n]" for name, lines in sections.items()]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    return path


def gpus(path: Path = PATH) -> dict[str, Device]:
    """Label -> the GPU that was measured."""
    fields = {field.name for field in dataclasses.fields(Device)}
    return {
        record["sku"]: Device(**{name: value for name, value in record.items() if name in fields})
        for record in read(path)["gpus"]
    }


def _own_label(device: Device, known: dict[str, Device]) -> str | None:
    """By name; the numbers must agree, since one name may stand for several GPUs ("NVIDIA Graphics Device")."""
    return next((sku for sku, gpu in known.items() if gpu.name == device.name and gpu.distance(device) < SAME_NUMBERS), None)


def label(device: Device, path: Path = PATH) -> str:
    """The label of a measured GPU; any other GPU is called by its own name."""
    return _own_label(device, gpus(path)) or device.name.removeprefix("NVIDIA ")


def label_to_write(device: Device, sku: str | None, path: Path = PATH) -> str:
    """The label to keep a measurement of `device` under; a new one enters section `gpus`.

    Raises Refusal when the GPU has none and `sku` names none, or when `sku` is that of another GPU.
    """
    known = gpus(path)
    own = _own_label(device, known)
    if own is not None and sku in (None, own):
        return own
    if sku is None:
        raise Refusal(f"{device} has no label among {sorted(known)} yet: name what is measured with --sku LABEL.")
    if own is not None:
        raise Refusal(f"--sku {sku}: {device.name} is kept as {own} already, leave --sku out.")
    if sku in known:
        raise Refusal(f"--sku {sku} stands for {known[sku]}, but this GPU is {device}: give another label.")
    put("gpus", [{"sku": sku, **dataclasses.asdict(device)}], lambda record: record["sku"], path)
    return sku


def pick(device: Device, among: Collection[str], path: Path = PATH) -> Pick | None:
    """The GPU type of `among` that serves `device`: the one of its name, else the nearest by numbers. None: there is none."""
    known = {sku: gpu for sku, gpu in gpus(path).items() if sku in among}
    own = _own_label(device, known)
    if own is not None:
        return Pick(own, f"measured on {device.name}", True)
    if not known:
        return None
    sku = min(known, key=lambda name: (known[name].distance(device), name))
    reason = f"{device} was not measured; {known[sku]} is the nearest of {', '.join(sorted(known))} by SMs, bandwidth and clock"
    return Pick(sku, reason, False)
