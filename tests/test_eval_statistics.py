"""Metrics against sgl-eval's own numbers, paired statistics against known cases and coverage, the report's contents."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sgl_eval.registry import get
from sgl_eval.sampler import ChatCompletionSampler
from sgl_eval.types import GenConfig
from stub_server import Stub, write_questions

from hopper_moe.eval import benchmarks, paired, statistics
from hopper_moe.eval.cli import main
from hopper_moe.eval.statistics import Attempt
from hopper_moe.quantization.errors import Refusal

QUESTIONS = 60


def evaluate(stub: Stub, folder: Path, name: str, *more: str) -> Path:
    data = folder / "questions.jsonl"
    if not data.exists():
        write_questions(data, QUESTIONS)
    args = ["gsm8k", "--base-url", stub.url, "--data", str(data), "--out", str(folder / name), "--temperature", "1", *more]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return folder / name


@pytest.mark.parametrize("repeats", [1, 4])
def test_numbers_equal_sgl_evals_own_runner(tmp_path: Path, repeats: int) -> None:
    """The same answers, once through sgl-eval's benchmark function and once through ours."""

    class OneAnswerPerRepeat(Stub):
        """sgl-eval sends no seed of its own per repeat, so the n-th request of a prompt stands for repeat n in both runs."""

        def answer(self, body):
            prompt = body["messages"][-1]["content"]
            nth = sum(b["messages"][-1]["content"] == prompt for b in self.bodies)
            return super().answer({**body, "seed": nth})

    with OneAnswerPerRepeat(truncate_share=0.2) as stub:
        folder = evaluate(stub, tmp_path, "ours", "--n-repeats", str(repeats), "--concurrency", "1")
    ours = json.loads((folder / "metrics.json").read_text())
    with OneAnswerPerRepeat(truncate_share=0.2) as stub:
        examples = benchmarks.load("gsm8k", tmp_path / "questions.jsonl", None).examples
        theirs = (
            get("gsm8k")
            .run(
                sampler=ChatCompletionSampler(base_url=stub.url),
                gen=GenConfig(temperature=1.0),
                n_repeats=repeats,
                num_examples=None,
                num_threads=1,
                load_examples=lambda _count: examples,
            )
            .aggregate
        )
    assert 0.3 < ours["pass@1"] < 0.95
    pairs = {"pass@1": "score", "stop_rate": "stop_rate", "truncated_rate": "truncated_rate", "error_rate": "error_rate"}
    if repeats > 1:
        pairs |= {"std_between_repeats": "pass@1_std", "standard_error_sampling": "pass@1_sem", "no_answer": "no_answer"}
        pairs |= {f"pass@{repeats}": f"pass@{repeats}", f"majority@{repeats}": f"majority@{repeats}"}
    for key, theirs_key in pairs.items():
        assert ours[key] == pytest.approx(theirs[theirs_key], abs=1e-12), key


def test_errors_leave_the_denominator() -> None:
    right, wrong, failed = Attempt(1.0, "1", "stop"), Attempt(0.0, "2", "stop"), Attempt(None, None, "error")
    m = statistics.summarize([[right, right], [wrong, failed], [failed, failed], [right, wrong]])
    assert m["pass@1"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert (m["errors"], m["error_rate"]) == (3, 3 / 8)
    assert m["pass@2"] == 1.0  # of the two questions with both answers
    assert m["majority@2"] == pytest.approx(0.75)  # a tie counts half


def test_interval_of_a_perfect_score_has_a_width() -> None:
    m = statistics.summarize([[Attempt(1.0, "1", "stop")]] * 100)
    low, high = m["interval95"]
    assert high == 1.0
    assert 0.95 < low < 0.97


def test_active_time_ignores_pauses_and_overlap() -> None:
    times = [(0, 2), (1, 3), (10, 11), (10.5, 10.6)]
    attempts = [Attempt(1.0, "1", "stop", start=a, end=b) for a, b in times]
    assert statistics.active_seconds(attempts) == pytest.approx(4)


def test_mcnemar_and_interval_of_known_counts() -> None:
    assert paired.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)  # two-sided binomial tail by hand
    assert paired.mcnemar(0, 0) == 1.0
    low, high = paired.bonett_price(0, 0, 1000)
    assert low == pytest.approx(-high)
    assert 0 < high < 0.005


