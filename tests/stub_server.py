"""A pure-stdlib OpenAI endpoint for evaluation tests: deterministic answers, with failures on request.

Questions read "What is A plus B?". The answer depends only on the prompt and the request's seed, so a resumed run can be compared
with an unbroken one.
"""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def fraction(*parts: object) -> float:
    """Deterministic number in [0, 1) of the parts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4]) / 2**32


@dataclass(frozen=True)
class Behaviour:
    """What the stub does to requests. Shares are of the questions, in [0, 1]: one question always fares the same."""

    fail_share: float = 0.0  # answered with `status`
    fail_first: int = 0  # so many requests fail, whatever they ask
    status: int = 500
    delay: float = 0.0  # seconds before each answer
    truncate_share: float = 0.0
    accuracy: float = 0.8
    salt: int = 0  # another one gives other right answers
    silent_after: int | None = None  # requests after so many wait until `speak()`, or for ever


class Stub:
    """The keywords of `Behaviour`, and `reply`, which may answer a request instead: given method, path, headers and body, it
    returns (status, headers, body), or None. Each request's headers are kept in `headers`.
    """

    def __init__(self, port=0, *, reply=lambda *_request: None, **behaviour: Any):
        self.answered: Counter[tuple[str, int | None]] = Counter()
        self.requests = 0
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self._lock = threading.Lock()
        self._how, self._speaks = Behaviour(**behaviour), threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet: two would wait for the client's delayed acknowledgement

            def log_message(self, *_args):
                pass

            def reply(self, code: int, content: dict, headers: dict[str, str] | None = None) -> None:
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code)
                for name, value in {"content-type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

            def replied(self, body: dict | None) -> bool:
                stub.headers.append(dict(self.headers))
                if (other := reply(self.command, self.path, self.headers, body)) is not None:
                    status, headers, content = other
                    self.reply(status, content, headers)
                return other is not None

            def do_GET(self):
                if not self.replied(None):
                    self.reply(200, {"object": "list", "data": [{"id": "stub", "object": "model", "owned_by": "test"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if not self.replied(body):
                    self.reply(*stub.answer(body))

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, body: dict) -> tuple[int, dict]:
        how, prompt, seed = self._how, body["messages"][-1]["content"], body.get("seed")
        with self._lock:
            self.requests += 1
            number = self.requests
            self.bodies.append(body)
        if how.silent_after is not None and number > how.silent_after:
            self._speaks.wait()
        time.sleep(how.delay)
        if number <= how.fail_first or fraction("fail", prompt) < how.fail_share:
            return how.status, {"error": {"message": "the stub was told to fail"}}
        a, b = map(int, re.search(r"What is (\d+) plus (\d+)\?", prompt).groups())
        right = fraction("right", how.salt, prompt, seed) < how.accuracy
        truncated = fraction("cut", prompt, seed) < how.truncate_share
        text = f"{a}+{b}" if truncated else f"The answer is \\boxed{{{a + b if right else a + b + 1}}}."
        with self._lock:
            self.answered[prompt, seed] += 1
        choice = {
            "index": 0,
            "finish_reason": "length" if truncated else "stop",
            "message": {"role": "assistant", "content": text},
        }
        usage = {"prompt_tokens": 10, "completion_tokens": 7, "total_tokens": 17}
        return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice], "usage": usage}

    def change(self, **behaviour: Any) -> None:
        """Treat the requests from now on otherwise."""
        self._how = replace(self._how, **behaviour)

    def speak(self) -> None:
        """Answer what waits, and everything after it."""
        self._speaks.set()

    def __enter__(self) -> "Stub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_error) -> None:
        self.server.shutdown()
        self.server.server_close()


def write_questions(path, count: int) -> None:
    rows = [{"id": f"q{i}", "problem": f"What is {i} plus {3 * i + 1}?", "expected_answer": str(4 * i + 1)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
