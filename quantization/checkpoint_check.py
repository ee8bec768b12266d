"""Is a folder a whole DeepSeek-V4 checkpoint with FP4 experts? Headers and expert scales are read, no weights, no torch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.quantization import layout
from hopper_moe.quantization.checkpoint_files import TensorInfo, read_config, read_headers
from hopper_moe.quantization.checkpoint_names import EXPERT_TENSOR, PROJECTIONS, expert_tensor

_SIZES = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "num_hidden_layers", "vocab_size")
_WEIGHT_DTYPES = ("I8", "U8")
_SCALE_DTYPES = ("F8_E8M0", "U8", "F32")


def validate_checkpoint(path: str | Path, *, for_cuda_kernel: bool = False, progress: bool = False) -> None:
    """Raises Refusal, one sentence naming tensor, expert and value, for the first thing that is wrong; returns if nothing is.

    Args:
        path: the checkpoint folder.
        for_cuda_kernel: also refuse sizes that the packed FP4 kernels cannot run (multiples of 128, top_k up to 16).
        progress: show a bar while scales are read (a large checkpoint has gigabytes of them).
    """
    folder = Path(path)
    config = read_config(folder)
    check_config(config, folder, for_cuda_kernel=for_cuda_kernel)
    tensors = read_headers(folder)
    layers = check_experts(config, tensors)
    check_other_tensors(config, tensors)
    scales = [tensors[name] for layer in layers.values() for name in layer if name.endswith(".scale")]
    for scale in tqdm(scales, desc="check scales", unit="tensor", disable=not progress):
        check_scale(scale)


def check_config(config: Mapping[str, Any], folder: Path, *, for_cuda_kernel: bool = False) -> None:
    """Raises Refusal unless config.json describes FP4 experts of sizes that make sense."""
    where = folder / "config.json"
    for key in _SIZES:
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise Refusal(f"{where}: {key} is {value!r}, a positive whole number is needed: is this a DeepSeek-V4 checkpoint?")
    if config.get("expert_dtype") != "fp4":
        raise Refusal(f"{where}: expert_dtype is {config.get('expert_dtype')!r}, not 'fp4': this check is for FP4 experts.")
    for key in ("hidden_size", "moe_intermediate_size"):
        if config[key] % layout.MXFP4_GROUP:
            raise Refusal(f"{where}: {key} {config[key]} is not a multiple of {layout.MXFP4_GROUP}, the group of an FP4 scale.")
    if config["num_experts_per_tok"] > config["n_routed_experts"]:
        top_k, num_experts = config["num_experts_per_tok"], config["n_routed_experts"]
        raise Refusal(f"{where}: num_experts_per_tok {top_k} is above n_routed_experts {num_experts}: mend config.json.")
    limit, factor = config.get("swiglu_limit"), config.get("routed_scaling_factor", 1.0)
    for key, value, optional in (("swiglu_limit", limit, True), ("routed_scaling_factor", factor, False)):
        if not (optional and value is None) and not (type(value) in (int, float) and 0 < value < float("inf")):
            raise Refusal(f"{where}: {key} is {value!r}, a positive number is needed{' (or null for none)' if optional else ''}.")
    if for_cuda_kernel:
        layout.check_shape(
            config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"], config["num_experts_per_tok"]
        )


def check_experts(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The expert tensors, layer by layer; raises Refusal for a missing, duplicate or unknown expert, a wrong shape or type."""
    num_experts, num_layers = config["n_routed_experts"], config["num_hidden_layers"]
    layers: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        match = EXPERT_TENSOR.match(name)
        if match is None:
            if ".ffn.experts." in name:
                raise Refusal(f"{name} is no expert tensor of a DeepSeek-V4 checkpoint (w1, w2, w3 with .weight and .scale).")
            continue
        layer, expert, projection, part = match[1], int(match[2]), match[3], match[4]
        kind, number = layer.split(".")
        if kind == "layers" and int(number) >= num_layers:
            raise Refusal(f"{name} belongs to layer {number}, but config.json has num_hidden_layers {num_layers}.")
        if expert >= num_experts:
            raise Refusal(f"{name} belongs to expert {expert}, but config.json has n_routed_experts {num_experts}.")
        canonical = expert_tensor(layer, expert, projection, part)
        if canonical in layers[layer]:
            raise Refusal(
                f"{name} and {layers[layer][canonical].name} are the same expert tensor stored twice: delete one of them."
            )
        layers[layer][canonical] = info
        _check_expert_tensor(config, info, expert, projection, part)
    for layer in (*(f"layers.{number}" for number in range(num_layers)), *layers):
        _check_complete(layer, layers.get(layer, {}), num_experts)
    return dict(layers)


