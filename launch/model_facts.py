"""What config.json and the safetensors headers say about a model's routed experts. Reads no weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.quantization.checkpoint_check import check_config, check_experts, check_other_tensors
from hopper_moe.quantization.checkpoint_files import read_config, read_headers

# Routed expert, first projection: DeepSeek's own naming and the Hugging Face one.
_EXPERT_WEIGHT = re.compile(r"layers\.\d+\.(ffn|mlp)\.experts\.\d+\.(w1|gate_proj)\.weight$")
_DTYPES = {"I8": "fp4", "U8": "fp4", "F4": "fp4", "F8_E4M3": "fp8", "BF16": "bf16", "F16": "fp16", "F32": "fp32"}


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
        config = read_config(folder)
        dtype = _stored_dtype(folder)
    elif folder.exists():
        raise Refusal(f"{model} is a file, not a checkpoint: give the folder that holds config.json and the safetensors files.")
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise Refusal(
            f"{model} does not exist: give a checkpoint folder or a Hugging Face id like deepseek-ai/DeepSeek-V4-Flash."
        )
    else:
        config = read_config(_hub_config(model).parent)
        dtype = None
    return _facts(model, config, dtype)


def require_complete(model: str, facts: ModelFacts) -> None:
    """Raises `Refusal` for the first tensor of a local FP4 checkpoint that is missing, doubled or of a wrong shape or type.

    Headers only. SGLang skips expert tensors that it does not find, so an unfinished download would serve garbage.
    """
    folder = Path(model).expanduser()
    if facts.expert_dtype != "fp4" or not folder.is_dir():
        return
    config = {**read_config(folder), "expert_dtype": "fp4"}  # SGLang never asks config.json for it, so it may be absent
    tensors = read_headers(folder)
    check_config(config, folder)
    check_experts(config, tensors)
    check_other_tensors(config, tensors)


def _facts(model: str, config: dict[str, Any], dtype: str | None) -> ModelFacts:
    def integer(key: str, default: int | None = None) -> int:
        value = config.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise Refusal(
                f"{model}: config.json has {key}={value!r}, but a whole number is needed there: is it a DeepSeek-V4 model?"
            )
        return value

    if not config.get("n_routed_experts"):
        raise Refusal(
            f"{model}: config.json has no n_routed_experts, so there are no experts to serve: use `sglang serve` for it."
        )
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
        num_moe_layers=integer("num_hidden_layers")
        - integer("first_k_dense_replace", 0)
        + integer("num_nextn_predict_layers", 0),
        swiglu_limit=limit,
        expert_dtype=dtype or declared or "unknown",
    )


def _stored_dtype(folder: Path) -> str | None:
    """Type of the first routed-expert weight on disk; None when the folder has no such weight."""
    for name, info in read_headers(folder).items():
        if _EXPERT_WEIGHT.search(name):
            return _DTYPES.get(info.dtype, info.dtype)
    return None


def _hub_config(model: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise Refusal(
            f"{model} looks like a Hugging Face id, but huggingface_hub is not installed: give a local folder."
        ) from None
    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refusal(
            f"{model}: its config.json cannot be fetched ({reason}): give a local folder or mend the connection."
        ) from None
