"""Content of a checkpoint folder, from safetensors headers alone. No torch.

Headers are parsed here and not by safetensors: that library refuses data types newer than itself, keeps the last of two equal
names, and does not report a tensor's offset in the file, which is needed to read only the scales.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from hopper_moe.quantization.errors import Refusal

_LFS = "version https://git-lfs"
INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100 << 20  # of the safetensors format
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U8": 8, "I8": 8, "F16": 16}
_BITS |= {"BF16": 16, "I16": 16, "U16": 16, "F32": 32, "I32": 32, "U32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}


@dataclass(frozen=True)
class TensorInfo:
    """File, offset, shape and type of one tensor. `dtype` is the safetensors name (I8, F8_E8M0, ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int  # bytes from the start of the file
    num_bytes: int

    @property
    def is_loadable(self) -> bool:
        """Whether safetensors, which loads the weights, supports the type."""
        return self.dtype in _BITS and not self.dtype.startswith("F6")

    def read_bytes(self) -> np.ndarray:
        """The tensor's bytes, uint8 [num_bytes]."""
        return np.fromfile(self.file, np.uint8, self.num_bytes, offset=self.offset)


def lfs_sentence(path: Path) -> str:
    return f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in the folder or fetch the file again."


def missing_files(folder: Path) -> list[str]:
    """Names of weight files that the index names and the folder lacks; without an index, of the index if there is no weight."""
    if (folder / INDEX).exists():
        return [file.name for file in _indexed_files(folder)[0] if not file.exists()]
    return [] if any(folder.glob("*.safetensors")) else [INDEX]


def _indexed_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Weight files that the index names, and its map from tensor to file name."""
    index_path = folder / INDEX
    weight_map = read_json_object(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise Refusal(f"{index_path} has no weight_map from tensor to file names: fetch the file again.")
    _require_printable(index_path, [*weight_map, *weight_map.values()])
    inside = all(file and Path(file).name == file and "\0" not in file for file in weight_map.values())
    if not inside:
        raise Refusal(f"{index_path} names files outside of its folder: fetch the file again.")
    return sorted({folder / file for file in weight_map.values()}), weight_map


def _require_printable(file: Path, names: Iterable[str]) -> None:
    """Raises Refusal for a name with control characters or half a surrogate pair, which no message could show."""
    if (name := next((name for name in names if not name.isprintable()), None)) is not None:
        raise Refusal(f"{file} holds a name that cannot be printed ({ascii(name)[:200]}): fetch the file again.")


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder by name.

    Raises Refusal for no or missing files, damaged headers, truncated files, tensors that are stored twice, and an index that
    disagrees with the files.
    """
    weight_map: dict[str, str] = {}
    if (folder / INDEX).exists():
        files, weight_map = _indexed_files(folder)
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
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise Refusal(f"{INDEX} says that {name} is in {file_name}, but it is not: fetch both files again.")
    return tensors


def _read_header(file: Path) -> list[TensorInfo]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(len(_LFS))
            if prefix == _LFS.encode():
                raise Refusal(lfs_sentence(file))
            length = struct.unpack("<Q", prefix[:8])[0] if len(prefix) >= 8 else 0
            if not 2 <= length <= _HEADER_LIMIT or 8 + length > size:
                raise Refusal(f"{file} is no whole safetensors file (header of {length} bytes in {size}): fetch it again.")
            stream.seek(8)
            raw = stream.read(length)
    except FileNotFoundError:
        raise Refusal(f"{file} is named in {INDEX} but does not exist: fetch the missing file.") from None
    except OSError as error:
        raise Refusal(f"{file} cannot be read ({error.strerror}): fetch it again.") from None
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(pairs, file))
    except Refusal:
        raise
    except (ValueError, RecursionError):
        raise Refusal(f"{file} has a damaged safetensors header: fetch it again.") from None
    if not isinstance(entries, dict):
        raise Refusal(f"{file} has a damaged safetensors header: fetch it again.")
    entries.pop("__metadata__", None)
    _require_printable(file, entries)
    found = [_tensor_info(file, name, entry, 8 + length, size) for name, entry in entries.items()]
    if all(info.dtype in _BITS for info in found):  # for other types our own message names the type, which the library's does not
        _require_loadable(file)
    return found


def _require_loadable(file: Path) -> None:
    """Raises Refusal where the library that loads the weights would raise: gaps, overlaps, bytes that belong to no tensor."""
    try:
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise Refusal(f"{file} cannot be loaded ({str(error).splitlines()[0]}): fetch it again.") from None


def _tensor_info(file: Path, name: str, entry: Any, data_start: int, file_size: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        bits = _BITS.get(dtype)
        damaged = not (isinstance(dtype, str) and dtype.isprintable()) or any(
            type(number) is not int or number < 0 for number in (*shape, begin, end)
        )
        damaged = damaged or end < begin or (bits is not None and (end - begin) * 8 != math.prod(shape) * bits)
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


def read_json_object(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith(_LFS):
            raise Refusal(lfs_sentence(path))
        data = json.loads(text)
    except FileNotFoundError:
        raise Refusal(f"{path} does not exist: a checkpoint folder has a {path.name}.") from None
    except OSError as error:
        raise Refusal(f"{path} cannot be read ({error.strerror}): a checkpoint folder has a {path.name}.") from None
    except RecursionError:
        raise Refusal(f"{path} is nested too deeply for a file of a checkpoint: fetch it again.") from None
    except Refusal:
        raise
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise Refusal(f"{path} is not valid JSON ({str(error).splitlines()[0]}): fetch it again.") from None
    if not isinstance(data, dict):
        raise Refusal(f"{path} holds a JSON {type(data).__name__}, not an object: fetch it again.")
    return data
