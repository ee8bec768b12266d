"""Everything about a launch that can be known before weights load: one report, and one sentence per reason to refuse."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hopper_moe.kernels.tile_table import table_for
from hopper_moe.launch.machine import GIB, HOPPER, Machine
from hopper_moe.launch.model_facts import ModelFacts
from hopper_moe.launch.sglang_args import LaunchPlan
from hopper_moe.moe_backends.arguments import ARCHITECTURES, DEFAULT_CAPACITY
from hopper_moe.moe_backends.env import Settings
from hopper_moe.moe_backends.env_table import AUTO
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.moe_backends.registry import Choice, LayerShape, choose, layer_refusals

RESERVE_BYTES = 4 * GIB  # CUDA context, NCCL, graphs and the smallest useful KV cache: below this SGLang fails after loading


@dataclass(frozen=True)
class Report:
    """Result of the checks: lines for the log, and sentences that each stop the launch."""

    choice: Choice | None
    lines: tuple[str, ...]
    refusals: tuple[str, ...]
    shape: LayerShape | None = None  # one layer as one rank holds it
    exchanges: bool = False  # whether the kernel itself moves tokens between ranks
    capacity: int = DEFAULT_CAPACITY  # tokens of one kernel call, as far as it is known before SGLang fills in its defaults


def check(plan: LaunchPlan, facts: ModelFacts, machine: Machine, settings: Settings) -> Report:
    """Check a launch against machine, model and settings. Pure: takes no memory and starts nothing."""
    try:
        choice = choose(settings, machine.capability)
    except Refusal as refusal:
        return Report(None, (), (str(refusal),))
    shape, shape_refusals = _rank_shape(plan, facts, choice, settings)
    if settings.kernel == AUTO and machine.gpus:
        try:
            choice = choose(settings, machine.capability, device_name=machine.gpus[0].name, layer=shape)
        except Refusal as refusal:
            return Report(None, (), (*shape_refusals, str(refusal)), shape)
    if facts.architecture not in ARCHITECTURES:
        shape_refusals.append(
            f"{facts.architecture} is not served here, only {', '.join(ARCHITECTURES)}: use `sglang serve` for it."
        )
    refusals = shape_refusals + layer_refusals(choice.spec, shape)
    refusals += _gpu_refusals(plan, machine, choice)
    refusals += _tile_refusals(machine, choice)
    refusals += _capacity_refusals(plan, settings) if _exchanges(plan, choice) else []
    lines = [
        f"model    {facts.architecture}: {facts.num_moe_layers} MoE layers, hidden {facts.hidden_size}, "
        f"intermediate {facts.intermediate_size}, {facts.num_experts} experts, top {facts.top_k}, "
        f"{facts.expert_dtype} experts, swiglu_limit {facts.swiglu_limit}",
        f"kernel   {choice.spec.name}: {choice.reason}",
        _ranks_line(plan, shape),
    ]
    if not refusals:
        largest_stage = replace(facts, num_moe_layers=-(-facts.num_moe_layers // plan.pp_size))
        expert_bytes = expert_bytes_per_rank(largest_stage, shape.ep_size, shape.intermediate_size, shape.expert_dtype)
        lines.append(f"memory   {expert_bytes / GIB:.2f} GiB of packed expert weights per rank")
        refusals += _memory_refusals(plan, machine, expert_bytes)
    exchanges = _exchanges(plan, choice)
    chunk = plan.chunked_prefill_size if exchanges else None  # else a larger chunk runs in pieces
    capacity = settings.max_tokens_per_rank or chunk or DEFAULT_CAPACITY
    return Report(choice, tuple(lines), tuple(refusals), shape, exchanges, capacity)


def _ranks_line(plan: LaunchPlan, shape: LayerShape) -> str:
    line = f"ranks    tensor parallel {plan.tp_size}, expert parallel {shape.ep_size}"
    more = (("pipeline stages", plan.pp_size), ("replicas", plan.dp_size))
    return line + "".join(f", {name} {size}" for name, size in more if size > 1)


def workspace_line(report: Report, settings: Settings) -> str | None:
    """What the kernel takes besides weights. Compiles it if the cache lacks it: once, before ranks could wait for each other.

    Raises `Refusal` without a compiler. None for a kernel without a workspace.
    """
    if report.choice is None or report.choice.spec.library is None or report.shape is None:
        return None
    from hopper_moe.kernels.mega_moe import workspace_bytes

    shape, capacity = report.shape, report.capacity
    num_bytes = workspace_bytes(
        num_tokens_capacity=capacity,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        num_local_experts=shape.num_experts // shape.ep_size,
        num_ranks=shape.ep_size if report.exchanges else 1,
        fp8_combine=settings.fp8_combine,
        fp4_dispatch=settings.fp4_dispatch,
        library=report.choice.spec.library,
    )
    name = f"exchange buffer over {shape.ep_size} ranks" if report.exchanges and shape.ep_size > 1 else "workspace"
    return f"memory   {num_bytes / GIB:.2f} GiB of {name} per rank, for {capacity} tokens a call; kernel compiled"


def expert_bytes_per_rank(facts: ModelFacts, ep_size: int, intermediate_size: int, expert_dtype: str = "fp4") -> int:
    """Bytes of one rank's packed experts over all MoE layers (drafts included), as the kernel gets them: "fp4" or "fp8"."""
    from hopper_moe.quantization.layout import fp8_expert_bytes, packed_expert_bytes

    of_one = fp8_expert_bytes if expert_dtype == "fp8" else packed_expert_bytes
    return facts.num_moe_layers * (facts.num_experts // ep_size) * of_one(facts.hidden_size, intermediate_size)


def _exchanges(plan: LaunchPlan, choice: Choice) -> bool:
    """Whether the kernel itself moves tokens between ranks (then experts spread over all ranks), as the plugin will decide it."""
    return plan.moe_a2a_backend == "megamoe" or (choice.spec.multi_rank and plan.attn_dp_size > 1)


def _rank_shape(plan: LaunchPlan, facts: ModelFacts, choice: Choice, settings: Settings) -> tuple[LayerShape, list[str]]:
    """What one rank holds. A kernel that exchanges tokens spreads experts over all ranks; otherwise --ep-size counts."""
    refusals = []
    exchanges = _exchanges(plan, choice)
    if exchanges and plan.tp_size > 1 and not choice.spec.multi_rank:
        refusals.append(
            f"--moe-a2a-backend megamoe: {choice.spec.name} exchanges no tokens between ranks in this release, leave it out."
        )
    if exchanges and plan.ep_size not in (1, plan.tp_size):
        refusals.append(
            f"--ep-size {plan.ep_size}: {choice.spec.name} spreads experts over all {plan.tp_size} ranks, leave it out."
        )
    ep_size = plan.tp_size if exchanges else plan.ep_size
    moe_tp = plan.tp_size // ep_size
    if moe_tp > 1 and facts.intermediate_size % moe_tp:
        refusals.append(
            f"intermediate size {facts.intermediate_size} does not divide by {moe_tp} tensor-parallel ranks: "
            f"use --ep-size {plan.tp_size}."
        )
    # Without weights at hand (a Hugging Face id) the type is known only to SGLang's loader, which asks the kernel again.
    dtype = choice.spec.expert_dtype if facts.expert_dtype == "unknown" else facts.expert_dtype
    if settings.expand_fp4 and dtype == "fp4":
        dtype = "fp8"
    shape = LayerShape(facts.hidden_size, facts.intermediate_size // moe_tp, facts.num_experts, facts.top_k, dtype, ep_size)
    return shape, refusals


def _gpu_refusals(plan: LaunchPlan, machine: Machine, choice: Choice) -> list[str]:
    if choice.spec.capability is None and not machine.gpus:
        return []
    if plan.num_gpus > len(machine.gpus):
        given = [("--tp-size", plan.tp_size), ("--pp-size", plan.pp_size), ("--dp-size", plan.dp_size)]
        sizes = " x ".join(f"{flag} {size}" for flag, size in given if size > 1)
        return [
            f"{sizes} needs {plan.num_gpus} GPUs, but {len(machine.gpus)} are visible: "
            "use fewer or set CUDA_VISIBLE_DEVICES."
        ]
    if max(plan.gpu_ids) >= len(machine.gpus):
        return [
            f"--base-gpu-id {plan.base_gpu_id} and --gpu-id-step {plan.gpu_id_step} put a rank on GPU {max(plan.gpu_ids)}, but "
            f"{len(machine.gpus)} are visible: use fewer ranks or other numbers."
        ]
    used = [machine.gpus[number] for number in plan.gpu_ids]
    others = [
        f"GPU {gpu.index} ({gpu.name}, {gpu.capability[0]}.{gpu.capability[1]})" for gpu in used if gpu.capability != HOPPER
    ]
    refusals = []
    if choice.spec.capability == HOPPER and others:
        refusals.append(
            f"{choice.spec.name} needs Hopper GPUs only, but there is {', '.join(others)}: hide it with CUDA_VISIBLE_DEVICES."
        )
    group_of = {number: place // plan.tp_size for place, number in enumerate(plan.gpu_ids)}
    blocked = [(i, j) for i, j in machine.blocked_peers if i in group_of and j in group_of and group_of[i] == group_of[j]]
    if _exchanges(plan, choice) and blocked:
        pairs = ", ".join(f"{i}->{j}" for i, j in blocked)
        refusals.append(
            f"GPUs {pairs} cannot address each other's memory, which {choice.spec.name} needs: use GPUs of one NVLink domain."
        )
    return refusals


def _tile_refusals(machine: Machine, choice: Choice) -> list[str]:
    """A Hopper GPU that the kernel has no tile table for stops at its first layer, so it stops here."""
    if choice.spec.library is None or not machine.gpus:
        return []
    try:
        table_for(machine.gpus[0].name)
    except Refusal as refusal:
        return [str(refusal)]
    return []


def _capacity_refusals(plan: LaunchPlan, settings: Settings) -> list[str]:
    capacity, chunk = settings.max_tokens_per_rank, plan.chunked_prefill_size
    if capacity is None or chunk is None or capacity >= chunk:
        return []
    return [
        f"HOPPER_MOE_MAX_TOKENS_PER_RANK={capacity} is below the {chunk} tokens that --chunked-prefill-size gives a rank: "
        f"raise it to {chunk} or unset it."
    ]


def _memory_refusals(plan: LaunchPlan, machine: Machine, expert_bytes: int) -> list[str]:
    used = [machine.gpus[number] for number in plan.gpu_ids] if machine.gpus else []
    short = [gpu for gpu in used if expert_bytes + RESERVE_BYTES > gpu.free_bytes]
    return [
        f"GPU {gpu.index} has {gpu.free_bytes / GIB:.1f} GiB free, but the experts alone need {expert_bytes / GIB:.1f} GiB and "
        f"{RESERVE_BYTES // GIB} GiB must stay free: use more GPUs (--tp-size, --pp-size) or end what runs there."
        for gpu in short
    ]
