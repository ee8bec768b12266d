"""Start stock SGLang with this plugin (or another MoE backend), wait until it answers, optionally run a command against it.

\b
    python -m hopper_moe.eval.serving_bench.serve MODEL --kernel mxfp4_mega --run 'curl -s $SERVER_URL/v1/models'
    python -m hopper_moe.eval.serving_bench.serve MODEL --backend marlin -- --mem-fraction-static 0.8

Everything after `--` goes to SGLang. With --run the server stops when the command ends, and its exit code is this command's;
without, it runs until Ctrl-C. The command sees SERVER_URL (http://127.0.0.1:PORT) and SERVER_LOG.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from hopper_moe.eval.serving_bench.server import READY, log_facts, start
from hopper_moe.launch.server_process import ServerProcess, servers
from hopper_moe.moe_backends.sglang.plan import BACKEND
from hopper_moe.quantization.errors import Refusal


@click.command(help=__doc__)
@click.argument("model")
@click.option("--backend", default=BACKEND, show_default=True, help="SGLang's --moe-runner-backend.")
@click.option("--kernel", help="HOPPER_MOE_KERNEL of the server  [default: as in this shell]")
@click.option("--port", default=30000, show_default=True, type=click.IntRange(1, 65535))
@click.option("--log", default="server.log", show_default=True, type=click.Path(path_type=Path), help="What the server says.")
@click.option("--ready-timeout", default=READY, show_default=True, help="Seconds until it must answer.")
@click.option("--run", "command", help="Shell command to run when the server is ready; then stop it.")
@click.argument("sglang_arguments", nargs=-1, type=click.UNPROCESSED)
def main(
    model: str,
    backend: str,
    kernel: str | None,
    port: int,
    log: Path,
    ready_timeout: float,
    command: str | None,
    sglang_arguments: tuple[str, ...],
) -> None:
    try:
        with servers() as group:
            server = start(
                group,
                model,
                backend=backend,
                kernel=kernel,
                port=port,
                log=log,
                ready_timeout=ready_timeout,
                arguments=sglang_arguments,
            )
            click.echo(f"ready after {server.seconds_to_ready:.1f} s on {server.url}: {log_facts(server.said())}")
            sys.exit(_run(server, command) if command else _wait(server))
    except Refusal as refusal:
        click.echo(f"serve: {refusal}", err=True)
        sys.exit(2)


def _run(server: ServerProcess, command: str) -> int:
    environment = {**os.environ, "SERVER_URL": server.url, "SERVER_LOG": str(server.log)}
    return subprocess.run(command, shell=True, env=environment).returncode


def _wait(server: ServerProcess) -> int:
    try:
        return server.process.wait()
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    main()
