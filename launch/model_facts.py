"""What config.json and one safetensors header say about a model's routed experts. Reads no weights."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopper_moe.moe_backends.errors import Refusal

# Routed expert, first projection: DeepSeek's own naming and the Hugging Face one.
_EXPERT_WEIGHT = re.compile(r"layers\.\d+\.(ffn|mlp)\.experts\.\d+\.(w1|gate_proj)\.weight$")
_DTYPES = {"I8": "fp4", "U8": "fp4", "F4": "fp4", "F8_E4M3": "fp8", "BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_HEADER_LIMIT = 100 << 20  # the safetensors format's own limit


@dataclass(frozen=True)
class ModelFacts:
    """Routed-expert sizes of a model. `expert_dtype` comes from the weights' header, else from config.json, else "unknown"."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_moe_layers: int
    swiglu_limit: float | None
    expert_dtype: str


def read_model(model: str) -> ModelFacts:
    """Facts of a local folder or a Hugging Face id (only its config.json is fetched). Raises `Refusal` naming what is wrong."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        config = _read_json(folder / "config.json")
        dtype = _header_dtype(folder)
    elif folder.exists():
        raise Refusal(f"{model} is a file, not a checkpoint: give the folder that holds config.json and the safetensors files.")
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise Refusal(f"{model} does not exist: give a checkpoint folder or a Hugging Face id like deepseek-ai/DeepSeek-V4-Flash.")
    else:
        config = _read_json(_hub_config(model))
        dtype = None
    return _facts(model, config, dtype)


def _facts(model: str, config: dict[str, Any], dtype: str | None) -> ModelFacts:
    def integer(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise Refusal(f"{model}: config.json has {key}={value!r}, but a whole number is needed there: is it a DeepSeek-V4 model?")
        return value

    if not config.get("n_routed_experts"):
        raise Refusal(f"{model}: config.json has no n_routed_experts, so there are no experts to serve: use `sglang serve` for it.")
    declared = config.get("expert_dtype")
    if dtype is not None and declared is not None and declared != dtype:
        raise Refusal(f"{model}: config.json says expert_dtype={declared}, but the expert weights are {dtype}: mend config.json.")
    limit = config.get("swiglu_limit")
    if limit is not None and (not isinstance(limit, (int, float)) or not limit > 0):
        raise Refusal(f"{model}: config.json has swiglu_limit={limit!r}, but only a positive number or null means something.")
    architectures = config.get("architectures") or ["unknown"]
    return ModelFacts(
        architecture=architectures[0],
        hidden_size=integer("hidden_size"),
        intermediate_size=integer("moe_intermediate_size"),
        num_experts=integer("n_routed_experts"),
        top_k=integer("num_experts_per_tok"),
        num_moe_layers=integer("num_hidden_layers") - integer("first_k_dense_replace", 0) + integer("num_nextn_predict_layers", 0),
        swiglu_limit=limit,
        expert_dtype=dtype or declared or "unknown",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise Refusal(f"{path} does not exist: a checkpoint folder has a config.json.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} is not valid JSON ({error}): download it again.") from None
    if not isinstance(data, dict):
        raise Refusal(f"{path} holds a JSON {type(data).__name__}, but an object is needed: download it again.")
    return data


def _header_dtype(folder: Path) -> str | None:
    """Dtype of the first routed-expert weight on disk; None when the folder has no such weight (yet)."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = _read_json(index).get("weight_map", {})
        files = {folder / file for name, file in names.items() if _EXPERT_WEIGHT.search(name)}
        missing = sorted(file.name for file in files if not file.exists())
        if missing:
            raise Refusal(f"{folder}: {len(missing)} weight files of the index are missing, first {missing[0]}: finish the download.")
        files = sorted(files)[:1]
    else:
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        for name, entry in _header(file).items():
            if _EXPERT_WEIGHT.search(name):
                return _DTYPES.get(entry["dtype"], entry["dtype"])
    return None


def _header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, read without safetensors because that refuses dtypes newer than itself."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _HEADER_LIMIT:
            raise Refusal(f"{path} is not a safetensors file (header of {length} bytes): download it again.")
        raw = file.read(length)
    try:
        return json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise Refusal(f"{path} has a damaged safetensors header: download it again.") from None


def _hub_config(model: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise Refusal(f"{model} looks like a Hugging Face id, but huggingface_hub is not installed: give a local folder.") from None
    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refusal(f"{model}: its config.json cannot be fetched ({reason}): give a local folder or mend the connection.") from None
