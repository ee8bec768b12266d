"""Starts a server for one evaluation and stops it again: the CPU host here, stock SGLang with the plugin on a Hopper machine."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from tqdm import tqdm

from hopper_moe.eval.signals import handled
from hopper_moe.launch import machine
from hopper_moe.launch.cpu_host_kernels import CPU_KERNELS
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.quantization.checkpoint_files import read_config

CPU_READY, GPU_READY = 300.0, 3600.0  # seconds until the endpoint must answer
_LOG_LINES = 15


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def uses_sglang(model: str) -> bool:
    """Whether `model` is served by SGLang here: a Hopper machine, and attention sizes that stock SGLang has kernels for."""
    sizes = read_config(Path(model)) if (Path(model) / "config.json").exists() else {}
    fits = sizes.get("head_dim", 512) == 512 and sizes.get("index_head_dim", 128) == 128
    return fits and machine.detect().is_hopper


def server_command(model: str, kernel: str, port: int) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that serves `model` with `kernel` here. Raises `Refusal` for a kernel the CPU host lacks."""
    # Without PYTHONSAFEPATH a start from our own checkout would import its `kernels` folder as the package of that name.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if uses_sglang(model):
        command = [sys.executable, "-c", "from hopper_moe.launch.cli import main; main()", "serve", model, "--port", str(port)]
        return command, {**environment, "HOPPER_MOE_KERNEL": kernel}
    if kernel not in CPU_KERNELS:
        raise Refusal(
            f"kernel {kernel} does not run on the CPU host, which serves {model} on this machine: "
            f"choose among {', '.join(CPU_KERNELS)}."
        )
    command = [sys.executable, "-m", "hopper_moe.launch.cpu_host", model, "--port", str(port), "--kernel", kernel]
    return command, {**environment, "OMP_NUM_THREADS": "1"}


@contextmanager
def served(model: str, kernel: str, log: Path) -> Iterator[str]:
    """Serve `model` while the block runs; gives the base URL. The server's output goes to the file `log`.

    Raises `Refusal` with the end of the log when the server does not come up.
    """
    port = free_port()
    command, environment = server_command(model, kernel, port)
    log.parent.mkdir(parents=True, exist_ok=True)
    limit = GPU_READY if uses_sglang(model) else CPU_READY
    with log.open("w") as output, _signals_as_exits():
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait_until_ready(process, port, kernel, log, limit)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _stop(process)


@contextmanager
def _signals_as_exits() -> Iterator[None]:
    """SIGTERM and SIGHUP, which would end this process without its `finally`s, leave the block as `SystemExit`: the server is in
    a session of its own, and would go on for ever.
    """

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    with handled((signal.SIGTERM, signal.SIGHUP), leave):
        yield


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):  # Ctrl-C again: no more patience
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and whatever it has left behind
    process.wait()


def fingerprint(model: str) -> str:
    """What tells one checkpoint from another without reading its weights: its path, its config, its files' sizes and times. A
    name on the hub is itself.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file())
    return f"{folder.resolve()} {hashlib.sha256(repr(files).encode()).hexdigest()[:16]}"


def _wait_until_ready(process: subprocess.Popen, port: int, kernel: str, log: Path, limit: float) -> None:
    started, health = time.monotonic(), f"http://127.0.0.1:{port}/health"
    with tqdm(desc=f"starting the server ({kernel})", bar_format="{desc}: {elapsed}", leave=False, disable=None) as bar:
        while time.monotonic() - started < limit:
            if process.poll() is not None:
                raise Refusal(
                    f"the server for kernel {kernel} ended with code {process.returncode}; {log} ends with:\n{_tail(log)}"
                )
            try:
                reply = httpx.get(health, timeout=5)
                if reply.status_code == 200 and process.poll() is None:
                    _check_whose(reply, kernel, health)
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.25)
            bar.refresh()
    raise Refusal(f"the server for kernel {kernel} did not answer {health} within {limit:.0f} s; {log} ends with:\n{_tail(log)}")


def _check_whose(reply: httpx.Response, kernel: str, health: str) -> None:
    """Raises `Refusal` if the CPU host that answers has another kernel: then it is not the one we started."""
    said = reply.json() if reply.headers.get("content-type", "").startswith("application/json") else {}
    if isinstance(said, dict) and said.get("kernel", kernel) != kernel:
        raise Refusal(f"{health} is answered by another server, with kernel {said['kernel']}: stop it, or try again.")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
