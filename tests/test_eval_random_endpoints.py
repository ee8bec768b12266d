"""The evaluation client against endpoints that answer at random: no traceback, no lost answer, no endless wait, no leak.

A run draws 80 endpoints, with `--cases 2000` as many as the bar asks for.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from random_endpoints import KEY, RandomEndpoints
from stub_server import write_questions

from hopper_moe.eval import sampler
from hopper_moe.eval.cli import main
from hopper_moe.quantization.errors import Refusal

ENDPOINTS, SLOW_EVERY, QUESTIONS = 80, 40, 2
ENDS = {0, 2, 3, 4}  # of eval/cli.py; nothing interrupts here


def test_every_endpoint_ends_in_answers_or_one_sentence(
    tmp_path: Path, seed: int, cases: Callable[[int], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "FIRST_PAUSE", 0.0)
    write_questions(tmp_path / "q.jsonl", QUESTIONS)
    numbers = range(cases(ENDPOINTS))
    ends = set()
    with RandomEndpoints(seed, frozenset(numbers[::SLOW_EVERY])) as server:
        for number in numbers:
            ends.add(_run(server, number, tmp_path, seed))
            if number % 10 == 1:  # what the journal holds is read, graded and reported again
                ends.add(_run(server, number, tmp_path, seed))
    assert len(ends) > 1, "random endpoints end in more than one way"


def _run(server: RandomEndpoints, number: int, folder: Path, seed: int) -> int:
    out, case = folder / f"run-{number}", f"TEST_SEED={seed}, endpoint {number}"
    before = set(_journal(out))
    args = ["gsm8k", "--base-url", server.url(number), "--data", str(folder / "q.jsonl"), "--out", str(out)]
    args += ["--api-key", KEY, "--tries", "2", "--concurrency", "2"]
    args += ["--timeout", "0.3" if number in server.slow else "120"] + (["--model", "m"] if number % 3 else [])
    result = CliRunner().invoke(main, args)
    assert isinstance(result.exception, (type(None), SystemExit, Refusal)), f"{case}: {result.exception!r}"
    status = 2 if isinstance(result.exception, Refusal) else result.exit_code
    said = result.output + str(result.exception)
    assert status in ENDS and "Traceback" not in said, case
    known = _journal(out)
    written = b"".join(path.read_bytes() for path in out.iterdir()) if out.exists() else b""
    assert KEY not in said and KEY.encode() not in written, f"{case} leaks the key"
    assert before <= set(known) and (status != 0 or len(known) == QUESTIONS), f"{case} lost an answer"
    if number not in server.slow:
        for (of, question), texts in server.sent.items():
            if of == number and status != 2:
                key = "q" + re.search(r"What is (\d+)", question)[1]
                assert known.get(key) == texts[0].replace(KEY, "***"), f"{case} lost the answer to {key}"
                assert len(texts) == 1, f"{case} asked again for what was answered"
    return status


def _journal(out: Path) -> dict[str, str]:
    path = out / "answers.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    return {line["id"]: line["text"] for line in lines}
