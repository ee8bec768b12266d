"""One TCP server that plays thousands of endpoints, each answering at random: status, headers, body, truncation, delay.

Endpoint N listens below /eN/v1. What it does is drawn from (seed, N, question, how often that was asked), whatever the order.
"""

import json
import random
import socket
import socketserver
import struct
import threading
from collections import Counter
from email.utils import formatdate

KEY = "sk-very-secret-0123456789"
STATUSES = [204, 300, 301, 302, 303, 304, 307, 308, 400, 401, 403, 404, 405, 407, 408, 409, 413, 418, 422, 425, 429, 451]
STATUSES += [500, 501, 502, 503, 504, 520, 599, 600, 999]
TEXTS = [
    "The answer is \\boxed{7}.",
    "\\boxed{8}",
    "",
    "half \ud83d",
    "\udc00\\boxed{7}",
    "né 漢 😀 \\boxed{7}",
    "\u2028\x00\x1b[31m\\boxed{7}",
]
TEXTS += ["\\boxed{" * 30, "\\boxed{\\frac{1}{0}}", "x" * 5000, "\\boxed{\ud83d}", f"{KEY} \\boxed{{7}}"]
VALUES = [None, True, 0, -1, 1.5, 1e308, 10**30, "", "x", "half \ud83d", [], [None], [[]], {}, {"message": None}, {"a": [1]}]
BODIES = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"<!doctype html><html><title>Sign in</title></html>",
    b"\xff\xfe\x00",
    b"NaN",
    b"[" * 100_000,
]
BODIES += [
    b'{"error": {"message": "no such model", "code": 404}}',
    b'{"error": "\\ud83d busy", "code": 503}',
    b'{"detail": [{"a": 1}]}',
]
BODIES += [b'{"object": "error", "message": "' + KEY.encode() + b' is wrong"}', b"data: {}\n\n", b"\xef\xbb\xbf{}", b"9" * 10_000]
RETRY_AFTER = [
    "0",
    "0.001",
    "-1",
    "nan",
    "99999999",
    "soon",
    "",
    "1e9",
    formatdate(0, usegmt=True),
    "Mon, 99 Foo 2026",
    "9" * 400,
]
HEADERS = ["content-type: text/html; charset=hex", "content-encoding: gzip", "content-encoding: br", "x: \xff", "date: never"]


class RandomEndpoints(socketserver.ThreadingTCPServer):
    """`sent[n, question]`: texts of the whole, good answers that endpoint n sent. `slow`: endpoints that may be slow."""

    request_queue_size = 256
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, seed: int, slow: frozenset[int] = frozenset()) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.seed, self.slow = seed, slow
        self.asked: Counter[tuple[int, str]] = Counter()
        self.sent: dict[tuple[int, str], list[str]] = {}
        self.lock = threading.Lock()

    def url(self, number: int) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/e{number}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """The client hung up; that is its right."""

    def __enter__(self) -> "RandomEndpoints":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        super().__exit__(*error)


