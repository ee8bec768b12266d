"""Random routers that spread tokens over experts in a known way: uniformly, or as Zipf's law with a limit.

A row of the gate holds the signs of a fair coin, times one size per expert. Every logit of a random token is then normal with a
standard deviation in proportion to that size, whatever norm weights stand before the gate, and with a correction bias of zero the
score function does not matter: the k largest logits are chosen. With sizes 1/z(p), z the normal quantile of 1 - p, expert e's
logit is above 1 in a share p of the tokens; these shares sum up to k, so the k-th largest logit is close to 1.
"""

from __future__ import annotations

import math
import statistics

import torch

from hopper_moe.quantization.routing_law import MAX_SHARE, Routing, shares


def gate_weight(
    routing: Routing, num_experts: int, hidden_size: int, top_k: int, input_rms: float, source: torch.Generator
) -> torch.Tensor:
    """float32 [E, H] of a gate. A token of RMS `input_rms` gives an expert of mean load a logit of standard deviation 1.

    Which expert is how hot is drawn, so that hot experts are on any rank. Where MAX_SHARE is below the mean load: uniform.
    """
    device, mean = source.device, top_k / num_experts
    signs = torch.randint(2, (num_experts, hidden_size), generator=source, device=device, dtype=torch.float32) * 2 - 1
    order = torch.randperm(num_experts, generator=source, device=device)
    sizes = [1.0] * num_experts
    if routing.exponent and mean < MAX_SHARE:
        sizes = [_quantile(mean) / _quantile(share) for share in shares(routing, num_experts, top_k)]
    size = torch.tensor(sizes, dtype=torch.float32, device=device)[order]
    return signs * (size / (math.sqrt(hidden_size) * input_rms)).unsqueeze(-1)


def _quantile(share: float) -> float:
    return statistics.NormalDist().inv_cdf(1 - share)


def hash_table(routing: Routing, num_tokens: int, num_experts: int, top_k: int, source: torch.Generator) -> torch.Tensor:
    """int64 [num_tokens, top_k] of distinct experts: where a token's id alone decides."""
    device = source.device
    share = torch.tensor(shares(routing, num_experts, top_k), dtype=torch.float32, device=device)
    order = torch.randperm(num_experts, generator=source, device=device)
    # Steps of 1 from a random start along the cumulated shares choose each expert with exactly its share, and none twice, since
    # no share is above 1. Every token has its own order of the experts, which mixes who is chosen together.
    chosen = []
    for first in range(0, num_tokens, _BLOCK):
        count = min(_BLOCK, num_tokens - first)
        mixed = torch.rand(count, num_experts, generator=source, device=device).argsort(-1)
        edges = share[mixed].cumsum(-1)
        edges[:, -1] = top_k
        start = torch.rand(count, 1, generator=source, device=device, dtype=torch.float32)
        points = start + torch.arange(top_k, device=device)
        chosen.append(order[mixed.gather(-1, torch.searchsorted(edges, points, right=True).clamp_(max=num_experts - 1))])
    return torch.cat(chosen)


_BLOCK = 4096  # tokens drawn at once
