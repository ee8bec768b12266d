"""One SGLang server as a child process: started, waited for, asked about itself, stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from hopper_moe.moe_backends.arguments import BACKEND
from hopper_moe.moe_backends.errors import Refusal

HOST = "127.0.0.1"
_TAIL = 40  # lines of the log that a failure shows
_STOP = 20.0  # seconds between SIGTERM and SIGKILL


@dataclass
class Server:
    """A server that answers. `log` grows while it runs."""

    model: str
    backend: str
    port: int
    log: Path
    process: subprocess.Popen
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


@contextmanager
def serving(
    model: str,
    *,
    backend: str = BACKEND,
    kernel: str | None = None,
    port: int = 30000,
    log: Path = Path("server.log"),
    ready_timeout: float = 1800,
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    launcher: Sequence[str] = (sys.executable, "-m", "sglang.launch_server"),
) -> Iterator[Server]:
    """Serve `model` while the block runs.

    Args:
        backend: value of --moe-runner-backend.
        kernel: HOPPER_MOE_KERNEL of the server; None: as in this process.
        log: file for everything that the server says.
        ready_timeout: seconds until it must answer a generation.
        arguments: further SGLang arguments.
        environment: variables of the server beside this process's.
        launcher: command that takes SGLang's arguments.

    Raises:
        Refusal: it ended or did not answer in time; the sentence ends with the tail of the log.
    """
    command = [*launcher, "--model-path", model, "--moe-runner-backend", backend, "--host", HOST, "--port", str(port), *arguments]
    # Without PYTHONSAFEPATH a start from a checkout of ours would import its `kernels` folder as the package of that name.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **(environment or {})}
    if kernel is not None:
        environment["HOPPER_MOE_KERNEL"] = kernel
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    server = Server(model, backend, port, log, process, command=command)
    try:
        _wait_until_ready(server, started + ready_timeout)
        server.seconds_to_ready = time.monotonic() - started
        yield server
    finally:
        _stop(process)


def _wait_until_ready(server: Server, deadline: float) -> None:
    while time.monotonic() < deadline:
        if not server.is_alive():
            raise Refusal(f"the server ended with code {server.process.returncode}; {server.log} ends with:\n{_tail(server.log)}")
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.25)
    raise Refusal(f"the server did not answer in time; {server.log} ends with:\n{_tail(server.log)}")


def _stop(process: subprocess.Popen) -> None:
    """End the server and every process that it started: they share its process group."""
    for signum, seconds in ((signal.SIGTERM, _STOP), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            return
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


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
