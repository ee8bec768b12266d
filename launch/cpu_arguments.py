"""The arguments of `hopper-moe serve` that apply to the embedded CPU host."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from hopper_moe.moe_backends.sglang.plan import BACKEND
from hopper_moe.quantization.errors import Refusal


@dataclass(frozen=True)
class CpuArguments:
    """`device`: "cpu", "cuda" or None for the available one. `ignored`: arguments that do not apply to one CPU process."""

    device: str | None
    host: str
    port: int
    api_key: str | None
    served_model_name: str | None
    moe_runner_backend: str
    revision: str | None
    download_dir: str | None
    ignored: tuple[str, ...]

    def require_weights(self) -> None:
        """Raises `Refusal` for a launch without weights."""
        if "--load-format dummy" in " ".join(self.ignored).replace("=", " "):
            raise Refusal("--load-format dummy makes up weights for Hopper GPUs, the CPU host loads a checkpoint: drop it.")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal(f"arguments: {message}.")


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number in 1..65535")
    return int(text)


def read(arguments: Sequence[str]) -> CpuArguments:
    """Raises `Refusal` for an invalid value. All other SGLang arguments are returned in `ignored`."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=_port, default=30000)
    parser.add_argument("--api-key")
    parser.add_argument("--served-model-name")
    parser.add_argument("--moe-runner-backend", default=BACKEND)
    parser.add_argument("--revision")
    parser.add_argument("--download-dir")
    found, ignored = parser.parse_known_args(list(arguments))
    return CpuArguments(**vars(found), ignored=tuple(ignored))
