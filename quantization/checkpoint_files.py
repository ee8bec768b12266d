"""What the files of a checkpoint folder hold, from safetensors headers alone. No torch.

The headers are read here and not by safetensors because that library refuses data types newer than itself, keeps the last of two
equal names, and does not say where in the file a tensor lies, which reading scales only needs.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hopper_moe.moe_backends.errors import Refusal

INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100 << 20  # of the safetensors format
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U8": 8, "I8": 8, "F16": 16}
_BITS |= {"BF16": 16, "I16": 16, "U16": 16, "F32": 32, "I32": 32, "U32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is. `dtype` is the safetensors name (I8, F8_E8M0, ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int  # bytes from the start of the file
    num_bytes: int

    def read_bytes(self) -> np.ndarray:
        """The tensor's bytes, uint8 [num_bytes]."""
        return np.fromfile(self.file, np.uint8, self.num_bytes, offset=self.offset)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises Refusal if there is none or it is no JSON object."""
    if not folder.is_dir():
        raise Refusal(f"{folder} is no folder: give the checkpoint folder that holds config.json and the safetensors files.")
    return _read_json_object(folder / "config.json")


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder by name.

    Raises Refusal for no or missing files, damaged headers, truncated files, tensors that are stored twice, and an index that
    disagrees with the files.
    """
    index_path = folder / INDEX
    weight_map: dict[str, str] | None = None
    if index_path.exists():
        weight_map = _read_json_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise Refusal(f"{index_path} has no weight_map from tensor to file names: fetch the file again.")
        files = sorted({folder / file for file in weight_map.values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Refusal(f"{folder} holds no .safetensors files: fetch the checkpoint's weights.")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in _read_header(file):
            if info.name in tensors:
                raise Refusal(
                    f"{info.name} is stored twice, in {tensors[info.name].file.name} and {file.name}: "
                    "delete the file that is not part of the checkpoint."
                )
            tensors[info.name] = info
    for name, file_name in (weight_map or {}).items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise Refusal(f"{INDEX} says that {name} is in {file_name}, but it is not: fetch both files again.")
    return tensors


def _read_header(file: Path) -> list[TensorInfo]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= _HEADER_LIMIT or 8 + length > size:
                raise Refusal(f"{file} is no whole safetensors file (header of {length} bytes in {size}): fetch it again.")
            raw = stream.read(length)
    except FileNotFoundError:
        raise Refusal(f"{file} is named in {INDEX} but does not exist: fetch the missing file.") from None
    try:
        entries = json.loads(raw, object_pairs_hook=lambda pairs: _unique(pairs, file))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise Refusal(f"{file} has a damaged safetensors header: fetch it again.") from None
    entries.pop("__metadata__", None)
    return [_tensor_info(file, name, entry, 8 + length, size) for name, entry in entries.items()]


def _tensor_info(file: Path, name: str, entry: Any, data_start: int, file_size: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        elements = math.prod(shape)
        bits = _BITS.get(dtype)
        damaged = begin < 0 or end < begin or (bits is not None and (end - begin) * 8 != elements * bits)
    except (KeyError, TypeError, ValueError):
        damaged = True
    if damaged:
        raise Refusal(f"{file}: the header entry of {name} contradicts itself: fetch the file again.")
    if data_start + end > file_size:
        raise Refusal(f"{file} is truncated: {name} ends at byte {data_start + end}, the file at {file_size}; fetch it again.")
    return TensorInfo(name, dtype, shape, file, data_start + begin, end - begin)


def _unique(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Refusal(f"{file} holds {twice} twice: write the file again.")
    return found


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise Refusal(f"{path} does not exist: a checkpoint folder has a {path.name}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} is not valid JSON ({error}): fetch it again.") from None
    if not isinstance(data, dict):
        raise Refusal(f"{path} holds a JSON {type(data).__name__}, not an object: fetch it again.")
    return data
