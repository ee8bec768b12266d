"""Questions, prompts and graders of every benchmark, offline."""

import json
from pathlib import Path

import pytest
from sgl_eval._vendored.nemo_skills.dataset.gsm8k import prepare
from sgl_eval.evals import _loader
from sgl_eval.types import Sample

from hopper_moe.eval import benchmarks
from hopper_moe.quantization.errors import Refusal


def rows(path: Path, *content: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def test_aime25_comes_with_the_library() -> None:
    b = benchmarks.load("aime25", None, None)
    assert len(b.examples) == 30
    assert b.default_n_repeats == 16
    assert b.default_thinking
    example = b.examples[0]
    assert example.inputs["problem"] in b.messages(example)[-1]["content"]
    assert b.grade(example, Sample(text=f"So \\boxed{{{example.target}}}.")) == (1.0, str(example.target))
    assert b.grade(example, Sample(text="So \\boxed{12345}."))[0] == 0.0
    assert b.grade(example, Sample(text="I give up.")) == (0.0, None)


def test_gpqa_from_a_file(tmp_path: Path) -> None:
    path = rows(tmp_path / "q.jsonl", {"problem": "1+1?\n\nA) 2\nB) 3\nC) 4\nD) 5", "expected_answer": "A"})
    b = benchmarks.load("gpqa", path, None)
    assert "Answer: A/B/C/D" in b.messages(b.examples[0])[-1]["content"]
    assert b.grade(b.examples[0], Sample(text="Because.\nAnswer: A")) == (1.0, "A")
    assert b.grade(b.examples[0], Sample(text="Because.\nAnswer: B")) == (0.0, "B")
    with pytest.raises(Refusal, match="no single letter"):
        benchmarks.load("gpqa", rows(tmp_path / "bad.jsonl", {"problem": "x", "expected_answer": "two"}), None)


def test_gsm8k_from_openais_own_file(tmp_path: Path) -> None:
    path = rows(
        tmp_path / "test.jsonl",
        {"question": "How many?", "answer": "3*4=<<3*4=12>>12\n#### 1,012"},
        {"question": "And now?", "answer": "#### 7"},
    )
    b = benchmarks.load("gsm8k", path, None)
    assert [(e.inputs["problem"], e.target) for e in b.examples] == [("How many?", 1012), ("And now?", 7)]
    assert b.grade(b.examples[0], Sample(text="\\boxed{1012}"))[0] == 1.0
    assert len(benchmarks.load("gsm8k", path, 1).examples) == 1
    assert "raw.githubusercontent.com" in prepare.URL, "the library is left as it was"


def test_without_network_the_refusal_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_loader, "_CACHE_ROOT", tmp_path)
    monkeypatch.setattr(prepare, "URL", "http://127.0.0.1:9/{}.jsonl")
    with pytest.raises(Refusal, match=r"gsm8k: its questions could not be fetched .*--data FILE"):
        benchmarks.load("gsm8k", None, None)


def test_the_digest_covers_questions_and_answers(tmp_path: Path) -> None:
    base = {"id": "a", "problem": "x", "expected_answer": "1"}
    digests = {
        benchmarks.load("gsm8k", rows(tmp_path / "q.jsonl", {**base, **change}), None).data_sha256
        for change in ({}, {"id": "b"}, {"problem": "y"}, {"expected_answer": "2"})
    }
    assert len(digests) == 4
    assert benchmarks.load("gsm8k", rows(tmp_path / "q.jsonl", base), None).data_sha256 in digests
