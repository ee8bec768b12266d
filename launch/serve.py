"""`hopper-moe serve MODEL [sglang arguments]`: preflight, then stock SGLang on Hopper or the embedded host on a CPU machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import click

from hopper_moe.launch import machine as machines
from hopper_moe.launch.model_facts import read_model, require_complete
from hopper_moe.launch.ports import port_problem
from hopper_moe.launch.preflight import check, workspace_line
from hopper_moe.launch.sglang_args import LaunchPlan, parse
from hopper_moe.moe_backends.arguments import BACKEND
from hopper_moe.moe_backends.env import settings
from hopper_moe.moe_backends.errors import Refusal


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("model")
@click.option("--dry-run", is_flag=True, help="Run the checks, print the command, start nothing.")
@click.pass_context
def serve(ctx: click.Context, model: str, dry_run: bool) -> None:
    """Serve MODEL (a checkpoint folder or a Hugging Face id) on OpenAI endpoints.

    On a Hopper machine this checks everything that can be known early and becomes stock `sglang serve` with
    `--moe-runner-backend hopper_moe`; every SGLang argument may follow. On a machine without a Hopper GPU (or with
    `--device cpu`) an embedded host serves the same endpoints on the CPU, slowly.
    """
    plan, problems = parse(model, ctx.args)
    facts = read_model(model)
    found = machines.Machine() if plan.device == "cpu" else machines.detect()
    if plan.device == "cuda" and not found.is_hopper:
        problems.append("--device cuda is given, but no Hopper GPU is visible: leave it out to serve on the CPU.")
    _require_none(problems)
    on_cpu = not found.is_hopper
    if on_cpu:
        plan, found = plan.on_one_process(), machines.Machine()
    report = check(plan, facts, found, settings())
    for line in report.lines:
        click.echo(f"preflight: {line}")
    problems = list(report.refusals)
    if problem := port_problem(plan.host, plan.port):
        problems.append(f"--host {plan.host} --port {plan.port} cannot be used ({problem}): choose a free one.")
    _require_none(problems)
    require_complete(model, facts)
    if line := workspace_line(report, settings()):
        click.echo(f"preflight: {line}")
    if on_cpu:
        _serve_on_cpu(plan, report.choice.spec.name, dry_run)
    else:
        _become_sglang(plan, dry_run)


def sglang_command(plan: LaunchPlan) -> list[str]:
    """The stock command that this launch becomes."""
    command = [shutil.which("sglang", path=os.path.dirname(sys.executable)) or "sglang", "serve", "--model-path", plan.model]
    arguments = list(plan.sglang_args)
    if not any(argument.split("=")[0] == "--moe-runner-backend" for argument in arguments):
        arguments += ["--moe-runner-backend", BACKEND]
    return command + arguments


def _require_none(problems: list[str]) -> None:
    if problems:
        raise Refusal("\n".join(problems))


def _become_sglang(plan: LaunchPlan, dry_run: bool) -> None:
    if importlib.util.find_spec("sglang") is None:
        raise Refusal(
            "sglang, which does the serving on a Hopper machine, is not installed: pip install 'sglang-hopper-moe[sglang]'."
        )
    command = sglang_command(plan)
    click.echo("starting: " + " ".join(command))
    if dry_run:
        return
    # Without this, a launch from our own checkout would import its `kernels` folder as the third-party package of that name.
    environ = {**os.environ, "PYTHONSAFEPATH": "1"}
    sys.stdout.flush()
    os.execvpe(command[0], command, environ)


def _serve_on_cpu(plan: LaunchPlan, kernel: str, dry_run: bool) -> None:
    left_out = plan.not_for_cpu()
    if left_out:
        click.echo(f"no Hopper GPU here: one CPU process serves, these arguments have no meaning to it: {' '.join(left_out)}")
    click.echo(f"starting: embedded CPU host on http://{plan.host}:{plan.port}/v1")
    if dry_run:
        return
    from hopper_moe.launch import cpu_host

    cpu_host.serve(plan.model, host=plan.host, port=plan.port, kernel=kernel)
