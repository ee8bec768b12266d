"""An HTTP client whose requests another thread can end at once."""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import httpx


class InterruptibleClient(httpx.Client):
    """`interrupt()` makes every request in flight fail, and every later one.

    It shuts the connections down and closes nothing: a thread that waits in poll() on a socket closed by another thread sleeps on
    until the answer comes, and forever when its file number has been given to a new connection by then.
    """

    def __init__(self, timeout: httpx.Timeout) -> None:
        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)  # as many as the run has threads
        super().__init__(timeout=timeout, limits=unlimited, event_hooks={"request": [self._watch]})
        self._lock = threading.RLock()  # a second Ctrl-C may come inside `interrupt`, in the same thread
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._interrupted = False

    def interrupt(self) -> None:
        """Safe in a signal handler of the main thread."""
        with self._lock:
            self._interrupted = True
            for connected in list(self._sockets):
                _shut_down(connected)

    def _watch(self, request: httpx.Request) -> None:
        request.extensions = {**request.extensions, "trace": self._trace}

    def _trace(self, event: str, info: Mapping[str, Any]) -> None:
        # Of a TLS connection both are seen: the second is the one that then owns the file number.
        if not event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            return
        connected = info["return_value"].get_extra_info("socket")
        with self._lock:
            self._sockets.add(connected)
            if self._interrupted:
                _shut_down(connected)


def _shut_down(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed by its own thread, or by the server
        # Not SSLSocket.shutdown, which would take the TLS state away under the thread that reads.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
