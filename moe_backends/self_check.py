"""Self-check before serving: one real layer of this rank, run by its runner and compared with the reference.

The reference uses the checkpoint's tensors *before* they are converted, so a wrong conversion, kernel, expert id or scale is
detected. A difference above the limit refuses the launch.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from hopper_moe.kernels import reference
from hopper_moe.moe_backends.runners.reference import ReferenceRunner
from hopper_moe.quantization.errors import Refusal

if TYPE_CHECKING:
    import torch.distributed as dist

    from hopper_moe.kernels.reference_weights import ExpertSource
    from hopper_moe.kernels.shard import ExpertShard
    from hopper_moe.moe_backends.runner import ExchangingRunner, ExpertRunner

NUM_TOKENS = 6
FUSED_LIMIT = 5e-2
"""Largest relative L2 of a token between a kernel and the function that it implements. 0.8-1.7e-2 was measured for the fused
kernel (tensor cores round sums, which moves values over E4M3 rounding borders); a wrong factor, id, row or matrix gives 0.25 or
more."""


@functools.cache
def _seen() -> set[tuple[str, type | None, ExpertShard]]:
    return set()


def is_first(kernel: str, experts_type: type | None, shard: ExpertShard) -> bool:
    """True once per process for each kind of layer: layers of one kind differ in their weights only. `experts_type`: how they
    are stored; None: as in the checkpoint."""
    new = (kernel, experts_type, shard) not in _seen()
    _seen().add((kernel, experts_type, shard))
    return new


@dataclass(frozen=True)
class Sample:
    """Tokens of one rank and the expected result of the layer."""

    hidden_states: torch.Tensor  # bf16 [NUM_TOKENS, hidden_size]
    topk_ids: torch.Tensor  # int32 [NUM_TOKENS, top_k], global
    topk_weights: torch.Tensor  # float32 [NUM_TOKENS, top_k]
    expected: torch.Tensor  # [NUM_TOKENS, hidden_size]
    seed: int
    seconds: float  # that the expectation took


def draw(shard: ExpertShard, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden_states, topk_ids, topk_weights) for one rank.

    Normal activations with outlier features and one large token, routed as the layer's top-k does it (distinct experts, weights
    that sum to one): to experts of this rank first, the last token anywhere and partly masked.
    """
    # Types are named: while SGLang loads a model, torch's default is BF16.
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float32, "device": "cpu"}
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
    definition: str,
    checkpoint: ExpertSource,
    shard: ExpertShard,
    device: torch.device,
    seed: int | None = None,
) -> Sample:
    """Draw tokens and compute what a kernel must give for them, from the checkpoint's own tensors.

    With a group in the shard all its ranks call this.

    Args:
        definition: what the kernel computes (`KernelSpec.definition`): "moe_layer" or "w4a16".
        seed: of the tokens; None: a fresh one.
    """
    started, seed = time.monotonic(), time.time_ns() % (1 << 31) if seed is None else seed
    tokens = draw(shard, device, seed)
    if definition == "moe_layer":
        runner = ReferenceRunner()
        runner.prepare(checkpoint, shard)
        expected = _call(runner, tokens, shard.group)
    else:
        function = getattr(reference, definition)
        expected = function(*tokens, checkpoint, swiglu_limit=shard.swiglu_limit, first_expert=shard.first_expert)
    return Sample(*tokens, expected, seed, time.monotonic() - started)


def require_agreement(
    prefix: str, kernel: str, runner: ExpertRunner, sample: Sample, group: dist.ProcessGroup | None = None
) -> float:
    """Run the sample; returns the largest relative L2 difference of a token, `Refusal` when it is above FUSED_LIMIT.

    Call it after `expect`, on every rank of `group`.
    """
    got = _call(runner, (sample.hidden_states, sample.topk_ids, sample.topk_weights), group)
    if got.shape != sample.expected.shape:
        raise Refusal(f"{prefix}: {kernel} returned {list(got.shape)} for {list(sample.expected.shape)}: do not serve with it.")
    difference, size = (got.double() - sample.expected.double()).norm(dim=1), sample.expected.double().norm(dim=1)
    relative = torch.where((size == 0) & (difference == 0), 0.0, difference / size)  # no expert here: exact zeros are wanted
    error = float(relative.max())
    if not error <= FUSED_LIMIT:  # NaN is no agreement either
        raise Refusal(
            f"{prefix}: {kernel} differs from the reference by {error:.2g} on {NUM_TOKENS} tokens of seed {sample.seed}, and up "
            f"to {FUSED_LIMIT:.2g} is rounding (relative L2 of a token): this machine computes something else, so use "
            "HOPPER_MOE_KERNEL=reference and report it, or serve regardless with HOPPER_MOE_SELF_CHECK=0."
        )
    return error


def _call(
    runner: ExpertRunner, tokens: tuple[torch.Tensor, torch.Tensor, torch.Tensor], group: dist.ProcessGroup | None
) -> torch.Tensor:
    if group is None:
        return runner.run(*tokens)
    return cast("ExchangingRunner", runner).run_across_ranks(*tokens, group)  # only such a kernel's shard has a group
