"""eval/serving_bench/rebalance against a server of stubs that moves experts while it answers, and the script that runs it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from stub_server import Stub, fraction

from hopper_moe.eval.serving_bench import rebalance, refresh


class Balancing(Stub):
    """Log probabilities are the position's; both ranks log a rebalance at every fifth request of the load. `sabotage`: "mixed"
    (experts of two placements: other bits after the first rebalance), "fails" (every tenth request), "still" (no rebalance)."""

    def __init__(self, log: Path, sabotage: str = "") -> None:
        super().__init__(reply=self.answer)
        self.log, self.sabotage, self.asked, self.moves, self.lock = log, sabotage, 0, 0, threading.Lock()
        log.write_text("[2026-11-29 17:00:00 DP0 TP0 EP0] [EPLBManager] rebalance end time=1.000s\n")  # before the load

    def answer(self, _method: str, _path: str, _headers: Any, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        ids, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        with self.lock:
            self.asked += len(ids) < 64  # the fixed questions are longer
            if self.sabotage == "fails" and len(ids) < 64 and self.asked % 10 == 0:
                return 500, {}, {"error": "a rank is gone"}
            if self.sabotage != "still" and len(ids) < 64 and self.asked % 5 == 0:
                self.moves += 1
                end = "[EPLBManager] rebalance end time=0.250s"
                said = "".join(f"[2026-11-29 17:00:01 DP{rank} TP{rank} EP{rank}] {end}\n" for rank in (0, 1))
                self.log.write_text(self.log.read_text() + said)
            salt = self.moves if self.sabotage == "mixed" else 0
        out = [(-fraction(salt, "out", token), token) for token in range(count)]
        given = [[None, ids[0]], *[[-fraction(salt, ids[i - 1], ids[i]), ids[i]] for i in range(1, len(ids))]]
        meta = {"finish_reason": {"type": "length"}, "input_token_logprobs": given, "output_token_logprobs": out}
        return 200, {}, {"meta_info": meta | {"output_top_logprobs": [[pair, (pair[0] - 1, -1)] for pair in out]}}


def run(folder: Path, sabotage: str = "") -> tuple[int, str, dict[str, Any]]:
    with Balancing(folder / "log", sabotage) as server:
        arguments = [server.url.removesuffix("/v1"), "--log", str(folder / "log"), "--out", str(folder / "out.json")]
        more = ["--rounds", "3", "--seconds", "0.5", "--concurrency", "4", "--at-least", "1", "--commit", "abc"]
        result = CliRunner().invoke(rebalance.main, [*arguments, *more])
    return result.exit_code, result.output, json.loads((folder / "out.json").read_text())


def test_rebalances_that_change_no_bit_pass(tmp_path):
    status, said, found = run(tmp_path)
    assert status == 0 and found["problems"] == [] and said.rstrip().endswith("nothing wrong"), said
    assert found["rebalances"] >= 1 and len(found["rounds"]) == 3 and found["commit"] == "abc"
    assert {seconds for entry in found["rounds"] for seconds in entry["rebalance_seconds"]} == {0.25}


@pytest.mark.parametrize(
    ("sabotage", "words"),
    [
        ("mixed", "fixed answers: .* log probabilities differ"),
        ("fails", "requests failed, the first: "),
        ("still", "0 rebalances under load, and 1 were asked for"),
    ],
)
def test_what_is_wrong_is_found(tmp_path, sabotage, words):
    status, said, found = run(tmp_path, sabotage)
    assert status == 1 and re.search(words, "\n".join(found["problems"])), said


def test_what_is_read_of_a_log():
    line = "[EPLBManager] rebalance end"
    log = f"[2026-11-29 17:00:01] {line} time=0.512s\n[2026-11-29 17:00:02] {line}\n[EPLBManager] rebalance start"
    assert rebalance.rebalances(log) == [0.512, None] and rebalance.rebalances("") == []
    ranks = "\n".join(f"[2026-11-29 17:00:01 TP{rank} EP{rank}] {line} time={rank}.5s" for rank in (1, 0, 1))
    assert rebalance.rebalances(ranks) == [1.5, 1.5]


FAKE = """#!{python}
import json, os, sys
print(json.dumps(sys.argv[1:]), file=open(os.environ["CALLS"], "a"))
sys.exit("hopper_moe.eval.serving_bench.serve" in sys.argv and os.environ["FAILS"] in " ".join(sys.argv))
"""


@pytest.mark.parametrize(("gpus", "fails", "status"), [(1, "nothing", 0), (2, "nothing", 0), (2, "refresh record", 1)])
def test_the_script_runs_every_part_and_says_whether_one_failed(tmp_path, gpus, fails, status):
    """With a `python3` that only notes its arguments; a part that fails keeps nothing else from running."""
    fake, calls = tmp_path / "bin" / "python3", tmp_path / "calls"
    fake.parent.mkdir()
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    script = Path(rebalance.__file__).with_name("moving.sh")
    environ = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "CALLS": str(calls), "FAILS": fails}
    ran = subprocess.run(["sh", str(script), "config", str(gpus), str(tmp_path / "out")], env=environ, timeout=60)
    made = [call for call in map(json.loads, calls.read_text().splitlines()) if call[0] == "-m"]
    servers = [call for call in made if call[1].endswith(".serve")]
    assert ran.returncode == status and [call[1].rpartition(".")[2] for call in made[:2]] == ["random_checkpoint"] * 2
    wanted = ["refresh record", "refresh measure", *["rebalance"] * (gpus > 1)]
    assert len(servers) == len(wanted) and all(name in " ".join(call) for name, call in zip(wanted, servers, strict=True))
    for call in servers:
        _, _, module, *given = shlex.split(call[call.index("--run") + 1].replace("$SERVER_URL", "url"))
        assert ("--ep" in call[call.index("--") + 1 :]) == (gpus > 1)
        assert any(argument.endswith(",ipc") for argument in given) == (gpus == 1 and "measure" in given)
        accepted(module, given, tmp_path)


def accepted(module: str, given: list[str], folder: Path) -> None:
    """The command takes these arguments, once the files are there."""
    for path in (Path(argument) for argument in given if argument.startswith(str(folder))):
        path.parent.mkdir(exist_ok=True)
        path.mkdir(exist_ok=True) if "ckpt" in path.name else path.touch()
    if module.endswith(".rebalance"):
        rebalance.main.make_context("rebalance", given)
    else:
        refresh.main.commands[given[0]].make_context(given[0], given[1:])
