"""Whether a launch may run, for `serve` and `doctor`. The plugin's hooks raise the first of the same refusals."""

from __future__ import annotations

from dataclasses import dataclass

from hopper_moe.kernels.device import Device
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends.env import Settings
from hopper_moe.moe_backends.env_table import AUTO
from hopper_moe.moe_backends.kernel_specs import KernelSpec
from hopper_moe.moe_backends.registry import Choice, choose
from hopper_moe.moe_backends.sglang.early_rules import early_refusals
from hopper_moe.moe_backends.sglang.late_rules import division_refusals, expert_dtype, late_refusals, rank_shard, serving_plan
from hopper_moe.moe_backends.sglang.launch_view import LaunchView
from hopper_moe.moe_backends.sglang.plan import DEEPEP_EXCHANGE, FUSED_EXCHANGE, ServingPlan
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.model_facts import ModelFacts


@dataclass(frozen=True)
class Verdict:
    """The chosen kernel, its plan, and every refusal of the launch."""

    choice: Choice | None  # None: no kernel runs here
    shard: ExpertShard | None
    plan: ServingPlan | None
    refusals: tuple[str, ...]

    @property
    def decided(self) -> tuple[KernelSpec, ExpertShard, ServingPlan] | None:
        """What would run; None: refused before it was known."""
        if self.choice is None or self.shard is None or self.plan is None:
            return None
        return self.choice.spec, self.shard, self.plan


def choose_for_model(
    early: Choice,
    view: LaunchView,
    model: ModelFacts,
    settings: Settings,
    capability: tuple[int, int] | None,
    device: Device | None,
) -> Choice:
    """`early`, or with `auto` the kernel that the measured table prefers for this layer."""
    if settings.kernel != AUTO:
        return early
    choice = choose(
        settings,
        capability,
        device=device,
        shard=rank_shard(view, early.spec, model),
        expert_dtype=expert_dtype(model, settings),
        prefill_only=view.args.disaggregation_mode == "prefill",
    )
    # Arguments declared before the model was known depend on CUDA graphs and on whether the kernel exchanges tokens (DeepEP may
    # stand in for it between hosts).
    exchanges = view.exchange(early.spec) in (FUSED_EXCHANGE, DEEPEP_EXCHANGE)
    other_exchange = exchanges and choice.spec.multi_rank != early.spec.multi_rank
    depends_on_batch = view.asks_for_determinism is not None and not choice.spec.batch_invariant
    return early if other_exchange or depends_on_batch or choice.spec.capturable != early.spec.capturable else choice


def judge(
    view: LaunchView,
    model: ModelFacts,
    settings: Settings,
    capability: tuple[int, int] | None,
    device: Device | None,
) -> Verdict:
    """Every refusal of a launch that SGLang has not resolved yet. `capability`, `device`: of its GPUs; None: no GPU."""
    try:
        early = choose(settings, capability)
    except Refusal as refusal:
        return Verdict(None, None, None, (str(refusal),))
    refusals = list(early_refusals(view, early.spec, settings)) or list(division_refusals(view, early.spec, model))
    if refusals:
        return Verdict(early, None, None, tuple(refusals))
    try:
        choice = choose_for_model(early, view, model, settings, capability, device)
    except Refusal as refusal:
        return Verdict(early, None, None, (str(refusal),))
    spec = choice.spec
    refusals = list(late_refusals(view, spec, settings, model))
    return Verdict(choice, rank_shard(view, spec, model), serving_plan(view, spec, settings), tuple(refusals))
