"""The only module that reads environment variables for this project (`python -m` friendly: no torch, no sglang).

`settings()` gives the process's typed values; `load(environ)` is the pure function behind it. Names that people already
export for SGLang's and DeepGEMM's MegaMoE keep working: each one used is translated with one log line. Anything unknown
or contradictory is a `Refusal`. Names starting with `_HOPPER_MOE_` are private notes from a parent process to its children.
"""

from __future__ import annotations

import difflib
import functools
import logging
import multiprocessing
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopper_moe.moe_backends.env_table import (
    AUTO,
    EXPAND_FP4,
    KERNELS,
    LEGACY_ALWAYS_ON,
    LEGACY_SWITCHES,
    PREFIX,
    STOCK_CAPACITY,
    VARIABLES,
    Variable,
    parse_bool,
)
from hopper_moe.moe_backends.errors import Refusal

logger = logging.getLogger("hopper_moe")

DEFAULT = "default"
ENV = "environment"

CAPACITY_NOTE = "_HOPPER_MOE_CAPACITY"
"""The value of STOCK_CAPACITY that a launch of ours has set for SGLang: to a later launch it is nobody's wish."""


@dataclass(frozen=True)
class Settings:
    """Typed values of every variable. `sources` says for each field: "default", "environment", or the older name it came from."""

    kernel: str
    max_tokens_per_rank: int | None
    fp8_combine: bool
    fp4_dispatch: bool
    inexact_rows: str
    self_check: bool
    timeout_s: int
    cache_dir: Path
    expand_fp4: bool
    """FP4 experts become FP8 when they are loaded (SGLANG_DSV4_FP4_DEQUANT=1): the same values in twice the bytes."""
    allowed_kernels: tuple[str, ...]
    """Kernels that `kernel` and the older switches together leave open, best first; `auto` chooses among these."""
    sources: Mapping[str, str]
    translations: tuple[str, ...]
    """One line per older name that was translated."""


def load(environ: Mapping[str, str]) -> Settings:
    """Read and check every variable in `environ`. Raises `Refusal` on anything unknown, malformed or contradictory."""
    _refuse_unknown_names(environ)
    if CAPACITY_NOTE in environ and environ[CAPACITY_NOTE] == environ.get(STOCK_CAPACITY):
        environ = {name: value for name, value in environ.items() if name != STOCK_CAPACITY}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    translations: list[str] = []
    for variable in VARIABLES:
        values[variable.field], sources[variable.field] = _read(variable, environ, translations)
    allowed = _allowed_kernels(values["kernel"], environ, translations)
    if values["kernel"] == AUTO and len(allowed) < len(KERNELS):
        sources["kernel"] += f", narrowed to {', '.join(allowed)} by " + ", ".join(_set_switches(environ))
    expand_fp4 = parse_bool(EXPAND_FP4, environ.get(EXPAND_FP4, "0"))
    return Settings(**values, expand_fp4=expand_fp4, allowed_kernels=allowed, sources=sources, translations=tuple(translations))


@functools.cache
def settings() -> Settings:
    """This process's settings, read once. Translated older names are logged once, by the main process only."""
    loaded = load(os.environ)
    if multiprocessing.parent_process() is None:
        for line in loaded.translations:
            logger.warning(line)
    return loaded


def _refuse_unknown_names(environ: Mapping[str, str]) -> None:
    known = [variable.name.removeprefix(PREFIX) for variable in VARIABLES]
    for name in sorted(environ):
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in known:
            close = difflib.get_close_matches(name.removeprefix(PREFIX), known, n=1)
            hint = f"did you mean {PREFIX}{close[0]}?" if close else "`hopper-moe env` lists them."
            raise Refusal(f"{name} is set, but no such variable exists: {hint}")


def _read(variable: Variable, environ: Mapping[str, str], translations: list[str]) -> tuple[Any, str]:
    own = environ.get(variable.name)
    old = environ.get(variable.legacy) if variable.legacy else None
    if own is not None:
        value = variable.parse(variable.name, own)
        if old is not None and variable.parse(variable.legacy, old) != value:
            raise Refusal(f"{variable.name}={own} and {variable.legacy}={old} contradict each other: unset one of them.")
        return value, ENV
    if old is not None:
        value = variable.parse(variable.legacy, old)
        translations.append(f"{variable.legacy}={old} is read as {variable.name}={old}.")
        return value, variable.legacy
    return variable.default(), DEFAULT


def _set_switches(environ: Mapping[str, str]) -> list[str]:
    return [f"{switch.name}={environ[switch.name]}" for switch in LEGACY_SWITCHES if switch.name in environ]


def _allowed_kernels(kernel: str, environ: Mapping[str, str], translations: list[str]) -> tuple[str, ...]:
    """Kernels that fit `kernel` and every older switch at once. Two settings without a common kernel are refused."""
    own = PREFIX + "KERNEL"
    asked = {f"{own}={kernel}": KERNELS if kernel == AUTO else (kernel,)}
    for switch in LEGACY_SWITCHES:
        if switch.name not in environ:
            continue
        text = environ[switch.name]
        fits = switch.when_true if parse_bool(switch.name, text) else switch.when_false
        for said, others in asked.items():
            if not set(fits) & set(others):
                raise Refusal(f"{said} and {switch.name}={text} ({switch.meaning}) contradict each other: unset one of them.")
        asked[f"{switch.name}={text}"] = fits
        translations.append(f"{switch.name}={text} is read as {own} being one of: {', '.join(fits)}.")
    if LEGACY_ALWAYS_ON in environ:
        text = environ[LEGACY_ALWAYS_ON]
        if not parse_bool(LEGACY_ALWAYS_ON, text):
            raise Refusal(f"{LEGACY_ALWAYS_ON}={text} asks for a buffer layout that this project does not have: unset it.")
        translations.append(f"{LEGACY_ALWAYS_ON}={text} changes nothing: the buffer is always laid out that way.")
    allowed = tuple(name for name in KERNELS if all(name in fits for fits in asked.values()))
    if not allowed:
        raise Refusal(f"{' and '.join(asked)} leave no kernel that fits all of them: unset one of them.")
    return allowed
