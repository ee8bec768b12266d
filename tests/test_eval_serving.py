"""Servers of an evaluation: stopped whatever ends it, and never somebody else's. A small HTTP server stands for the model's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hopper_moe.eval import serving
from hopper_moe.moe_backends.errors import Refusal

SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"kernel": sys.argv[2]}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
EVALUATION = """
import sys, time
from pathlib import Path
from hopper_moe.eval import serving
serving.server_command = lambda model, kernel, port: ([sys.executable, "-c", sys.argv[1], str(port), kernel], None)
with serving.served("model", "reference", Path(sys.argv[2])) as url:
    print(url, flush=True)
    time.sleep(600)
"""


def listening(url: str) -> bool:
    port = url.split(":")[2].split("/")[0]
    done = subprocess.run(["pgrep", "-f", f"serve_forever.* {port} reference"], capture_output=True)
    return done.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_no_server_outlives_its_evaluation(tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", EVALUATION, SERVER, str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a test run under nohup, or in the background, ignores some
    )
    url = process.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:") and listening(url)
    process.send_signal(number)
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while listening(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not listening(url)


def test_what_was_ignored_stays_ignored() -> None:
    """nohup: the run goes on when its terminal closes."""
    program = (
        "import signal, time; from hopper_moe.eval.serving import _signals_as_exits\n"
        "with _signals_as_exits(): print('in', flush=True); time.sleep(3)\n"
        "print('out')"
    )
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, **ignore)
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGHUP)
    rest, _ = process.communicate(timeout=60)
    assert (process.returncode, rest) == (0, "out\n")


def test_a_server_that_was_there_before_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = serving.free_port()
    other = subprocess.Popen([sys.executable, "-c", SERVER, str(port), "reference"])
    try:
        monkeypatch.setattr(serving, "free_port", lambda: port)
        sleep = ([sys.executable, "-c", "import time; time.sleep(600)"], dict(os.environ))
        monkeypatch.setattr(serving, "server_command", lambda *_: sleep)
        with (
            pytest.raises(Refusal, match="answered by another server, with kernel reference"),
            serving.served("model", "w4a16", tmp_path / "log"),
        ):
            pytest.fail("the other server was taken")
    finally:
        other.kill()
        other.wait()
