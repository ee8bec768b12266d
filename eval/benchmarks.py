"""The benchmarks: questions, prompt and grader of each, all taken from sgl-eval; `word_problems` adds only its own questions.

sgl-eval keeps its loaders and graders in underscore modules, so `tests/test_eval_statistics.py` compares what we build from its
parts with what its own runner reports.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from sgl_eval.evals import _loader, _math, _multichoice, _registry
from sgl_eval.evals._prompts import render_prompt, resolve_prompt
from sgl_eval.types import Example, Sample

from hopper_moe.quantization.errors import Refusal

DATA = Path(__file__).parent / "data"
WORD_PROBLEMS = DATA / "word_problems.jsonl"

# (correct 0 or 1, extracted answer or None)
Grader = Callable[[Example, Sample], tuple[float, str | None]]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark with its questions loaded. `data_sha256` covers ids, questions and expected answers."""

    name: str
    examples: list[Example]
    source: str
    data_sha256: str
    default_n_repeats: int
    default_thinking: bool
    default_max_tokens: int | None  # None: the server's limit
    system_message: str | None
    _prompt: Path
    grade: Grader

    def messages(self, example: Example) -> list[dict[str, str]]:
        """The chat that asks this question."""
        user = {"role": "user", "content": render_prompt(self._prompt, problem=example.inputs["problem"])}
        return [{"role": "system", "content": self.system_message}, user] if self.system_message else [user]

    @property
    def prompt_name(self) -> str:
        return self._prompt.stem


def _math_grader(prompt: dict[str, Any]) -> Grader:
    return _math.make_score_one_fn(_math.MathEvaluator(config=prompt.get("evaluator_config") or {}))


def load(name: str, data: Path | None, num_examples: int | None) -> Benchmark:
    """A benchmark by name: `gsm8k`, `gpqa`, `aime25` or `word_problems`. `data`: a local file instead of sgl-eval's source.

    Raises `Refusal` for a bad file, or when questions would have to be downloaded and there is no network.
    """
    if name == "word_problems":
        category, prompt_path, repeats, thinking = "math", DATA / "word_problems.yaml", 1, False
        data, loader = data or WORD_PROBLEMS, None
    else:
        entry = next(e for e in _registry._TABLE if e["name"] == name)
        category, prompt_name = _registry._resolve_upstream_metadata(name)
        prompt_path, loader = resolve_prompt(prompt_name), _registry._build_loader(entry)
        repeats, thinking = entry["default_n_repeats"], entry["thinking"]
    if data is not None:
        examples = _from_file(name, data, num_examples, letters=category == "multichoice")
        source = data.name if data == WORD_PROBLEMS else str(data)
    else:
        examples, source = _from_library(name, loader, num_examples), "sgl-eval"
    prompt = yaml.safe_load(prompt_path.read_text())
    return Benchmark(
        name=name,
        examples=examples,
        source=source,
        data_sha256=_digest(examples),
        default_n_repeats=repeats,
        default_thinking=thinking,
        default_max_tokens=64 if name == "word_problems" else None,
        system_message=prompt["system"].format() if prompt.get("system") else None,
        _prompt=prompt_path,
        grade=_multichoice.make_score_one_fn() if category == "multichoice" else _math_grader(prompt),
    )


def _from_library(name: str, loader, num_examples: int | None) -> list[Example]:
    try:
        return loader(num_examples)
    except Exception as error:  # urllib, httpx, datasets and the hub each raise their own kinds when offline
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise Refusal(f"{name}: its questions could not be fetched ({reason}): give a local file with --data FILE.") from error


def _from_file(name: str, path: Path, num_examples: int | None, *, letters: bool) -> list[Example]:
    """Rows {id?, problem, expected_answer}; for gsm8k also OpenAI's original {question, answer} rows."""
    if not path.is_file():
        raise Refusal(f"--data {path} is no file: give a JSON Lines file with problem and expected_answer in every row.")
    rows = _rows(path)
    if name == "gsm8k" and "question" in rows[0][1] and "problem" not in rows[0][1]:
        for number, row in rows:
            if not isinstance(row.get("question"), str) or "####" not in str(row.get("answer")):
                raise Refusal(
                    f"--data {path}, line {number}: a row of gsm8k's own form needs question and answer, texts, the answer with "
                    "#### before its number."
                )
        return _original_gsm8k(path, num_examples)
    seen: dict[str, int] = {}
    for number, row in rows:
        _check_types(path, number, row)
        if letters and not (isinstance(row["expected_answer"], str) and len(row["expected_answer"]) == 1):
            raise Refusal(
                f"--data {path}, line {number}: expected_answer {row['expected_answer']!r} is no single letter: "
                f"{name} rows hold the lettered options in problem and the letter as expected_answer."
            )
        if "id" in row and seen.setdefault(str(row["id"]), number) != number:
            raise Refusal(
                f"--data {path}, line {number}: id {row['id']!r} is used on line {seen[str(row['id'])]} too: make ids unique."
            )
    return _loader.load_from_path(str(path))(num_examples)


def _check_types(path: Path, number: int, row: dict[str, Any]) -> None:
    for field, types in (("problem", (str,)), ("expected_answer", (str, int, float))):
        value = row.get(field)
        if value in (None, ""):
            raise Refusal(f"--data {path}, line {number}: {field} is missing: every row needs problem and expected_answer.")
        if type(value) not in types or value != value:
            needed = "a text" if types == (str,) else "a text or a number"
            raise Refusal(f"--data {path}, line {number}: {field} is {reprlib.repr(value)}, but {needed} is needed.")
    if type(row.get("id")) not in (str, int, type(None)):
        raise Refusal(f"--data {path}, line {number}: id is {reprlib.repr(row['id'])}, but a text or a whole number is needed.")


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"--data {path} cannot be read as UTF-8 text ({error}): give a JSON Lines file.") from error
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a question may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, and nesting, are no JSONDecodeError
            raise Refusal(f"--data {path}, line {number}: no valid JSON ({error}): every line is one JSON object.") from error
        if not isinstance(row, dict):
            raise Refusal(f"--data {path}, line {number}: a {type(row).__name__}, not an object: every line is one JSON object.")
        for field, value in row.items():
            if any("\ud800" <= character <= "\udfff" for character in f"{field}{value}"):
                raise Refusal(
                    f"--data {path}, line {number}: {ascii(field)[1:-1]} holds half a surrogate pair, which no request carries: "
                    "mend the text."
                )
        rows.append((number, row))
    if not rows:
        raise Refusal(f"--data {path} has no rows: give at least one question.")
    return rows


def _original_gsm8k(path: Path, num_examples: int | None) -> list[Example]:
    """OpenAI's file through sgl-eval's own preparation, which also mends its known wrong answers."""
    from sgl_eval._vendored.nemo_skills.dataset.gsm8k import prepare

    address = prepare.URL
    with TemporaryDirectory() as folder:
        try:
            prepare.URL = path.resolve().as_uri().replace("{", "{{").replace("}", "}}")
            _loader._run_prepare(prepare, Path(folder), ("test",), {}, False, None, None)
        finally:
            prepare.URL = address
        return _loader._read_jsonl(Path(folder) / "test.jsonl", "gsm8k", num_examples)


def _digest(examples: list[Example]) -> str:
    digest = hashlib.sha256()
    for e in examples:
        digest.update(json.dumps([e.id, e.inputs["problem"], str(e.target)]).encode() + b"\n")
    return digest.hexdigest()
