"""The question generator: right answers, a held-out split by construction, and the committed file being what it claims."""

import hashlib
import json
import re
from itertools import islice

import pytest

from hopper_moe.eval import benchmarks
from hopper_moe.eval.demo import tiny_model
from hopper_moe.eval.tiny_model.tokenizer import build_tokenizer
from hopper_moe.eval.word_problems import MIXES, is_held_out, problems, question_set

PROVENANCE = json.loads(benchmarks.WORD_PROBLEMS.with_suffix(".provenance.json").read_text())


def solve(question: str) -> int:
    """Answer a question from its text, independently of the generator."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    if "boxes" in question:
        bought = numbers[0] * numbers[1]
        return bought + numbers[2] - numbers[3] if "finds" in question else bought
    signs = [1] + [-1 if re.search(rf"(loses|gave away|gives away) {n}\b", question) else 1 for n in numbers[1:]]
    if len(numbers) == 3:
        signs = [1, 1, -1]
    return sum(s * n for s, n in zip(signs, numbers, strict=True))


@pytest.mark.parametrize("mix", list(MIXES))
def test_answers_are_right_and_never_negative(seed: int, mix: str) -> None:
    for p in islice(problems(seed, held_out=False, mix=mix), 2000):
        assert p.answer == solve(p.question) >= 0, p
        left, _, right = p.solution.rstrip(".").rpartition(". ")[2].partition("=")
        assert int(right) == p.answer == eval(left)  # noqa: S307 - digits and one operator


def held_out_of(stream_seed: int) -> set[str]:
    """Committed questions in a training stream."""
    committed = {json.loads(line)["problem"] for line in benchmarks.WORD_PROBLEMS.read_text().splitlines()}
    assert len(committed) >= 1000
    assert all(is_held_out(q) for q in committed)
    streams = (islice(problems(stream_seed, held_out=False, mix=mix), 20_000) for mix in MIXES)
    return committed & {p.question for stream in streams for p in stream}


def test_no_training_stream_holds_a_held_out_question(seed: int) -> None:
    assert not held_out_of(seed)


@pytest.mark.parametrize("trained", [7, 8])
def test_the_streams_that_trained_the_model_hold_none(trained: int) -> None:
    assert not held_out_of(trained)


def test_committed_questions_are_what_their_provenance_says() -> None:
    content = benchmarks.WORD_PROBLEMS.read_bytes()
    assert hashlib.sha256(content).hexdigest() == PROVENANCE["sha256"]
    rows = [json.loads(line) for line in content.splitlines()]
    again = question_set(PROVENANCE["seed"], PROVENANCE["count"])
    assert [(r["problem"], r["expected_answer"]) for r in rows] == [(p.question, str(p.answer)) for p in again]
    assert len({r["id"] for r in rows}) == len(rows) == PROVENANCE["count"]


def test_committed_tokenizer_is_the_one_the_script_builds() -> None:
    built = build_tokenizer()
    assert json.loads((tiny_model() / "tokenizer.json").read_text()) == json.loads(built.backend_tokenizer.to_str())


def test_committed_model_is_small() -> None:
    assert sum(f.stat().st_size for f in tiny_model().iterdir()) <= 4 << 20
