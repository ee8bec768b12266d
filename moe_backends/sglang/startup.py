"""Start-up report of a worker: the plan when its first layer is built, totals when the first layer runs."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from hopper_moe.kernels import workspace
from hopper_moe.kernels.expert_blocks import most_rows
from hopper_moe.moe_backends.env import Settings, settings
from hopper_moe.moe_backends.kernel_specs import KernelSpec
from hopper_moe.moe_backends.registry import create_runner
from hopper_moe.moe_backends.sglang.plan import DEEPEP_EXCHANGE, FUSED_EXCHANGE

if TYPE_CHECKING:
    from hopper_moe.kernels.shard import ExpertShard
    from hopper_moe.moe_backends.sglang.plan import ServingPlan

logger = logging.getLogger("hopper_moe")

GIB = 1 << 30


def tensor_bytes(experts: Any) -> int:
    """Bytes of a dataclass of tensors (`ExpertTensors`)."""
    return sum(getattr(experts, f.name).nbytes for f in fields(experts))


def workspace_bytes(spec: KernelSpec, shard: ExpertShard) -> int:
    """Device bytes that a kernel takes besides weights, once for all layers; 0 for kernels without. Compiles it if need be."""
    return 0 if spec.library is None else workspace.workspace_bytes(shard, spec.library)


def plan_lines(spec: KernelSpec, shard: ExpertShard, plan: ServingPlan, settings: Settings, device: torch.device) -> list[str]:
    """Lines of the start-up report: machine, kernel, shape, ranks, memory, and what replaces silent fallbacks."""
    layer_bytes = shard.num_local_experts * tensor_bytes(
        create_runner(spec.name).experts_type.empty(1, shard.hidden_size, shard.intermediate_size, "meta")
    )
    buffer_bytes = workspace_bytes(spec, shard.alone() if plan.exchange == DEEPEP_EXCHANGE else shard)
    larger = "refused" if plan.exchange == FUSED_EXCHANGE else "run in pieces"
    inexact = {
        "refuse": "refused",
        "reference": "run on the exact reference (slow)",
        "round": "rounded where they do not fit",
    }[settings.inexact_rows]
    last = shard.first_expert + shard.num_local_experts - 1
    return [
        f"version  hopper_moe {importlib.metadata.version('sglang-hopper-moe')} on {_device_name(device)}",
        f"kernel   {spec.name}: {spec.summary}; {settings.sources['kernel']}",
        f"layer    hidden {shard.hidden_size}, intermediate {shard.intermediate_size} here, {shard.num_experts} experts, "
        f"top {shard.top_k}, swiglu_limit {shard.swiglu_limit}",
        f"ranks    this one holds experts {shard.first_expert}..{last}; "
        f"{shard.num_ranks} expert-parallel ranks, exchange {plan.exchange}",
        f"memory   {layer_bytes / GIB:.2f} GiB of experts a layer, {buffer_bytes / GIB:.2f} GiB of workspace "
        f"for {shard.max_tokens_per_rank} tokens a call{block_memory(shard, plan)}",
        f"fallback none: larger calls are {larger}, layers that the format cannot hold exactly are {inexact}, "
        f"self-check {'on' if settings.self_check else 'OFF'}",
    ]


def block_memory(shard: ExpertShard, plan: ServingPlan) -> str:
    """What a call in DeepEP's low-latency mode takes besides, for the end of a line about memory; empty where it is not used."""
    if not plan.block_rows:
        return ""
    rows = shard.num_local_experts * plan.block_rows
    listed = most_rows(shard.num_local_experts, plan.block_rows, shard.top_k)
    num_bytes = 2 * (rows + listed) * shard.hidden_size * torch.bfloat16.itemsize  # there and back
    return f", {num_bytes / GIB:.2f} GiB for {rows} rows in low-latency mode beside DeepEP's own buffers"


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    return f"{found.name} (SM{found.major}{found.minor}, {found.multi_processor_count} SMs)"


@functools.cache
def announce_plan(spec: KernelSpec, shard: ExpertShard, plan: ServingPlan, device: torch.device) -> None:
    """Log the report, once per process and kind of layer."""
    for line in plan_lines(spec, shard, plan, settings(), device):
        logger.info("start-up: %s", line)


@dataclass
class Ready:
    """Totals over the layers of this process that are ready."""

    num_layers: int = 0
    expert_bytes: int = 0
    errors: list[float] = field(default_factory=list)  # of the self-checks
    check_seconds: float = 0.0
    announced: bool = False

    def add(self, parameters: Iterable[torch.Tensor]) -> None:
        """Count a layer that was converted and prepared; `parameters`: its tensors on the device."""
        self.num_layers += 1
        self.expert_bytes += sum(parameter.nbytes for parameter in parameters)

    def checked(self, error: float, seconds: float) -> None:
        """Record a passed self-check: its relative L2 and duration."""
        self.errors.append(error)
        self.check_seconds += seconds

    def announce(self) -> bool:
        """Log the totals at the first call of any layer, when all are loaded. Later calls do nothing and return False."""
        if self.announced:
            return False
        self.announced = True
        checked = f"self-check {max(self.errors):.1e} in {self.check_seconds:.1f} s" if self.errors else "no self-check"
        logger.info(
            "start-up: ready    %d layers, %.2f GiB of packed experts on this rank, %s",
            self.num_layers,
            self.expert_bytes / GIB,
            checked,
        )
        return True


READY = Ready()
"""The totals of this process."""