class _Connection(socketserver.StreamRequestHandler):
    server: RandomEndpoints

    def handle(self) -> None:
        while self._one():
            pass

    def _one(self) -> bool:
        """Answer one request; whether another may follow on this connection."""
        words = self.rfile.readline().split()
        length = 0
        while (line := self.rfile.readline().strip().lower()) != b"":
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        if len(words) != 3:
            return False
        body = self.rfile.read(length)
        number = int(words[1].split(b"/")[1][1:])
        question = json.loads(body)["messages"][-1]["content"] if body else "models"
        with self.server.lock:
            self.server.asked[number, question] += 1
            trial = self.server.asked[number, question]
        health = random.Random(f"{self.server.seed}/{number}").choice([0.0, 0.3, 0.3, 0.7, 0.9])
        r = random.Random(f"{self.server.seed}/{number}/{question}/{trial}")
        if question == "models":
            health = max(health, 0.9)
        return self._good(r, number, question) if r.random() < health else self._bad(r, number, question)

    def _good(self, r: random.Random, number: int, question: str) -> bool:
        text = r.choice(TEXTS)
        if question != "models":
            with self.server.lock:
                self.server.sent.setdefault((number, question), []).append(text)
        return self._send(r, _answer(r, question, text))

    def _bad(self, r: random.Random, number: int, question: str) -> bool:
        kinds = ["status"] * 6 + ["body"] * 4 + ["mutated"] * 6 + ["cut"] * 3 + ["garbage", "close", "reset"]
        kind = r.choice(["drip", "silent", "stall"] if number in self.server.slow and r.random() < 0.5 else kinds)
        whole = json.dumps(_answer(r, question, "\\boxed{7}")).encode()
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(whole)}\r\n\r\n".encode()
        if kind == "status":
            return self._status(r, number, question)
        if kind == "mutated":
            return self._send(r, _mutated(r, _answer(r, question, "\\boxed{7}")))
        if kind == "body":
            return self._write(b"HTTP/1.1 200 OK\r\n", r.choice([*HEADERS, "x: y"]), r.choice(BODIES))
        if kind == "drip":
            for byte in r.choice([head, b"HTTP/1.1 100 Continue\r\n\r\n" * 500, b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 10_000]):
                self.wfile.write(bytes([byte]))
                if self._client_left(0.02):
                    break
        elif kind in ("silent", "stall"):
            self.wfile.write(b"" if kind == "silent" else head + whole[:20])
            self._client_left(60)
        elif kind == "garbage":
            self.wfile.write(r.randbytes(r.randrange(1, 200)))
        elif kind == "cut":
            self.wfile.write((head + whole)[: r.randrange(len(head + whole))])
        elif kind == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    def _client_left(self, seconds: float) -> bool:
        self.connection.settimeout(seconds)
        try:
            return self.connection.recv(1) == b""
        except TimeoutError:
            return False

    def _status(self, r: random.Random, number: int, question: str) -> bool:
        code = r.choice(STATUSES)
        name = "models" if question == "models" else "chat/completions"
        places = [f"/e{number}/v1/{name}", "http://127.0.0.1:1/v1", "//", "http://[", "ftp://x/", "", "http://\udcff/"]
        headers = [r.choice(HEADERS + ["x: y"] * 5)]
        if 300 <= code < 400 and r.random() < 0.8:
            headers.append(f"location: {r.choice(places)}")
        if r.random() < 0.3:
            headers.append(f"retry-after: {r.choice(RETRY_AFTER)}")
        body = b"" if code in (204, 304) else r.choice(BODIES)
        return self._write(f"HTTP/1.1 {code} Reason\r\n".encode(), "\r\n".join(headers), body)

    def _write(self, status: bytes, headers: str, body: bytes) -> bool:
        head = status + headers.encode("utf-8", "surrogateescape") + b"\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.wfile.write(head + body)
        return True

    def _send(self, r: random.Random, content: object) -> bool:
        """A whole reply of status 200, in one of the ways in which HTTP marks its end."""
        body, head = json.dumps(content).encode(), b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
        way = r.randrange(3)
        if way == 0:
            self.wfile.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        elif way == 1:
            self.wfile.write(head + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n")
        else:
            self.wfile.write(head + b"connection: close\r\n\r\n" + body)
        return way < 2


def _answer(r: random.Random, question: str, text: str) -> dict:
    if question == "models":
        return {"object": "list", "data": [{"id": r.choice(["m", "org/m", "m" * 300, "é"]), "owned_by": KEY}]}
    message = {"role": "assistant", "content": r.choice([text, [{"type": "text", "text": text}]])}
    if r.random() < 0.3:
        message[r.choice(["reasoning", "reasoning_content"])] = "so \ud83d"
    usage = r.choice([None, {"prompt_tokens": 3, "completion_tokens": 5}, {"completion_tokens": "5"}, {"prompt_tokens": 1e400}])
    return {"choices": [{"index": 0, "finish_reason": r.choice(["stop", "length", None]), "message": message}], "usage": usage}


def _mutated(r: random.Random, content: dict) -> object:
    """`content` with one thing somewhere in it left out, or replaced by something else."""
    holder: object = content
    while True:
        key = r.choice(list(holder)) if isinstance(holder, dict) else r.randrange(len(holder))
        inside = holder[key]
        if isinstance(inside, (dict, list)) and inside and r.random() < 0.7:
            holder = inside
            continue
        if r.random() < 0.3:
            del holder[key]
        else:
            holder[key] = r.choice(VALUES)
        return content
