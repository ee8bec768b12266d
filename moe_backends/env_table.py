"""Every environment variable that this project reads: meaning, values and older names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hopper_moe.kernels import cache_dir
from hopper_moe.kernels.shard import DEFAULT_TIMEOUT_S
from hopper_moe.moe_backends.kernel_specs import KERNELS, SPECS, KernelSpec
from hopper_moe.quantization import routing_law
from hopper_moe.quantization.errors import Refusal

PREFIX = "HOPPER_MOE_"
AUTO = "auto"

MAX_CAPACITY = 1 << 18
STOCK_CAPACITY = "SGLANG_OPT_DEEPGEMM_MEGA_MOE_NUM_MAX_TOKENS_PER_RANK"
MAX_TIMEOUT_S = 3600
DUMMY_ROUTING = PREFIX + "DUMMY_ROUTING"

# Variables that Kubernetes and Docker set in containers near a service or linked container named "hopper-moe...".
FOREIGN = re.compile(
    r"HOPPER_MOE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO|START|END))?)?|ENV_\w+)"
)
DOCKER_NAME = re.compile(r"HOPPER_MOE_(\w+_)?NAME")  # with a value such as "/web/hopper-moe"

_TRUE = ("1", "true", "yes", "y")  # the spellings that SGLang accepts, so that an older name means the same to both
_FALSE = ("0", "false", "no", "n")


def is_foreign(name: str, value: str) -> bool:
    """Whether a name that starts with PREFIX is a service link of Kubernetes or Docker, not a misspelling of ours."""
    return bool(FOREIGN.fullmatch(name) or (DOCKER_NAME.fullmatch(name) and value.startswith("/")))


def is_off(text: str) -> bool:
    """Whether a switch of this value is off, for switches of SGLang's own: it says itself what is none."""
    return text.lower() in _FALSE


def parse_bool(name: str, text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if is_off(text):
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
    if text not in ("refuse", "reference", "round"):
        raise Refusal(f"{name}={text!r} is not a rule for inexact rows: use refuse, reference or round.")
    return text


@dataclass(frozen=True)
class Variable:
    """One variable of this project. `field`: its name in `Settings`; `legacy`: an older name with the same values."""

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
        "refuse | reference | round",
        "a layer with rows that no packed FP4 format holds exactly: refuse it, run it on the exact reference (slow), or round "
        "the smallest weights of these rows and log by how much (changes the result)",
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
        "dummy_routing",
        "uniform | zipf:S",
        "experts' load under `--load-format dummy`; if set, also for stock backends",
        routing_law.parse,
        routing_law.Routing,
    ),
    Variable(
        "cache_dir",
        "absolute path",
        "where compiled kernels are kept, shared by all ranks of a machine",
        cache_dir.parse,
        cache_dir.default,
    ),
)


@dataclass(frozen=True)
class LegacySwitch:
    """An older switch that narrows the kernel choice: the kernels that remain when it is 1, and when it is 0."""

    name: str
    when_true: tuple[str, ...]
    when_false: tuple[str, ...]
    meaning: str


FP4_EXPERTS = "SGLANG_DSV4_FP4_EXPERTS"
EXPAND_FP4 = "SGLANG_DSV4_FP4_DEQUANT"


def _those(fits: Callable[[KernelSpec], bool]) -> tuple[str, ...]:
    return tuple(spec.name for spec in SPECS if fits(spec))


# The reference computes the same function as the FP4 kernels, so it is allowed wherever they are; it serves no FP8 experts.
LEGACY_SWITCHES: tuple[LegacySwitch, ...] = (
    LegacySwitch(
        "SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE",
        _those(lambda spec: spec.multi_rank),
        _those(lambda spec: spec.library is None),
        "1: one fused kernel over all ranks; 0: not that",
    ),
    LegacySwitch(
        FP4_EXPERTS,
        _those(lambda spec: spec.expert_dtype == "fp4"),
        _those(lambda spec: spec.expert_dtype == "fp8"),
        "1: the checkpoint's experts are FP4; 0: they are FP8",
    ),
    LegacySwitch(
        EXPAND_FP4,
        _those(lambda spec: spec.expert_dtype == "fp8"),
        KERNELS,
        "1: FP4 experts are turned into FP8 at load; 0: they stay FP4",
    ),
)

# The memory layout that it switches on is the only one here: 1 changes nothing, 0 is refused.
LEGACY_ALWAYS_ON = "SGLANG_OPT_FIX_MEGA_MOE_MEMORY"
