"""The model of a launch: its facts and, of weights that are on this machine, its headers. Reads no weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopper_moe.moe_backends.env_table import FP4_EXPERTS, parse_bool
from hopper_moe.quantization.checkpoint_check import by_original_name, check_tensors
from hopper_moe.quantization.checkpoint_files import TensorInfo, read_headers
from hopper_moe.quantization.checkpoint_location import ModelSource, find_config, find_weights
from hopper_moe.quantization.config_tensors import tensors_of
from hopper_moe.quantization.config_values import V4_MODEL_TYPES, read_config
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.model_facts import ModelFacts, facts_of, stored_dtype

DUMMY = "dummy"
"""The value of `--load-format` with which nothing is loaded."""


@dataclass(frozen=True)
class LaunchedModel:
    """`folder` and `tensors` (headers by original name) are None for a model of which SGLang will still fetch files.

    `is_random`: of `--load-format dummy`; `tensors` follow from config.json and hold no routed experts, or are None.
    """

    facts: ModelFacts
    folder: Path | None
    tensors: Mapping[str, TensorInfo] | None
    is_random: bool = False

    def require_complete(self) -> None:
        """Raises `Refusal` for the first tensor that is missing, doubled or of a wrong shape or type.

        SGLang skips expert tensors that it does not find, so an unfinished download would serve garbage.
        """
        if self.tensors is not None and not self.is_random:
            check_tensors(self.facts, self.tensors)


def read_model(
    model: str, *, revision: str | None = None, download_dir: str | None = None, load_format: str = "auto"
) -> LaunchedModel:
    """A folder, a Hugging Face id or a ModelScope id, found where SGLang finds it. Raises `Refusal` naming what is wrong.

    Of a model that is not on this machine only config.json is fetched. With `load_format` "dummy" no weights are needed.
    """
    source = ModelSource(model, revision, download_dir)
    config_folder = find_config(source)
    if load_format == DUMMY:
        return _read_random(config_folder)
    config, folder = read_config(config_folder), find_weights(source, config_folder)
    headers = read_headers(folder) if folder else None
    facts = facts_of(config, str(config_folder / "config.json"), stored_dtype(headers) if headers else None)
    return LaunchedModel(facts, folder, by_original_name(headers, facts.num_layers) if headers else None)


def _read_random(folder: Path) -> LaunchedModel:
    """The model that SGLang makes up from config.json. Weights that are there tell the experts' type, as to SGLang."""
    config, where = read_config(folder), str(folder / "config.json")
    stored = None
    with contextlib.suppress(Refusal):  # an index whose files were not fetched
        stored = stored_dtype(read_headers(folder))
    facts = facts_of(config, where, stored or _type_without_weights(config))
    return LaunchedModel(facts, None, tensors_of(config, where), is_random=True)


def _type_without_weights(config: Mapping[str, Any]) -> str | None:
    """SGLang's choice for DeepSeek-V4, whatever config.json says: the variable, else FP4. None: config.json decides."""
    if config.get("model_type") not in V4_MODEL_TYPES:
        return None
    return "fp4" if parse_bool(FP4_EXPERTS, os.environ.get(FP4_EXPERTS, "1")) else "fp8"
