"""config.json as SGLang sees it, and its values read with one sentence for each that makes no sense. No torch."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopper_moe.quantization.checkpoint_files import read_json_object
from hopper_moe.quantization.errors import Refusal

_V41_TYPES = ("deepseek_v41", "deepseek_v41_text")
V4_MODEL_TYPES = ("deepseek_v4", *_V41_TYPES)
_RENAMED = {"DeepseekV41ForCausalLM": "DeepseekV4ForCausalLM"}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder, flattened as SGLang does it. Raises Refusal if there is none or it is no JSON object."""
    if not folder.is_dir():
        raise Refusal(f"{folder} is no folder: give the checkpoint folder that holds config.json and the safetensors files.")
    return flatten(read_json_object(folder / "config.json"), folder / "config.json")


def flatten(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The keys of `text_config` below those of the top level, and DeepSeek-V4.1's architecture under V4's name.

    SGLang does the same (`configs/deepseek_v41.py`). Raises Refusal for a text_config where SGLang cannot read one.
    """
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise Refusal(f"{where}: text_config={reprlib.repr(text)}, but a JSON object is needed there: mend config.json.")
    # In both places even null stops SGLang.
    is_misplaced = "text_config" in config and config.get("model_type") == "deepseek_v4"
    if is_misplaced or (text is not None and "text_config" in text):
        raise Refusal(
            f"{where} has text_config beside model_type {config.get('model_type')!r} or inside another text_config, where SGLang "
            "takes none: mend config.json."
        )
    flat = {**(text or {}), **config}
    flat.pop("text_config", None)
    names = flat.get("architectures")
    if flat.get("model_type") in _V41_TYPES and isinstance(names, list) and len(names) == 1 and names[0] in tuple(_RENAMED):
        flat["architectures"] = [_RENAMED[names[0]]]
    return flat


@dataclass(frozen=True)
class ConfigValues:
    """Typed access to a flattened config.json. Every method raises Refusal with one sentence naming file, key and value."""

    where: str
    values: Mapping[str, Any]

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in low..high; absent or null: `default`, or refused without one."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self._refusal(key, value, f"a whole number in {low}..{high}")
        return value

    def positive(self, key: str) -> float | None:
        """A positive finite number; absent or null: None."""
        value = self.values.get(key)
        if value is None:
            return None
        if type(value) not in (float, int) or not 0 < value <= sys.float_info.max:
            raise self._refusal(key, value, "only a positive number")
        return float(value)

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        if value is not None and not (isinstance(value, str) and value.isprintable()):
            raise self._refusal(key, value, "a text")
        return value

    def whole_list(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """Whole numbers in low..high; absent or null: none."""
        value = self.values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(item) is int and low <= item <= high for item in value):
            raise self._refusal(key, value, f"a list of whole numbers in {low}..{high}")
        return tuple(value)

    def nested(self, key: str) -> ConfigValues:
        """The values of an object inside; absent or null: none."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._refusal(key, value, "a JSON object")
        return ConfigValues(f"{self.where}: {key}", value or {})

    def _refusal(self, key: str, value: Any, needed: str) -> Refusal:
        shown = reprlib.repr(value) if not isinstance(value, float) else repr(value)
        return Refusal(
            f"{self.where} has {key}={shown}, but {needed} makes sense there: is it a DeepSeek-V4 model, and is the file whole?"
        )
