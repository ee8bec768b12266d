"""Everything about a launch that can be known before weights load: one report, and one sentence per reason to refuse.

Whether model and arguments fit is the plugin's own verdict (`moe_backends/sglang/verdict.py`); GPUs and memory are added here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from hopper_moe.kernels.device import SM90, is_sm90
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.kernels.workspace import workspace_bytes
from hopper_moe.launch import rank_memory
from hopper_moe.launch.machine import GIB, Gpu, Machine
from hopper_moe.launch.model_facts import LaunchedModel, read_model
from hopper_moe.launch.ports import port_refusals
from hopper_moe.launch.sglang_args import Launch, parse
from hopper_moe.moe_backends.env import Settings
from hopper_moe.moe_backends.kernel_specs import KernelSpec
from hopper_moe.moe_backends.sglang.config_reader import reader_refusal
from hopper_moe.moe_backends.sglang.group_rules import exchange_reason
from hopper_moe.moe_backends.sglang.plan import FUSED_EXCHANGE, ServingPlan
from hopper_moe.moe_backends.sglang.stages import stage_layers
from hopper_moe.moe_backends.sglang.startup import block_memory
from hopper_moe.moe_backends.sglang.verdict import Verdict, judge
from hopper_moe.quantization.checkpoint_location import ModelSource
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.model_facts import ModelFacts


@dataclass(frozen=True)
class Report:
    """Result of the checks: lines for the log, and sentences that each stop the launch."""

    verdict: Verdict
    lines: tuple[str, ...]
    refusals: tuple[str, ...]


def check_command(model: str, arguments: list[str], machine: Machine, settings: Settings) -> tuple[Launch, Report]:
    """Everything that is known before weights load, from a command line: `serve` refuses by it, `doctor` prints it.

    Raises `Refusal` when the arguments or the model cannot be read, so that there is nothing to report.
    """
    launch = parse(model, arguments)
    args = launch.view.args
    loaded = read_model(model, revision=args.revision, download_dir=args.download_dir, load_format=args.load_format)
    report = check(launch, loaded, machine, settings)
    refusals = (*report.refusals, *port_refusals(args.host, args.port)) or incomplete(loaded)
    if not refusals and (problem := reader_refusal(ModelSource(model, args.revision), trust_remote_code=args.trust_remote_code)):
        refusals = (problem,)
    return launch, replace(report, refusals=refusals)


def incomplete(model: LaunchedModel) -> tuple[str, ...]:
    """What keeps the weights on this machine from being loaded, if anything."""
    try:
        model.require_complete()
    except Refusal as refusal:
        return (str(refusal),)
    return ()


def check(launch: Launch, model: LaunchedModel, machine: Machine, settings: Settings) -> Report:
    """Check a launch on Hopper GPUs against machine, model and settings. Pure: takes no memory and starts nothing."""
    facts = model.facts
    used, refusals = _used_gpus(launch, machine)
    device = used[0].device if used else None
    verdict = judge(launch.view, facts, settings, machine.capability, device)
    refusals = [*verdict.refusals, *refusals]
    lines = [model_line(facts)]
    if verdict.choice is not None:
        lines.append(f"kernel   {verdict.choice.spec.name}: {verdict.choice.reason}")
    if verdict.decided is not None:
        spec, shard, plan = verdict.decided
        lines.append(_ranks_line(launch, spec))
        if not verdict.refusals:
            lines += _place_lines(launch, spec, facts)
        refusals += _gpu_refusals(launch, machine, used, spec, _exchanging_ranks(shard, plan))
        if not refusals:
            stages = rank_memory.of_stages(launch.view, spec, settings, model, launch.model)
            for stage, found in stages.items():
                lines.append(rank_memory.weights_line(found, f" of stage {stage}" if launch.view.args.pp_size > 1 else ""))
                mine = [machine.gpus[number] for number, of in launch.gpu_stages if of == stage]
                refusals += rank_memory.memory_refusals(mine, found)
    return Report(verdict, tuple(lines), tuple(refusals))


def model_line(facts: ModelFacts) -> str:
    return (
        f"model    {facts.architecture}: {facts.num_moe_layers} MoE layers, hidden {facts.hidden_size}, "
        f"intermediate {facts.intermediate_size}, {facts.num_experts} experts, top {facts.top_k}, "
        f"{facts.expert_dtype} experts, swiglu_limit {facts.swiglu_limit}"
    )


def _ranks_line(launch: Launch, spec: KernelSpec) -> str:
    view, args = launch.view, launch.view.args
    line = f"ranks    tensor parallel {args.tp_size}, expert parallel {view.ep_size(spec)}"
    more = (("pipeline stages", args.pp_size), ("replicas", view.num_replicas), ("hosts", args.nnodes))
    return line + "".join(f", {name} {size}" for name, size in more if size > 1)


def _place_lines(launch: Launch, spec: KernelSpec, facts: ModelFacts) -> list[str]:
    """What of the launch is on this host, if it is not all, and what moves tokens between ranks."""
    view, args, lines = launch.view, launch.view.args, []
    layers = stage_layers(facts.num_layers, args.pp_size, os.environ)
    for stage in view.local_stages if args.pp_size * args.nnodes > 1 else ():
        gpus = sorted(number for number, of in launch.gpu_stages if of == stage)
        lines.append(
            f"stage    {stage} of 0..{args.pp_size - 1} on host {args.node_rank} of 0..{args.nnodes - 1}: layers "
            f"{_span(layers[stage])}, ranks {_span(view.local_ranks)} of {args.tp_size}, GPUs {', '.join(map(str, gpus))}"
        )
    if args.tp_size > 1:
        lines.append(f"exchange {exchange_reason(view, spec)}")
    return lines


def _span(numbers: range) -> str:
    return f"{numbers.start}..{numbers.stop - 1}"


def workspace_line(verdict: Verdict, settings: Settings) -> str | None:
    """What the kernel takes besides weights. Compiles it if the cache lacks it: once, before ranks could wait for each other.

    Raises `Refusal` without a compiler. None for a kernel without a workspace.
    """
    if verdict.decided is None:
        return None
    spec, shard, plan = verdict.decided
    if spec.library is None:
        return None
    shard = replace(
        shard, max_tokens_per_rank=plan.capacity, fp8_combine=settings.fp8_combine, fp4_dispatch=settings.fp4_dispatch
    )
    num_ranks = _exchanging_ranks(shard, plan)
    num_bytes = workspace_bytes(shard, spec.library, num_ranks=num_ranks)
    name = f"exchange buffer over {num_ranks} ranks" if num_ranks > 1 else "workspace"
    blocks = block_memory(shard, plan)
    return f"memory   {num_bytes / GIB:.2f} GiB of {name} per rank, for {plan.capacity} tokens a call{blocks}; kernel compiled"


def _exchanging_ranks(shard: ExpertShard, plan: ServingPlan) -> int:
    """Ranks that share one call of the kernel."""
    return shard.num_ranks if plan.exchange == FUSED_EXCHANGE else 1


def _used_gpus(launch: Launch, machine: Machine) -> tuple[list[Gpu], list[str]]:
    """(the GPUs that this launch puts ranks on, why it cannot)."""
    args, visible = launch.view.args, len(machine.gpus)
    if launch.num_gpus > visible:
        sizes = [("--tp-size", args.tp_size), ("--pp-size", args.pp_size), ("--dp-size", launch.view.num_replicas)]
        given = " x ".join(f"{flag} {size}" for flag, size in sizes if size > 1) or "a launch"
        hosts = f" on each of {args.nnodes} hosts" if args.nnodes > 1 else ""
        return [], [
            f"{given} needs {launch.num_gpus} GPU{'s' * (launch.num_gpus > 1)}{hosts}, but {visible} are visible: use fewer or "
            "set CUDA_VISIBLE_DEVICES."
        ]
    highest = max(launch.gpu_ids)
    if highest >= visible:
        return [], [
            f"--base-gpu-id {args.base_gpu_id} and --gpu-id-step {args.gpu_id_step} put a rank on GPU {highest}, but {visible} "
            "are visible: use fewer ranks or other numbers."
        ]
    return [machine.gpus[number] for number in launch.gpu_ids], []


def _gpu_refusals(launch: Launch, machine: Machine, used: list[Gpu], spec: KernelSpec, exchanging_ranks: int) -> list[str]:
    others = [
        f"GPU {gpu.index} ({gpu.name}, {gpu.capability[0]}.{gpu.capability[1]})" for gpu in used if not is_sm90(gpu.capability)
    ]
    refusals = []
    if spec.capability == SM90 and others:
        refusals.append(
            f"{spec.name} needs Hopper GPUs only, but there is {', '.join(others)}: hide it with CUDA_VISIBLE_DEVICES."
        )
    if spec.library is not None:  # a GPU that is too small would stop at its first call
        refusals += dict.fromkeys(said for gpu in used for said in gpu.device.refusals(exchanging_ranks))
    group_of = {gpu.index: place // launch.view.args.tp_size for place, gpu in enumerate(used)}
    blocked = [(i, j) for i, j in machine.blocked_peers if i in group_of and j in group_of and group_of[i] == group_of[j]]
    if exchanging_ranks > 1 and blocked:
        pairs = ", ".join(f"{i}->{j}" for i, j in blocked)
        refusals.append(
            f"GPUs {pairs} cannot address each other's memory, which {spec.name} needs: use GPUs of one NVLink domain."
        )
    return refusals
