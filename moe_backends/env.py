"""Reads every environment variable of this project (`python -m` friendly: no torch, no sglang).

`settings()` returns the process's typed values; `load(environ)` is the pure function behind it. Variables of SGLang's and
DeepGEMM's MegaMoE are still accepted and translated, with one log line each. Unknown or contradictory variables raise
`Refusal`, except service links of Kubernetes and Docker. Names starting with `_HOPPER_MOE_` are private: a parent process sets
them for its children.
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
    is_foreign,
    parse_bool,
)
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.routing_law import Routing

logger = logging.getLogger("hopper_moe")

DEFAULT = "default"
ENV = "environment"

CAPACITY_NOTE = "_HOPPER_MOE_CAPACITY"
"""The value of STOCK_CAPACITY that a launch of ours has set for SGLang, so that a later launch does not read it as the user's."""


@dataclass(frozen=True)
class Settings:
    """Typed values of every variable. `sources[field]`: "default", "environment", or the older name that was set."""

    kernel: str
    max_tokens_per_rank: int | None
    fp8_combine: bool
    fp4_dispatch: bool
    inexact_rows: str
    self_check: bool
    timeout_s: int
    dummy_routing: Routing
    cache_dir: Path
    expand_fp4: bool
    """Expand FP4 experts to FP8 at load (SGLANG_DSV4_FP4_DEQUANT=1): the same values in twice the bytes."""
    allowed_kernels: tuple[str, ...]
    """Kernels that `kernel` and the older switches together allow, best first; `auto` chooses among these."""
    sources: Mapping[str, str]
    translations: tuple[str, ...]
    """One line per older name that was translated."""

    def origin(self, field: str) -> str:
        """The variable that set a value, or that can set it."""
        source = self.sources[field]
        return PREFIX + field.upper() if source in (DEFAULT, ENV) else source


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
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in known and not is_foreign(name, environ[name]):
            close = difflib.get_close_matches(name.removeprefix(PREFIX), known, n=1)
            hint = f"did you mean {PREFIX}{close[0]}?" if close else "`hopper-moe env` lists them."
            raise Refusal(f"{name} is set, but no such variable exists: {hint}")


def _read(variable: Variable, environ: Mapping[str, str], translations: list[str]) -> tuple[Any, str]:
    own = environ.get(variable.name)
    if variable.legacy is None or (old := environ.get(variable.legacy)) is None:
        return (variable.default(), DEFAULT) if own is None else (variable.parse(variable.name, own), ENV)
    value = variable.parse(variable.legacy, old)
    if own is None:
        translations.append(f"{variable.legacy}={old} is read as {variable.name}={old}.")
        return value, variable.legacy
    if variable.parse(variable.name, own) != value:
        raise Refusal(f"{variable.name}={own} and {variable.legacy}={old} contradict each other: unset one of them.")
    return value, ENV


def _set_switches(environ: Mapping[str, str]) -> list[str]:
    return [f"{switch.name}={environ[switch.name]}" for switch in LEGACY_SWITCHES if switch.name in environ]


def _allowed_kernels(kernel: str, environ: Mapping[str, str], translations: list[str]) -> tuple[str, ...]:
    """Kernels that fit `kernel` and every older switch at once. Two settings without a common kernel are refused."""
    own = PREFIX + "KERNEL"
    asked: dict[str, tuple[str, ...]] = {f"{own}={kernel}": KERNELS if kernel == AUTO else (kernel,)}
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
