"""How the load of random routers spreads over experts: uniformly, or as Zipf's law with a limit. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from hopper_moe.quantization.errors import Refusal

MAX_SHARE = 0.4
"""Largest share of the tokens that one expert gets under Zipf's law; the rest goes to the others. Sizes grow without limit as a
share approaches one half."""
MAX_EXPONENT = 2.0


@dataclass(frozen=True)
class Routing:
    """How load spreads over the experts of a layer. `exponent` s: an expert's load falls as rank**-s; 0: uniform."""

    exponent: float = 0.0

    def __str__(self) -> str:
        return f"zipf:{self.exponent:g}" if self.exponent else "uniform"


def parse(name: str, text: str) -> Routing:
    """`uniform` or `zipf:S`. Raises Refusal naming the variable `name`."""
    found = re.fullmatch(r"uniform|zipf:([0-9]{1,3}(?:\.[0-9]{1,6})?)", text)
    exponent = float((found and found[1]) or 0)
    if found is None or (found[1] and not 0 < exponent <= MAX_EXPONENT):
        raise Refusal(f"{name}={text!r} is no routing: use uniform, or zipf:S with S above 0 and up to {MAX_EXPONENT:g}.")
    return Routing(exponent)


def shares(routing: Routing, num_experts: int, top_k: int) -> list[float]:
    """The share of the tokens that each expert gets, hottest first; they sum up to `top_k`."""
    weights = [rank**-routing.exponent for rank in range(1, num_experts + 1)]
    limit = max(MAX_SHARE, top_k / num_experts)
    full = 0  # so many experts are at the limit
    while True:
        per_weight = (top_k - full * limit) / sum(weights[full:])
        if weights[full] * per_weight <= limit * (1 + 1e-9):
            return [limit] * full + [weight * per_weight for weight in weights[full:]]
        full += 1
