"""Stock SGLang with a MoE backend of choice: how it is started, and what it logs about memory."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hopper_moe.launch.server_process import HOST, ServerProcess, Servers
from hopper_moe.moe_backends.sglang.plan import BACKEND

READY = 1800.0  # seconds until a server must answer
# What is measured under another name than SGLang's --moe-runner-backend: that backend, and what else it takes.
_VARIANTS = {"flashinfer_mxfp4_fp8": ("flashinfer_mxfp4", ("--flashinfer-mxfp4-moe-precision", "fp8"))}


def backend_arguments(name: str) -> tuple[str, ...]:
    """SGLang's arguments for a backend by the name that results have."""
    backend, more = _VARIANTS.get(name, (name, ()))
    return ("--moe-runner-backend", backend, *more)


def start(
    servers: Servers,
    model: str,
    *,
    backend: str = BACKEND,
    kernel: str | None = None,
    port: int = 30000,
    log: Path = Path("server.log"),
    ready_timeout: float = READY,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    launcher: Sequence[str] = (sys.executable, "-m", "sglang.launch_server"),
) -> ServerProcess:
    """Start a server of `model` and wait until it answers. Raises `Refusal` as `Servers.start` and `wait_until_ready` do.

    Args:
        backend: value of --moe-runner-backend, or `flashinfer_mxfp4_fp8` (the same with FP8 activations).
        kernel: HOPPER_MOE_KERNEL of the server; None: as in this process.
        log: file for everything that the server says.
        arguments: further SGLang arguments.
        environment: variables of the server beside this process's.
        launcher: command that takes SGLang's arguments.
    """
    where = ("--host", HOST, "--port", str(port))
    command = [*launcher, "--model-path", model, *backend_arguments(backend), *where, *arguments]
    own = {} if kernel is None else {"HOPPER_MOE_KERNEL": kernel}
    server = servers.start(command, port=port, log=log, environment={**(environment or {}), **own})
    server.wait_until_ready(ready_timeout)
    return server


# name -> first number of the last line that matches; GiB as SGLang counts them (it writes GB)
_FACTS = {
    "weights_gib": r"Load weight end\..*?mem usage=([\d.]+) GB",
    "available_after_load_gib": r"Load weight end\..*?avail mem=([\d.]+) GB",
    "available_after_pool_gib": r"Memory pool end\. avail mem=([\d.]+) GB",
    "kv_tokens": r"max_total_num_tokens=(\d+)",
    "graph_gib": r"[Cc]apture.*graph end\..*?mem usage=([\d.]+) GB",
    "workspace_gib": r"([\d.]+) GiB of workspace",
    "packed_gib": r"([\d.]+) GiB of packed experts",
}


def log_facts(text: str) -> dict[str, float]:
    """Memory figures of a server's log, those that it holds: GiB, and the KV pool in tokens."""
    found = {name: re.findall(pattern, text) for name, pattern in _FACTS.items()}
    return {name: float(values[-1]) for name, values in found.items() if values}