def _check_expert_tensor(config: Mapping[str, Any], info: TensorInfo, expert: int, projection: str, part: str) -> None:
    hidden_size, intermediate_size = config["hidden_size"], config["moe_intermediate_size"]
    rows, cols = (hidden_size, intermediate_size) if projection == "w2" else (intermediate_size, hidden_size)
    dtypes, per_row = (_WEIGHT_DTYPES, cols // 2) if part == "weight" else (_SCALE_DTYPES, cols // layout.MXFP4_GROUP)
    if info.dtype not in dtypes:
        raise Refusal(
            f"{info.name} of expert {expert} is stored as {info.dtype}, not as {' or '.join(dtypes)}: is it an FP4 checkpoint?"
        )
    if info.shape != (rows, per_row):
        raise Refusal(
            f"{info.name} of expert {expert} has shape {list(info.shape)}, but config.json's hidden_size {hidden_size} and "
            f"moe_intermediate_size {intermediate_size} need [{rows}, {per_row}]."
        )


def _check_complete(layer: str, found: Mapping[str, TensorInfo], num_experts: int) -> None:
    for expert in range(num_experts):
        names = [expert_tensor(layer, expert, projection, part) for projection in PROJECTIONS for part in ("weight", "scale")]
        missing = [name for name in names if name not in found]
        if len(missing) == len(names):
            raise Refusal(f"{layer} has no tensors for expert {expert} of 0..{num_experts - 1}: fetch the missing files.")
        if missing:
            raise Refusal(
                f"{missing[0]} is missing, expert {expert} has {len(names) - len(missing)} of its {len(names)} tensors."
            )


def check_other_tensors(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Embedding, head and routers against config.json; every other FP8 weight against its scale grid."""
    hidden_size, num_experts, vocab_size = config["hidden_size"], config["n_routed_experts"], config["vocab_size"]
    wanted = {"embed.weight": (vocab_size, hidden_size), "head.weight": (vocab_size, hidden_size), "norm.weight": (hidden_size,)}
    for layer in range(config["num_hidden_layers"]):
        wanted[f"layers.{layer}.ffn.gate.weight"] = (num_experts, hidden_size)
    for name, shape in wanted.items():
        if name not in tensors:
            raise Refusal(f"{name} is missing: this is no whole DeepSeek-V4 checkpoint in the original naming.")
        if tensors[name].shape != shape:
            raise Refusal(f"{name} has shape {list(tensors[name].shape)}, but config.json needs {list(shape)}.")
    for name, info in tensors.items():
        if EXPERT_TENSOR.match(name) or not name.endswith((".weight", ".scale")):
            continue
        other = tensors.get(re.sub(r"weight$", "scale", name) if name.endswith("weight") else re.sub(r"scale$", "weight", name))
        if info.dtype == "F8_E4M3" and other is None:
            raise Refusal(f"{name} is E4M3 but has no .scale beside it: fetch the missing files.")
        if name.endswith(".scale") and other is None:
            raise Refusal(f"{name} has no .weight beside it: fetch the missing files.")
        if info.dtype == "F8_E4M3":
            grid = tuple(-(-size // layout.FP8_BLOCK) for size in info.shape)
            if other.shape != grid or other.dtype not in _SCALE_DTYPES:
                raise Refusal(
                    f"{other.name} is {other.dtype} {list(other.shape)}, but {name} {list(info.shape)} needs {list(grid)}."
                )


def check_scale(scale: TensorInfo) -> np.ndarray:
    """The scale bytes [rows, groups] of one expert matrix. Raises Refusal for NaN and, stored as FP32, for no power of two."""
    match = EXPERT_TENSOR.match(scale.name)
    where = f"{scale.name} of expert {match[2]}" if match else scale.name
    data = scale.read_bytes()
    if scale.dtype == "F32":
        values = data.view("<f4")
        bits = data.view("<u4")
        # A normal power of two has no mantissa bits; 2**-127, the smallest scale, is subnormal: bit 22 alone.
        is_power = ((bits & 0x7FFFFF) == 0) & (bits != 0) & (bits < 0x7F800000) | (bits == 0x400000)
        if not is_power.all():
            position = int(np.argmin(is_power))
            row, group = divmod(position, scale.shape[1])
            raise Refusal(
                f"{where} is {values[position]} at row {row}, group {group}: an FP4 scale is a power of two, 2**-127 to 2**127."
            )
        data = (bits >> 23).astype(np.uint8)
    if (data == layout.UE8M0_NAN).any():
        row, group = divmod(int(np.argmax(data == layout.UE8M0_NAN)), scale.shape[1])
        raise Refusal(
            f"{where} is byte {layout.UE8M0_NAN} (NaN) at row {row}, group {group}: the file is damaged, fetch it again."
        )
    return data.reshape(scale.shape)
