"""`hopper-moe doctor [MODEL]`: what works on this machine, one verdict per line. Loads no weights and compiles nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from hopper_moe.launch import cpu_arguments, cpu_preflight, preflight
from hopper_moe.launch import doctor_checks as checks
from hopper_moe.launch import machine as machines
from hopper_moe.launch.cpu_preflight import CpuReport
from hopper_moe.launch.doctor_checks import FAIL, NOTE, OK, Finding
from hopper_moe.launch.preflight import Report
from hopper_moe.moe_backends.env import Settings, settings
from hopper_moe.moe_backends.registry import choose
from hopper_moe.quantization.errors import Refusal

_COLOURS = {OK: "green", NOTE: "yellow", FAIL: "red"}


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("model", required=False)
@click.pass_context
def doctor(ctx: click.Context, model: str | None) -> None:
    """Say what works on this machine; with MODEL (and SGLang arguments) also whether that launch would work.

    Exit code 0: what this machine can do works; 1: at least one line failed.
    """
    machine = machines.detect()
    findings = []
    for finding in _look(machine, model, ctx.args):  # printed one by one: importing SGLang takes a while
        click.echo(click.style(f"{finding.verdict:<5}", fg=_COLOURS[finding.verdict]) + f"{finding.subject:<12} {finding.text}")
        findings.append(finding)
    failed = [finding.subject for finding in findings if finding.verdict == FAIL]
    if failed:
        click.echo(f"\nNot ready: {', '.join(dict.fromkeys(failed))}.")
        sys.exit(1)
    click.echo("\n" + _summary(machine, findings))


def _look(machine: machines.Machine, model: str | None, arguments: list[str]) -> Iterator[Finding]:
    yield checks.python_version()
    yield checks.torch_version()
    yield from checks.gpus(machine)
    yield from checks.peers(machine)
    yield checks.compiler(machine)
    yield checks.plugin()
    yield checks.cpu_host()
    yield checks.third_party_kernels()
    yield from checks.sglang()
    try:
        found = settings()
    except Refusal as refusal:
        yield Finding(FAIL, "environment", str(refusal))
        return
    yield Finding(OK, "environment", "every variable is understood")
    yield checks.cache(found)
    yield from checks.compiled()
    yield from _kernel(found, machine)
    if model:
        yield from _model(model, arguments, found, machine)


def _kernel(found: Settings, machine: machines.Machine) -> list[Finding]:
    try:
        choice = choose(found, machine.capability)
    except Refusal as refusal:
        return [Finding(FAIL, "kernel", str(refusal))]
    return [Finding(OK, "kernel", f"{choice.spec.name}: {choice.reason}")]


def _model(model: str, arguments: list[str], found: Settings, machine: machines.Machine) -> list[Finding]:
    try:
        report: Report | CpuReport
        cpu = cpu_arguments.read(arguments)
        if cpu_preflight.goes_to_gpu(cpu, machine):
            report = preflight.check_command(model, arguments, machine, found)[1]
        else:
            report = cpu_preflight.check_command(model, cpu, found)
    except Refusal as refusal:
        return [Finding(FAIL, "checkpoint", str(refusal))]
    findings = [Finding(OK, "checkpoint", " ".join(line.split())) for line in report.lines]
    return findings + [Finding(FAIL, "checkpoint", problem) for problem in report.refusals]


def _summary(machine: machines.Machine, findings: list[Finding]) -> str:
    notes = {finding.subject for finding in findings if finding.verdict == NOTE}
    here = ["`hopper-moe checkpoint`, the reference kernel from Python"]
    if machine.is_hopper and "sglang" not in notes:
        here.insert(0, "`hopper-moe serve MODEL` with SGLang and the fused kernel")
    elif "cpu host" not in notes:
        here.insert(0, "`hopper-moe serve MODEL` on the embedded CPU host (slow), `hopper-moe demo`")
    return "Ready. Works here: " + ", ".join(here) + "."
