"""`hopper-moe serve MODEL [sglang arguments]`: preflight, then stock SGLang on Hopper or the embedded host on a CPU machine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from hopper_moe.launch import cpu_arguments, cpu_preflight, preflight
from hopper_moe.launch import machine as machines
from hopper_moe.launch.cpu_arguments import CpuArguments
from hopper_moe.launch.cpu_preflight import CpuReport
from hopper_moe.launch.ports import http_address
from hopper_moe.launch.preflight import Report
from hopper_moe.launch.secrets import shown_command
from hopper_moe.launch.sglang_args import Launch
from hopper_moe.moe_backends.env import settings
from hopper_moe.moe_backends.sglang.plan import BACKEND
from hopper_moe.quantization.errors import Refusal


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
    settings()  # refuses an invalid environment before slow steps
    cpu = cpu_arguments.read(ctx.args)
    machine = machines.Machine() if cpu.device == "cpu" else machines.detect()
    if cpu_preflight.goes_to_gpu(cpu, machine):
        _serve_on_hopper(model, ctx.args, machine, dry_run)
    else:
        _serve_on_cpu(model, cpu, dry_run)


def _serve_on_hopper(model: str, arguments: list[str], machine: machines.Machine, dry_run: bool) -> None:
    launch, report = preflight.check_command(model, arguments, machine, settings())
    _print_or_refuse(report)
    if note := preflight.workspace_line(report.verdict, settings()):
        click.echo(f"preflight: {note}")
    command = sglang_command(launch)
    click.echo("starting: " + shown_command(command))
    if dry_run:
        return
    # Otherwise a launch from our checkout would import its `kernels` folder as the third-party package of that name.
    environ = {**os.environ, "PYTHONSAFEPATH": "1"}
    sys.stdout.flush()
    os.execvpe(command[0], command, environ)


def sglang_command(launch: Launch) -> list[str]:
    """The stock command that this launch becomes."""
    sglang = shutil.which("sglang", path=os.path.dirname(sys.executable)) or "sglang"
    named = any(argument.split("=")[0] == "--moe-runner-backend" for argument in launch.arguments)
    backend = [] if named else ["--moe-runner-backend", BACKEND]
    return [sglang, "serve", "--model-path", launch.model, *launch.arguments, *backend]


def _serve_on_cpu(model: str, cpu: CpuArguments, dry_run: bool) -> None:
    report = cpu_preflight.check_command(model, cpu, settings())
    _print_or_refuse(report)
    if cpu.ignored:
        ignored = shown_command(cpu.ignored)
        click.echo(f"no Hopper GPU here: one CPU process serves, these arguments have no meaning to it: {ignored}")
    click.echo(f"starting: embedded CPU host on {http_address(cpu.host, cpu.port)}/v1")
    if dry_run:
        return
    from hopper_moe.launch.cpu_host import server

    name = cpu.served_model_name
    if name is None and not Path(model).expanduser().is_dir():
        name = model  # the snapshot's folder is named by a commit
    server.serve(
        str(report.model.folder),
        host=cpu.host,
        port=cpu.port,
        kernel=report.choice.spec.name,
        api_key=cpu.api_key,
        served_model_name=name,
    )


def _print_or_refuse(report: Report | CpuReport) -> None:
    for line in report.lines:
        click.echo(f"preflight: {line}")
    if report.refusals:
        raise Refusal("\n".join(report.refusals))
