"""Servers as child processes: started from any thread, waited for, and stopped however their block ends."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import httpx
import psutil

from hopper_moe.launch.ports import port_problem
from hopper_moe.launch.proxies import own_servers_direct
from hopper_moe.launch.signals import handled
from hopper_moe.quantization.errors import Refusal

HOST = "127.0.0.1"
_TAIL = 40  # lines of the log that a failure shows
_PATIENCE = 30.0  # seconds between SIGTERM and SIGKILL
# Without PYTHONSAFEPATH a start from our checkout would import its `kernels` folder as the package of that name.
_ENVIRONMENT = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


@dataclass
class ServerProcess:
    """A server that was started. `log` grows while it runs; `started` is by the monotonic clock."""

    name: str
    command: list[str]
    port: int
    log: Path
    process: subprocess.Popen
    started: float
    seconds_to_ready: float = 0.0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """The process and its running descendants; empty when it has ended."""
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        return []

    def listens(self) -> bool:
        """Whether a process of its family listens on the port. An answer there may come from another server: of two that load for
        a minute and then bind the same port, the second still runs for some seconds.
        """
        for process in self.family():
            with suppress(psutil.Error):
                taken = process.net_connections("tcp")
                if any(entry.status == psutil.CONN_LISTEN and entry.laddr.port == self.port for entry in taken):
                    return True
        return False

    def send(self, number: signal.Signals) -> None:
        """Send a signal to its process group, which contains every process that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait_until_ready(
        self,
        timeout: float,
        check: Callable[[httpx.Response], None] = lambda reply: None,
        tick: Callable[[], object] = lambda: None,
    ) -> None:
        """Wait until /health answers with 200, `timeout` seconds after the start at most. `check` may refuse that answer, `tick`
        is called while there is none.

        Raises:
            Refusal: it ended or did not answer in time, and keeps no memory from others now; the log's tail ends the sentence.
        """
        health = f"{self.url}/health"
        while time.monotonic() < self.started + timeout:
            reply = _get(health)
            if not self.is_alive():
                raise self._failure(f"ended with code {self.process.returncode}")
            if reply is not None and reply.status_code == 200 and self.listens():
                check(reply)
                self.seconds_to_ready = time.monotonic() - self.started
                return
            time.sleep(0.25)
            tick()
        raise self._failure(f"did not answer {health} within {timeout:.0f} s")

    def _failure(self, what: str) -> Refusal:
        _stop([self])
        tail = "\n".join(self.said().splitlines()[-_TAIL:])
        return Refusal(f"{self.name} {what}; {self.log} ends with:\n{tail}")


class Servers:
    """The servers of one `servers()` block: starts them, and stops them all together."""

    def __init__(self) -> None:
        self._started: list[ServerProcess] = []
        self._lock = threading.Lock()  # held while a server is started
        self._starting: threading.Thread | None = None
        self._ending = self._in_a_hurry = False
        self._leave_with: BaseException | None = None

    def start(
        self,
        command: Sequence[str],
        *,
        port: int,
        log: Path,
        environment: Mapping[str, str] | None = None,
        name: str = "the server",
    ) -> ServerProcess:
        """Start what `command` runs, without waiting for it.

        Args:
            port: where it will listen.
            log: file for its stdout and stderr.
            environment: variables in addition to this process's.
            name: of the server, in sentences.

        Raises:
            Refusal: `port` is in use: whatever listens there would be taken for this server.
        """
        # One at a time: what another start forks holds copies of this process's sockets until its exec, also of a port's probe.
        with self._lock:
            self._starting = threading.current_thread()
            try:
                server = self._start(list(command), port, log, environment or {}, name)
            finally:
                self._starting = None
        if self._leave_with and threading.current_thread() is threading.main_thread():
            self._leave(self._leave_with)
        return server

    def _start(self, command: list[str], port: int, log: Path, environment: Mapping[str, str], name: str) -> ServerProcess:
        if self._ending:
            raise Refusal(f"{name} is not started any more: this command is ending.")
        if problem := port_problem(HOST, port):
            raise Refusal(f"port {port} of {HOST} cannot be used ({problem}): choose a free one.")
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **own_servers_direct(), **_ENVIRONMENT, **environment}
        begun = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        self._started.append(ServerProcess(name, command, port, log, process, begun))
        return self._started[-1]

    def _stop(self) -> None:
        self._ending = True
        with self._lock:  # a start under way is in the list then, and no other follows
            pass
        _stop(self._started, lambda: self._in_a_hurry)

    def _told_to_end(self, number: int, _frame: object) -> None:
        """A signal ends the block, but not between the start of a process and its entry in the list. While servers are being
        stopped it skips the remaining wait.
        """
        self._in_a_hurry = self._ending
        self._leave_with = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        if not self._ending and self._starting is not threading.main_thread():  # Python runs handlers in the main thread
            self._leave(self._leave_with)

    def _leave(self, reason: BaseException) -> NoReturn:
        self._ending = True
        raise reason


@contextmanager
def servers() -> Iterator[Servers]:
    """Servers that end with this block, also when Ctrl-C, SIGTERM or SIGHUP ends it. Each has a session of its own and would
    otherwise keep running. Enter the block in the main thread; any thread may start servers.
    """
    group = Servers()
    with handled(group._told_to_end):
        try:
            yield group
        finally:
            group._stop()
        if group._leave_with:  # a signal arrived only during the stop
            group._leave(group._leave_with)


def _stop(started: Sequence[ServerProcess], in_a_hurry: Callable[[], bool] = lambda: False) -> None:
    for server in started:
        server.send(signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE
    while any(server.is_alive() for server in started) and time.monotonic() < deadline and not in_a_hurry():
        time.sleep(0.05)
    for server in started:
        server.send(signal.SIGKILL)  # and its remaining descendants
    for server in started:
        with suppress(subprocess.TimeoutExpired):  # a driver may block it indefinitely
            server.process.wait(10)


def _get(url: str) -> httpx.Response | None:
    try:
        return httpx.get(
            url, timeout=5, verify=False, trust_env=False
        )  # no proxy and no certificates, whose loading would take most of the time
    except httpx.HTTPError:
        return None
