"""Every kernel that can run a layer here, ours and other projects', on the same random layer: made, checked and called alike."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from hopper_moe.eval.layer_bench.baselines import BASELINES, create_baseline
from hopper_moe.kernels import reference
from hopper_moe.kernels.benchmarks.workload import Checkpoint, ModelShape
from hopper_moe.kernels.reference_weights import Mxfp4Experts
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends.kernel_specs import REGISTRY
from hopper_moe.moe_backends.registry import create_runner
from hopper_moe.moe_backends.runner import ExpertRunner
from hopper_moe.quantization.expert_tensors import ExpertTensors

OURS = tuple(spec.name for spec in REGISTRY.values() if spec.capturable)
KERNELS = (*OURS, *BASELINES)
MAX_ERROR = 0.1  # relative L2 against exact arithmetic; FP8 activations make 0.03 to 0.06


@dataclass(frozen=True)
class Contender:
    """One kernel with several copies of the same layer, so that calls in turn find cold weights."""

    name: str
    runners: Sequence[ExpertRunner]
    expert_bytes: int
    seconds: float  # to convert the weights, compile and tune

    def run(self, call: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.runners[call % len(self.runners)].run(x, ids, weights)


def create(name: str, sizes: tuple[int, ...] | None = None) -> ExpertRunner:
    """A new runner of one of `KERNELS`, or of the reference. Raises `Refusal` when it cannot be had. `sizes`: see `make`."""
    return create_baseline(name, sizes) if name in BASELINES else create_runner(name)


def fill(experts_type: type[ExpertTensors], checkpoint: Checkpoint) -> ExpertTensors:
    """A layer's checkpoint tensors in a kernel's format."""
    w13, _, w2, _ = checkpoint
    experts = experts_type.empty(w13.shape[0], w2.shape[1], w2.shape[2] * 2, w13.device)
    for expert in range(w13.shape[0]):
        experts.store(expert, *(tensor[expert] for tensor in checkpoint))
    return experts


def make(name: str, checkpoint: Checkpoint, shard: ExpertShard, copies: int, sizes: tuple[int, ...] | None = None) -> Contender:
    """Converts the layer for one kernel. Whatever the kernel raises passes through.

    `sizes`: batches that will be timed, for a baseline that measures its tiles first; None: it chooses.
    """
    started = time.monotonic()
    runners = [create(name, sizes)]
    experts = fill(runners[0].experts_type, checkpoint)
    tensors = [getattr(experts, field.name) for field in dataclasses.fields(experts)]
    runners[0].prepare(experts, shard)
    for _ in range(copies - 1):
        runners.append(create(name, sizes))
        runners[-1].prepare(type(experts)(*(tensor.clone() for tensor in tensors)), shard)
    torch.cuda.synchronize()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return Contender(name, runners, num_bytes // shard.num_local_experts, time.monotonic() - started)


def make_all(
    names: Iterable[str],
    checkpoint: Checkpoint,
    shard: ExpertShard,
    copies: int,
    sizes: tuple[int, ...] | None = None,
) -> tuple[list[Contender], dict[str, str]]:
    """(those that run here, name -> why not of the others). A kernel that fails does not stop the rest. `sizes`: see `make`."""
    made, left_out = [], {}
    for name in names:
        try:
            made.append(make(name, checkpoint, shard, copies, sizes))
        except Exception as error:  # other projects' code: anything may be raised
            left_out[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return made, left_out


def errors(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float, float]:
    """(relative L2, cosine, relative L2 of the worst token) of a result against the exact one, in FP64."""
    got, want = got.double(), want.double()
    relative = ((got - want).norm() / want.norm()).item()
    cosine = torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0).item()
    worst = ((got - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-30)).max().item()
    return relative, cosine, worst


def exact_result(
    checkpoint: Checkpoint, shape: ModelShape, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The layer in FP64 with activations that nobody rounds."""
    return reference.exact(x, ids, weights, Mxfp4Experts(*checkpoint), swiglu_limit=shape.swiglu_limit)
