"""Every environment variable that this project reads: its meaning, its values, and the older names it answers to."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopper_moe.moe_backends.errors import Refusal

PREFIX = "HOPPER_MOE_"
AUTO = "auto"
KERNELS = ("mxfp4_mega", "fp8_mega", "w4a16", "reference")  # best first: the order in which `auto` tries them

MAX_CAPACITY = 1 << 18
STOCK_CAPACITY = "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK"
MAX_TIMEOUT_S = 3600
DEFAULT_TIMEOUT_S = 300  # a peer may still be compiling or capturing graphs

_TRUE = ("1", "true", "yes", "y")  # the spellings SGLang takes, so that a legacy name means the same to both
_FALSE = ("0", "false", "no", "n")


def parse_bool(name: str, text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise Refusal(f"{name}={text!r} is not a switch: set it to 1 or 0, or unset it.")


def _int_in(low: int, high: int, unit: str) -> Callable[[str, str], int]:
    def parse(name: str, text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise Refusal(f"{name}={text!r} is not a whole number: give {unit} between {low} and {high}, or unset it.")
        if not low <= int(text) <= high:
            raise Refusal(f"{name}={text} is outside {low}..{high} {unit}: give a value inside, or unset it.")
        return int(text)

    return parse


def _parse_kernel(name: str, text: str) -> str:
    if text not in (AUTO, *KERNELS):
        raise Refusal(f"{name}={text!r} is not a kernel: use one of {', '.join((AUTO, *KERNELS))}.")
    return text


def _parse_inexact_rows(name: str, text: str) -> str:
    if text not in ("refuse", "reference"):
        raise Refusal(f"{name}={text!r} is not a rule for inexact rows: use refuse or reference.")
    return text


def _parse_cache_dir(name: str, text: str) -> Path:
    path = Path(os.path.expanduser(text))
    if not path.is_absolute():
        raise Refusal(f"{name}={text!r} is a relative path, which means another folder in every process: give an absolute one.")
    if path.exists() and not path.is_dir():
        raise Refusal(f"{name}={text!r} is a file, but compiled kernels need a folder: give a folder or a new path.")
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Refusal(f"{name}={text!r} cannot be written ({existing} is read-only for this user): give a writable folder.")
    return path


def _default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hopper_moe"


@dataclass(frozen=True)
class Variable:
    """One own variable. `legacy` is an older name with exactly the same values; `field` is its name in `Settings`."""

    field: str
    values: str
    meaning: str
    parse: Callable[[str, str], Any]
    default: Callable[[], Any]
    legacy: str | None = None

    @property
    def name(self) -> str:
        return PREFIX + self.field.upper()


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "kernel",
        " | ".join((AUTO, *KERNELS)),
        "which kernel runs the experts; auto picks the best that runs here and logs why",
        _parse_kernel,
        lambda: AUTO,
    ),
    Variable(
        "max_tokens_per_rank",
        f"1..{MAX_CAPACITY}",
        "tokens a rank may bring to one layer call; sizes the exchange buffer; unset: from SGLang's own arguments",
        _int_in(1, MAX_CAPACITY, "tokens"),
        lambda: None,
        STOCK_CAPACITY,
    ),
    Variable(
        "fp8_combine",
        "0 | 1",
        "send expert outputs back to their rank as FP8 instead of BF16 (changes the result; measured no faster over NVLink 4)",
        parse_bool,
        lambda: False,
        "DG_USE_FP8_COMBINE",
    ),
    Variable(
        "fp4_dispatch",
        "0 | 1",
        "send tokens to the experts' rank as FP4 instead of FP8 (changes the result; measured slower from 512 tokens a rank on)",
        parse_bool,
        lambda: False,
        "DG_USE_FP4_ACTS",
    ),
    Variable(
        "inexact_rows",
        "refuse | reference",
        "a layer with rows that the packed FP4 format cannot hold exactly: refuse it, or run it on the exact reference (slow)",
        _parse_inexact_rows,
        lambda: "refuse",
    ),
    Variable(
        "self_check",
        "0 | 1",
        "before serving, compare one layer of every rank with the reference and refuse to serve if it differs",
        parse_bool,
        lambda: True,
    ),
    Variable(
        "timeout_s",
        f"1..{MAX_TIMEOUT_S}",
        "seconds a kernel waits for another rank before it stops with a message naming that rank",
        _int_in(1, MAX_TIMEOUT_S, "seconds"),
        lambda: DEFAULT_TIMEOUT_S,
    ),
    Variable(
        "cache_dir",
        "absolute path",
        "where compiled kernels are kept, shared by all ranks of a machine",
        _parse_cache_dir,
        _default_cache_dir,
    ),
)


@dataclass(frozen=True)
class LegacySwitch:
    """An older on/off name that narrows the kernel choice: which kernels still fit when it is set to 1, and to 0."""

    name: str
    when_true: tuple[str, ...]
    when_false: tuple[str, ...]
    meaning: str


EXPAND_FP4 = "SGLANG_DSV4_FP4_DEQUANT"

# The reference computes the same function as the FP4 kernels, so it fits wherever they do; it does not serve FP8 experts.
LEGACY_SWITCHES: tuple[LegacySwitch, ...] = (
    LegacySwitch(
        "SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE",
        ("mxfp4_mega", "fp8_mega", "reference"),
        ("w4a16", "reference"),
        "1: one fused kernel over all ranks; 0: not that",
    ),
    LegacySwitch(
        "SGLANG_DSV4_FP4_EXPERTS",
        ("mxfp4_mega", "w4a16", "reference"),
        ("fp8_mega",),
        "1: the checkpoint's experts are FP4; 0: they are FP8",
    ),
    LegacySwitch(
        EXPAND_FP4,
        ("fp8_mega",),
        KERNELS,
        "1: FP4 experts are turned into FP8 at load; 0: they stay FP4",
    ),
)

# Its fix is how this project always lays its buffer out, so 1 changes nothing and 0 cannot be had.
LEGACY_ALWAYS_ON = "SGLANG_OPT_FIX_MEGA_MOE_MEMORY"
