"""Before serving: one real layer of this rank through its runner, against the reference on the weights as they were loaded.

The expectation is computed from the checkpoint's tensors *before* they are converted, so a wrong conversion, a wrong kernel, a
wrong expert id or a wrong scale all show. A difference refuses the launch: nothing is served with a kernel that computes
something else on this machine.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hopper_moe.kernels import reference
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.moe_backends.runners.reference import ReferenceRunner

if TYPE_CHECKING:
    import torch.distributed as dist

    from hopper_moe.kernels.reference_weights import ExpertSource
    from hopper_moe.moe_backends.base import ExpertRunner, ExpertShard

NUM_TOKENS = 6
FUSED_LIMIT = 5e-2
"""Largest relative L2 of a token between a kernel and the very function it implements. 0.8-1.7e-2 was measured for the fused
kernel (tensor cores round sums and so move values over E4M3 edges); a wrong factor, id, row or matrix makes 0.25 or more."""
ROUNDED_LIMIT, ROUNDED_TOKEN_LIMIT = 0.15, 0.5
"""The same for kernels with other roundings than what they are compared with: for the median token and for any. E4M3 activations
make about 0.05, but 0.2 for the large token, whose gates jump; a wrong factor makes 0.33 everywhere, a lost token 1."""


@functools.cache
def _seen() -> set[tuple[str, ExpertShard]]:
    return set()


def is_first(kernel: str, shard: ExpertShard) -> bool:
    """True once per process for each kind of layer: layers of one kind differ in their weights only."""
    new = (kernel, shard) not in _seen()
    _seen().add((kernel, shard))
    return new


@dataclass(frozen=True)
class Sample:
    """Tokens for one rank and what the layer must give for them."""

    hidden_states: torch.Tensor  # bf16 [NUM_TOKENS, hidden_size]
    topk_ids: torch.Tensor  # int32 [NUM_TOKENS, top_k], global
    topk_weights: torch.Tensor  # float32 [NUM_TOKENS, top_k]
    expected: torch.Tensor  # [NUM_TOKENS, hidden_size]
    limit: float  # of the median token's relative L2
    token_limit: float  # of any token's
    seed: int
    seconds: float  # that the expectation took


def draw(shard: ExpertShard, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden_states, topk_ids, topk_weights) for one rank.

    Normal activations with outlier features and one large token, routed as the layer's top-k does it (distinct experts, weights
    that sum to one): to experts of this rank first, the last token anywhere and partly masked.
    """
    # Types are named: while SGLang loads a model, torch's default is BF16.
    options = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float32, "device": "cpu"}
    x = torch.randn(NUM_TOKENS, shard.hidden_size, **options)
    x *= torch.exp(0.5 * torch.randn(shard.hidden_size, **options))
    x[1] *= 30
    preference = torch.rand(NUM_TOKENS, shard.num_experts, **options)
    preference[:-1, shard.first_expert : shard.first_expert + shard.num_local_experts] += 1
    ids = preference.topk(shard.top_k).indices.to(torch.int32)
    ids[-1, 0] = -1
    weights = torch.rand(NUM_TOKENS, shard.top_k, **options) + 0.05
    weights /= weights.sum(1, keepdim=True)
    return x.bfloat16().to(device), ids.to(device), weights.to(device)


def expect(
    kernel: str, checkpoint: ExpertSource, shard: ExpertShard, device: torch.device, group: dist.ProcessGroup | None = None
) -> Sample:
    """Draw tokens and compute what `kernel` must give for them, from the checkpoint's own tensors.

    `group`: the ranks that exchange tokens inside the kernel, all of which call this; None: this rank's experts alone.
    """
    started, seed = time.monotonic(), time.time_ns() % (1 << 31)
    tokens = draw(shard, device, seed)
    rounds_by_contract = kernel in ("mxfp4_mega", "fp8_mega", "reference")
    if rounds_by_contract or group is not None:
        expected = _call(_reference_runner(checkpoint, shard), tokens, group)
    else:
        layer = reference.w4a16 if kernel == "w4a16" else reference.exact
        expected = layer(*tokens, checkpoint, swiglu_limit=shard.swiglu_limit, first_expert=shard.first_expert)
    same = rounds_by_contract or (kernel == "w4a16" and group is None)
    limits = (FUSED_LIMIT, FUSED_LIMIT) if same else (ROUNDED_LIMIT, ROUNDED_TOKEN_LIMIT)
    return Sample(*tokens, expected, *limits, seed, time.monotonic() - started)


def require_agreement(
    prefix: str, kernel: str, runner: ExpertRunner, sample: Sample, group: dist.ProcessGroup | None = None
) -> float:
    """Run the sample; returns the largest relative L2 difference of a token, `Refusal` when it is above the sample's limit.

    Call it after `expect`, on every rank of `group`.
    """
    got = _call(runner, (sample.hidden_states, sample.topk_ids, sample.topk_weights), group)
    if got.shape != sample.expected.shape:
        raise Refusal(f"{prefix}: {kernel} returned {list(got.shape)} for {list(sample.expected.shape)}: do not serve with it.")
    difference, size = (got.double() - sample.expected.double()).norm(dim=1), sample.expected.double().norm(dim=1)
    relative = torch.where((size == 0) & (difference == 0), 0.0, difference / size)  # no expert here: exact zeros are wanted
    error, median = float(relative.max()), float(relative.median())
    if not (error <= sample.token_limit and median <= sample.limit):  # NaN is no agreement either
        raise Refusal(
            f"{prefix}: {kernel} differs from the reference by {error:.2g} (median {median:.2g}) on {NUM_TOKENS} tokens of seed "
            f"{sample.seed}, and up to {sample.token_limit:.2g} ({sample.limit:.2g}) is rounding (relative L2 of a token): this "
            "machine computes something else, so use HOPPER_MOE_KERNEL=reference and report it, or serve regardless with "
            "HOPPER_MOE_SELF_CHECK=0."
        )
    return error


def _reference_runner(checkpoint: ExpertSource, shard: ExpertShard) -> ReferenceRunner:
    runner = ReferenceRunner()
    runner.prepare(checkpoint, shard)
    return runner


def _call(runner: ExpertRunner, tokens: tuple[torch.Tensor, ...], group: dist.ProcessGroup | None) -> torch.Tensor:
    return runner.run(*tokens) if group is None else runner.run_across_ranks(*tokens, group)
