"""An HTTP client whose requests end: at their deadline whatever the server sends, and all at once when another thread says so."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx

from hopper_moe.launch.proxies import proxy_for

CONNECT_TIMEOUT = 30.0  # seconds
_ENCODINGS = ("gzip", "deflate")  # decoded piece by piece, each at most a thousand times as large as what came in
LARGEST_ANSWER = 64 << 20  # bytes; a server that never stops sending must not fill the memory


class InterruptibleClient(httpx.Client):
    """`interrupt()` makes every request in flight fail, and every later one. Each fails by itself after its read timeout.

    httpx' own timeouts are between two bytes: a server that drips would hold a request for ever. Every thread has connections of
    its own, so that the deadline of its request ends no other's.

    It shuts the connections down and closes nothing: a thread that waits in poll() on a socket closed by another thread sleeps on
    until the answer comes, and forever when its file number has been given to a new connection by then.
    """

    def __init__(self, longest: float) -> None:
        timeout = httpx.Timeout(longest, connect=min(CONNECT_TIMEOUT, longest))
        # Redirects as OpenAI's own client follows them; httpx keeps the key from other hosts.
        super().__init__(timeout=timeout, transport=_Routes(), trust_env=False, follow_redirects=True)
        self._lock = threading.RLock()  # a second Ctrl-C may come inside `interrupt`, in the same thread
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._interrupted = False
        self._of_thread = threading.local()

    def send(self, request: httpx.Request, **how: Any) -> httpx.Response:
        """As httpx', body included. Raises httpx.ReadTimeout at the deadline."""
        if not hasattr(self._of_thread, "sockets"):
            self._of_thread.sockets = weakref.WeakSet()
        call = _Call(self._of_thread.sockets)
        request.extensions = {**request.extensions, "trace": partial(self._trace, call)}
        deadline = threading.Timer(request.extensions["timeout"]["read"], self._expire, [call])
        deadline.daemon = True
        deadline.start()
        try:
            response = super().send(request, **how)
        except httpx.TransportError as error:
            if call.expired:
                raise httpx.ReadTimeout("the deadline has passed", request=request) from error
            raise
        finally:
            deadline.cancel()
        if call.expired:  # a body without a length ends like one that is whole
            raise httpx.ReadTimeout("the deadline has passed", request=request)
        return response

    def interrupt(self) -> None:
        """Safe in a signal handler of the main thread."""
        with self._lock:
            self._interrupted = True
            for connected in list(self._sockets):
                _shut_down(connected)

    def _expire(self, call: _Call) -> None:
        with self._lock:
            call.expired = True
            for connected in list(call.sockets):
                _shut_down(connected)

    def _trace(self, call: _Call, event: str, info: Mapping[str, Any]) -> None:
        # Of a TLS connection both are seen: the second is the one that then owns the file number.
        if not event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            return
        connected = info["return_value"].get_extra_info("socket")
        with self._lock:
            self._sockets.add(connected)
            call.sockets.add(connected)
            if self._interrupted or call.expired:
                _shut_down(connected)


@dataclass
class _Call:
    """One request, its redirects included: the connections of its thread, and whether its time is over."""

    sockets: weakref.WeakSet[socket.socket]
    expired: bool = False


class _Routes(httpx.BaseTransport):
    """Sends every request, redirected ones too, through the proxy that the environment names for its address."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._all: list[httpx.HTTPTransport] = []
        self._certificates: ssl.SSLContext | None = None
        self._lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["accept-encoding"] = ", ".join(_ENCODINGS)
        raw = self._transport(request.url.scheme, proxy_for(request.url)).handle_request(request)
        encodings = [word.strip().lower() for word in raw.headers.get("content-encoding", "").split(",")]
        if unknown := [word for word in encodings if word not in ("", "identity", *_ENCODINGS)]:
            raw.close()
            raise httpx.DecodingError(f"as {unknown[0]}, which was not asked for", request=request)
        raw.request = request  # for the errors that decoding raises
        headers = [pair for pair in raw.headers.raw if pair[0].lower() not in (b"content-encoding", b"content-length")]
        return httpx.Response(raw.status_code, headers=headers, stream=_Bounded(raw), extensions=raw.extensions)

    def close(self) -> None:
        for transport in self._all:
            transport.close()

    def _transport(self, scheme: str, proxy: str | None) -> httpx.HTTPTransport:
        known = self._of_thread.__dict__.setdefault("transports", {})
        if (scheme, proxy) not in known:
            with self._lock:
                verify = self._certificates_for(scheme, proxy)
                known[scheme, proxy] = httpx.HTTPTransport(verify=verify, proxy=proxy)
                self._all.append(known[scheme, proxy])
        return known[scheme, proxy]

    def _certificates_for(self, scheme: str, proxy: str | None) -> ssl.SSLContext | bool:
        if scheme == "http" and proxy is None:
            return False  # loading them, here for nothing, takes most of the time of a short run
        if self._certificates is None:
            self._certificates = httpx.create_ssl_context()
        return self._certificates


class _Bounded(httpx.SyncByteStream):
    """The decoded body, up to `LARGEST_ANSWER`: a few compressed bytes can stand for gigabytes."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self._response.iter_bytes():
            size += len(part)
            if size > LARGEST_ANSWER:
                raise httpx.ReadError(f"the answer is larger than {LARGEST_ANSWER >> 20} MiB", request=self._response.request)
            yield part

    def close(self) -> None:
        self._response.close()


def _shut_down(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed by its own thread, or by the server
        # Not SSLSocket.shutdown, which would take the TLS state away under the thread that reads.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
