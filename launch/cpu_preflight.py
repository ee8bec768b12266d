"""Checks before the embedded CPU host loads weights. `serve` refuses by their report, `doctor` prints it."""

from __future__ import annotations

from dataclasses import dataclass

from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.launch.cpu_arguments import CpuArguments
from hopper_moe.launch.machine import GIB, Machine
from hopper_moe.launch.model_facts import LaunchedModel, read_model
from hopper_moe.launch.ports import port_refusals
from hopper_moe.launch.preflight import incomplete, model_line
from hopper_moe.moe_backends.env import Settings
from hopper_moe.moe_backends.registry import Choice, choose, layer_refusals
from hopper_moe.moe_backends.sglang.late_rules import expert_dtype, model_refusals
from hopper_moe.moe_backends.sglang.plan import BACKEND, DEFAULT_CAPACITY
from hopper_moe.quantization.checkpoint_memory import RankLayout, weights_per_rank
from hopper_moe.quantization.errors import Refusal


@dataclass(frozen=True)
class CpuReport:
    """What would be served and by which kernel, lines for the log, and sentences that each stop the launch."""

    model: LaunchedModel
    choice: Choice
    lines: tuple[str, ...]
    refusals: tuple[str, ...]


def goes_to_gpu(cpu: CpuArguments, machine: Machine) -> bool:
    """Whether SGLang serves a launch on this machine's Hopper GPUs; else the CPU host does. Raises `Refusal` if neither may."""
    if cpu.device == "cuda" and not machine.is_hopper:
        raise Refusal("--device cuda is given, but no Hopper GPU is visible: leave it out to serve on the CPU.")
    return machine.is_hopper and cpu.device != "cpu"


def check_command(model: str, cpu: CpuArguments, settings: Settings) -> CpuReport:
    """Check a launch of the CPU host. Raises `Refusal` when the model cannot be read or no kernel runs on a CPU."""
    if cpu.moe_runner_backend != BACKEND:
        raise Refusal(f"--moe-runner-backend {cpu.moe_runner_backend} is not this plugin: leave it out or use `sglang serve`.")
    cpu.require_weights()
    loaded = read_model(model, revision=cpu.revision, download_dir=cpu.download_dir)
    facts, choice = loaded.facts, choose(settings, None)
    shard = ExpertShard.of(facts, DEFAULT_CAPACITY)
    refusals = (*model_refusals(facts), *layer_refusals(choice.spec, shard, expert_dtype(facts, settings)))
    lines = [model_line(facts), f"kernel   {choice.spec.name}: {choice.reason}"]
    if not refusals:
        num_bytes = weights_per_rank(facts, None, RankLayout(expand_fp4=settings.expand_fp4)).experts
        lines.append(f"memory   {num_bytes / GIB:.2f} GiB of packed expert weights")
    refusals = (*refusals, *port_refusals(cpu.host, cpu.port)) or incomplete(loaded)
    if not refusals and loaded.folder is None:
        fetch = f"{model} is not on this machine as a whole, and the CPU host fetches no weights: run `hf download {model}`."
        refusals = (fetch,)
    return CpuReport(loaded, choice, tuple(lines), refusals)
