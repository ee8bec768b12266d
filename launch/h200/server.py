"""One SGLang server as a child process: started, waited for, asked about itself, stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from hopper_moe.moe_backends.arguments import BACKEND
from hopper_moe.moe_backends.errors import Refusal

HOST = "127.0.0.1"
READY = 1800.0  # seconds until a server must answer
_TAIL = 40  # lines of the log that a failure shows
_STOP = 20.0  # seconds between SIGTERM and SIGKILL


@dataclass
class Server:
    """A server that was started. `log` grows while it runs; `started` is by the monotonic clock."""

    model: str
    backend: str
    port: int
    log: Path
    process: subprocess.Popen
    started: float
    seconds_to_ready: float = 0.0
    command: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def facts(self) -> dict[str, float]:
        """What SGLang logged about memory: see `log_facts`."""
        return log_facts(self.log.read_text(errors="replace"))

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def terminate(self) -> None:
        """Ask it to end, without waiting: for several that end together."""
        if self.is_alive():
            os.killpg(self.process.pid, signal.SIGTERM)


def start(
    model: str,
    *,
    backend: str = BACKEND,
    kernel: str | None = None,
    port: int = 30000,
    log: Path = Path("server.log"),
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    launcher: Sequence[str] = (sys.executable, "-m", "sglang.launch_server"),
) -> Server:
    """Start a server of `model` without waiting for it: `wait_until_ready` and `stop` do the rest.

    Args:
        backend: value of --moe-runner-backend.
        kernel: HOPPER_MOE_KERNEL of the server; None: as in this process.
        log: file for everything that the server says.
        arguments: further SGLang arguments.
        environment: variables of the server beside this process's.
        launcher: command that takes SGLang's arguments.

    Raises:
        Refusal: `port` is in use.
    """
    _refuse_used_port(port)
    command = [*launcher, "--model-path", model, "--moe-runner-backend", backend, "--host", HOST, "--port", str(port), *arguments]
    # Without PYTHONSAFEPATH a start from a checkout of ours would import its `kernels` folder as the package of that name.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **(environment or {})}
    if kernel is not None:
        environment["HOPPER_MOE_KERNEL"] = kernel
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    return Server(model, backend, port, log, process, started, command=command)


@contextmanager
def serving(model: str, *, ready_timeout: float = READY, **how: Any) -> Iterator[Server]:
    """Serve `model` while the block runs. `how`: see `start`; raises `Refusal` as `start` and `wait_until_ready` do."""
    server = start(model, **how)
    try:
        wait_until_ready(server, ready_timeout)
        yield server
    finally:
        stop(server)


def wait_until_ready(server: Server, timeout: float = READY) -> None:
    """Wait until /health answers with 200, `timeout` seconds after the start at most.

    Raises:
        Refusal: it ended or did not answer in time; the sentence ends with the tail of the log.
    """
    while time.monotonic() < server.started + timeout:
        healthy = _is_healthy(server.url)
        # Asked after the health: what answers there may be another server, which took the port from ours.
        if not server.is_alive():
            raise Refusal(f"the server ended with code {server.process.returncode}; {server.log} ends with:\n{_tail(server.log)}")
        if healthy:
            server.seconds_to_ready = time.monotonic() - server.started
            return
        time.sleep(0.25)
    raise Refusal(f"the server did not answer in time; {server.log} ends with:\n{_tail(server.log)}")


def stop(server: Server) -> None:
    """End the server and every process that it started: they share its process group."""
    for signum, seconds in ((signal.SIGTERM, _STOP), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(server.process.pid, signum)
        except ProcessLookupError:
            return
        try:
            server.process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


def _refuse_used_port(port: int) -> None:
    """Whatever listens there would be taken for our server."""
    for _ in range(9):
        if _port_problem(port) is None:
            return
        time.sleep(0.1)  # a child that another thread starts holds copies of this process's sockets until its exec
    if problem := _port_problem(port):
        raise Refusal(f"port {port} of {HOST} cannot be used ({problem}): choose a free one.")


def _port_problem(port: int) -> str | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error.strerror
    return None


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL:])


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
