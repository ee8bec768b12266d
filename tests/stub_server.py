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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def fraction(*parts: object) -> float:
    """Deterministic number in [0, 1) of the parts."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4]) / 2**32


class Stub:
    """`fail_share` of the questions always answer `status`; `fail_first` makes the first N requests fail, whatever they ask.

    Requests after the first `silent_after` wait until `speak()`, or for ever.
    """

    def __init__(
        self,
        port=0,
        *,
        fail_share=0.0,
        fail_first=0,
        status=500,
        delay=0.0,
        truncate_share=0.0,
        accuracy=0.8,
        salt=0,
        silent_after=None,
    ):
        self.answered: Counter[tuple[str, int | None]] = Counter()
        self.requests = 0
        self.bodies: list[dict] = []
        self._lock = threading.Lock()
        self.fail_share, self.fail_first, self.status, self.delay = fail_share, fail_first, status, delay
        self.truncate_share, self.accuracy, self.salt = truncate_share, accuracy, salt
        self.silent_after, self._speaks = silent_after, threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet: two would wait for the client's delayed acknowledgement

            def log_message(self, *_args):
                pass

            def reply(self, code: int, content: dict) -> None:
                body = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                self.wfile.flush()

            def do_GET(self):
                self.reply(200, {"object": "list", "data": [{"id": "stub", "object": "model", "owned_by": "test"}]})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                self.reply(*stub.answer(body))

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, body: dict) -> tuple[int, dict]:
        prompt, seed = body["messages"][-1]["content"], body.get("seed")
        with self._lock:
            self.requests += 1
            number = self.requests
            self.bodies.append(body)
        if self.silent_after is not None and number > self.silent_after:
            self._speaks.wait()
        time.sleep(self.delay)
        if number <= self.fail_first or fraction("fail", prompt) < self.fail_share:
            return self.status, {"error": {"message": "the stub was told to fail"}}
        a, b = map(int, re.search(r"What is (\d+) plus (\d+)\?", prompt).groups())
        right = fraction("right", self.salt, prompt, seed) < self.accuracy
        truncated = fraction("cut", prompt, seed) < self.truncate_share
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
