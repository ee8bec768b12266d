"""Starts a server for one evaluation and stops it again: the CPU host here, stock SGLang with the plugin on a Hopper machine."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from tqdm import tqdm

from hopper_moe.launch import machine
from hopper_moe.launch.cpu_host.kernels import CPU_KERNELS
from hopper_moe.launch.ports import free_port
from hopper_moe.launch.server_process import servers
from hopper_moe.quantization.config_values import read_config
from hopper_moe.quantization.errors import Refusal

CPU_READY, GPU_READY = 300.0, 3600.0  # seconds until the endpoint must answer


def uses_sglang(model: str) -> bool:
    """Whether `model` is served by SGLang here: a Hopper machine, and attention sizes that stock SGLang has kernels for."""
    sizes = read_config(Path(model)) if (Path(model) / "config.json").exists() else {}
    fits = sizes.get("head_dim", 512) == 512 and sizes.get("index_head_dim", 128) == 128
    return fits and machine.detect().is_hopper


def server_command(model: str, kernel: str, port: int) -> tuple[list[str], dict[str, str]]:
    """(command, further environment) that serve `model` with `kernel` here. Raises `Refusal` for a kernel the CPU host lacks."""
    if uses_sglang(model):
        command = [sys.executable, "-c", "from hopper_moe.launch.cli import main; main()", "serve", model, "--port", str(port)]
        return command, {"HOPPER_MOE_KERNEL": kernel}
    if kernel not in CPU_KERNELS:
        raise Refusal(
            f"kernel {kernel} does not run on the CPU host, which serves {model} on this machine: "
            f"choose among {', '.join(CPU_KERNELS)}."
        )
    command = [sys.executable, "-m", "hopper_moe.launch.cpu_host", model, "--port", str(port), "--kernel", kernel]
    return command, {"OMP_NUM_THREADS": "1"}


@contextmanager
def served(model: str, kernel: str, log: Path) -> Iterator[str]:
    """Serve `model` while the block runs; gives the base URL. The server's output goes to the file `log`.

    Raises `Refusal` with the end of the log when the server does not come up.
    """
    port = free_port()
    command, environment = server_command(model, kernel, port)
    limit = GPU_READY if uses_sglang(model) else CPU_READY
    with servers() as group:
        name = f"the server for kernel {kernel}"
        server = group.start(command, port=port, log=log, environment=environment, name=name)
        with tqdm(desc=f"starting the server ({kernel})", bar_format="{desc}: {elapsed}", leave=False, disable=None) as bar:
            server.wait_until_ready(limit, check=lambda reply: _check_whose(reply, kernel), tick=bar.refresh)
        yield f"{server.url}/v1"


def fingerprint(model: str) -> str:
    """What tells one checkpoint from another without reading its weights: its path, its config, its files' sizes and times. A
    name on the hub is itself.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file())
    return f"{folder.resolve()} {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"


def _check_whose(reply: httpx.Response, kernel: str) -> None:
    """Raises `Refusal` if the CPU host that answers has another kernel: then it is not the one we started."""
    said = reply.json() if reply.headers.get("content-type", "").startswith("application/json") else {}
    if isinstance(said, dict) and said.get("kernel", kernel) != kernel:
        raise Refusal(f"{reply.url} is answered by another server, with kernel {said['kernel']}: stop it, or try again.")
