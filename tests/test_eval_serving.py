"""Servers of an evaluation: stopped whatever ends it, and never somebody else's. A small HTTP server stands for the model's."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import STUBBORN, has_said, wait_for

from hopper_moe.eval import serving
from hopper_moe.launch import server_process
from hopper_moe.launch.server_process import servers
from hopper_moe.quantization.errors import Refusal

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
    process.communicate(timeout=120)
    wait_for(lambda: not listening(url))


def test_what_was_ignored_stays_ignored() -> None:
    """nohup: the run goes on when its terminal closes."""
    program = (
        "from hopper_moe.launch.server_process import servers\nwith servers(): print('in', flush=True); input()\nprint('out')"
    )
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **ignore
    )
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGHUP)
    rest, _ = process.communicate("\n", timeout=120)
    assert (process.returncode, rest) == (0, "out\n")


def test_a_server_of_ours_is_found_without_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "fd00::/8")
    monkeypatch.setattr(serving, "CPU_READY", 60.0)
    command = [sys.executable, "-c", SERVER]
    monkeypatch.setattr(serving, "server_command", lambda _, kernel, port: ([*command, str(port), kernel], {}))
    with serving.served("model", "reference", tmp_path / "log") as url:
        assert url.startswith("http://127.0.0.1:")


def test_a_server_that_was_there_before_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that takes the port while ours starts, which the CPU host's kernel tells."""
    with socket.create_server(("127.0.0.1", 0)) as other, monkeypatch.context() as patch:
        patch.setattr(serving, "free_port", lambda: other.getsockname()[1])
        with pytest.raises(Refusal, match="cannot be used"), serving.served("model", "w4a16", tmp_path / "log"):
            pytest.fail("the other server was taken")
    command = [sys.executable, "-c", SERVER]
    monkeypatch.setattr(serving, "server_command", lambda _, __, port: ([*command, str(port), "reference"], {}))
    with (
        pytest.raises(Refusal, match="answered by another server, with kernel reference"),
        serving.served("model", "w4a16", tmp_path / "log"),
    ):
        pytest.fail("the other server was taken")


def test_a_signal_while_servers_are_stopped_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the wait for a server that takes its time, and then the command: no next kernel is served."""
    monkeypatch.setattr(server_process, "_PATIENCE", 600)
    with pytest.raises(SystemExit), servers() as group:
        server = group.start([sys.executable, "-c", STUBBORN], port=serving.free_port(), log=tmp_path / "log")
        wait_for(lambda: has_said(server.log))
        begun = time.monotonic()

        def tell() -> None:
            wait_for(lambda: group._ending)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=tell).start()
    assert time.monotonic() - begun < 300 and not server.is_alive()