def test_interval_covers_the_true_difference() -> None:
    """Summed over every outcome (lost, won, same) of 300 pairs, so that nothing depends on luck."""
    pairs, true = 300, 0.03
    chances = [0.05, 0.05 + true, 0.9 - true]
    coverage = reached = 0.0
    for lost, won in itertools.product(range(60), range(80)):  # beyond lies less than 1e-9 of the distribution
        counts = (lost, won, pairs - lost - won)
        logs = (count * math.log(chance) - math.lgamma(count + 1) for count, chance in zip(counts, chances, strict=True))
        probability = math.exp(math.lgamma(pairs + 1) + sum(logs))
        low, high = paired.bonett_price(won, lost, pairs)
        reached += probability
        coverage += probability * (low <= true <= high)
    assert reached == pytest.approx(1, abs=1e-9)
    assert 0.945 < coverage < 0.965


def test_p_values_of_no_difference_are_not_small_too_often(seed: int) -> None:
    rng = np.random.default_rng(seed)
    small = sum(paired.permutation_p(rng.choice([-0.5, 0, 0.5], 40)) < 0.05 for _ in range(60))
    assert small <= 12  # expected 3 at most; more than 12 of 60 has a chance of 7e-6


@pytest.mark.parametrize("repeats", ["1", "4"])
def test_equal_runs_are_the_same_and_a_worse_server_is_caught(tmp_path: Path, repeats: str) -> None:
    runs = {}
    for name, accuracy, salt in (("a", 0.9, 0), ("again", 0.9, 0), ("worse", 0.5, 1)):
        with Stub(accuracy=accuracy, salt=salt) as stub:
            runs[name] = evaluate(stub, tmp_path, name, "--n-repeats", repeats)
    a, again, worse = (paired.load_run(runs[name]) for name in ("a", "again", "worse"))
    same = paired.compare(a, again, 0.06)
    assert (same["difference"], same["p_value"], same["verdict"], same["won"], same["lost"]) == (0.0, 1.0, "same", [], [])
    caught = paired.compare(a, worse, 0.06)
    assert caught["verdict"] == "worse"
    assert caught["interval95"][0] < caught["difference"] < caught["interval95"][1] < 0
    flipped = {i for i, x, y in zip(a.ids, a.scores, worse.scores, strict=True) if np.mean(x) != np.mean(y)}
    assert set(caught["won"] + caught["lost"]) == flipped
    assert paired.compare(worse, a, 0.06)["difference"] == pytest.approx(-caught["difference"])


def test_compare_command_writes_the_report(tmp_path: Path) -> None:
    for name, accuracy in (("a", 0.9), ("b", 0.4)):
        with Stub(accuracy=accuracy) as stub:
            evaluate(stub, tmp_path, name)
    out = tmp_path / "report"
    result = CliRunner().invoke(main, ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--margin", "2", "--out", str(out)])
    assert result.exit_code == 5, result.output
    text = (out / "report.md").read_text()
    assert "**worse** at a margin of 2 points" in text
    assert text.count("| worse |") == min(20, len(json.loads((out / "compare.json").read_text())["lost"]))
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_are_no_pair_are_refused(tmp_path: Path) -> None:
    with Stub() as stub:
        a = paired.load_run(evaluate(stub, tmp_path, "a"))
        hot = paired.load_run(evaluate(stub, tmp_path, "hot", "--top-p", "0.5"))
    with pytest.raises(Refusal, match="top_p"):
        paired.compare(a, hot, 0.01)
    with pytest.raises(Refusal, match="no finished run"):
        paired.load_run(tmp_path)


def test_verdicts() -> None:
    assert paired.verdict(-0.001, -0.004, 0.002, 0.5, 0.01) == "same"
    assert paired.verdict(-0.003, -0.006, -0.001, 0.01, 0.01) == "same"  # significant, but within the margin
    assert paired.verdict(-0.05, -0.08, -0.02, 1e-4, 0.01) == "worse"
    assert paired.verdict(0.05, 0.02, 0.08, 1e-4, 0.01) == "better"
    assert paired.verdict(-0.01, -0.03, 0.01, 0.4, 0.01) == "undecided"
