"""`hopper-moe doctor [MODEL]`: what works on this machine, one verdict per line. Loads no weights and compiles nothing."""

from __future__ import annotations

import sys

import click

from hopper_moe.launch import doctor_checks as checks
from hopper_moe.launch import machine as machines
from hopper_moe.launch.doctor_checks import FAIL, NOTE, OK, Finding
from hopper_moe.launch.model_facts import read_model
from hopper_moe.launch.preflight import check
from hopper_moe.launch.sglang_args import parse
from hopper_moe.moe_backends.env import Settings, settings
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.moe_backends.registry import choose

_COLOURS = {OK: "green", NOTE: "yellow", FAIL: "red"}


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("model", required=False)
@click.pass_context
def doctor(ctx: click.Context, model: str | None) -> None:
    """Say what works on this machine; with MODEL (and SGLang arguments) also whether that launch would work.

    Exit code 0: what this machine can do works; 1: at least one line failed.
    """
    machine = machines.detect()
    findings = [
        checks.python_version(),
        checks.torch_version(),
        *checks.gpus(machine),
        *checks.peers(machine),
        checks.compiler(machine),
        *checks.sglang(machine),
        checks.plugin(),
        checks.cpu_host(),
        checks.third_party_kernels(),
    ]
    try:
        found_settings = settings()
    except Refusal as refusal:
        findings.append(Finding(FAIL, "environment", str(refusal)))
    else:
        findings += [Finding(OK, "environment", "every variable is understood"), checks.cache(found_settings)]
        findings += _kernel(found_settings, machine)
        if model:
            findings += _model(model, ctx.args, found_settings, machine)
    for finding in findings:
        click.echo(click.style(f"{finding.verdict:<5}", fg=_COLOURS[finding.verdict]) + f"{finding.subject:<12} {finding.text}")
    failed = [finding.subject for finding in findings if finding.verdict == FAIL]
    if failed:
        click.echo(f"\nNot ready: {', '.join(dict.fromkeys(failed))}.")
        sys.exit(1)
    click.echo("\n" + _summary(machine, findings))


def _kernel(found: Settings, machine: machines.Machine) -> list[Finding]:
    try:
        choice = choose(found, machine.capability)
    except Refusal as refusal:
        return [Finding(FAIL, "kernel", str(refusal))]
    return [Finding(OK, "kernel", f"{choice.spec.name}: {choice.reason}")]


def _model(model: str, arguments: list[str], found: Settings, machine: machines.Machine) -> list[Finding]:
    try:
        plan, problems = parse(model, arguments)
        if not machine.is_hopper:
            plan, machine = plan.on_one_process(), machines.Machine()
        report = check(plan, read_model(model), machine, found)
    except Refusal as refusal:
        return [Finding(FAIL, "checkpoint", str(refusal))]
    lines = [Finding(OK, "checkpoint", " ".join(line.split())) for line in report.lines]
    return lines + [Finding(FAIL, "checkpoint", problem) for problem in [*problems, *report.refusals]]


def _summary(machine: machines.Machine, findings: list[Finding]) -> str:
    notes = {finding.subject for finding in findings if finding.verdict == NOTE}
    here = ["`hopper-moe checkpoint`, the reference kernel from Python"]
    if machine.is_hopper and "sglang" not in notes:
        here.insert(0, "`hopper-moe serve MODEL` with SGLang and the fused kernel")
    elif "cpu host" not in notes:
        here.insert(0, "`hopper-moe serve MODEL` on the embedded CPU host (slow), `hopper-moe demo`")
    return "Ready. Works here: " + ", ".join(here) + "."
