"""Paired comparison of two runs of the same questions: difference, interval, p-value, flips and a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from hopper_moe.eval.statistics import Z95, wilson
from hopper_moe.quantization.errors import Refusal

RESAMPLES = 10_000
SIGNIFICANCE = 0.05

# What has to be the same for two runs to be a pair.
_SAME = (
    "benchmark",
    "data_sha256",
    "questions",
    "prompt",
    "temperature",
    "top_p",
    "max_tokens",
    "thinking",
    "seed",
    "n_repeats",
    "sgl_eval",
)


@dataclass(frozen=True)
class Run:
    """A finished run folder. `scores[i]` are question i's repeats; None: that request failed."""

    folder: Path
    settings: dict[str, Any]
    metrics: dict[str, Any]
    ids: list[str]
    problems: list[str]
    scores: list[list[float | None]]
    answers: list[list[str | None]]

    @property
    def label(self) -> str:
        """How reports name it: the kernel if the server told it, else the folder."""
        return self.settings.get("server", {}).get("kernel") or self.folder.name


def load_run(folder: Path) -> Run:
    """Read a run folder. Raises `Refusal` if the run is not finished."""
    if not (folder / "metrics.json").exists():
        raise Refusal(f"{folder} holds no finished run (no metrics.json): run its `hopper-moe eval` command to the end first.")
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        settings = metrics.pop("settings")
        questions: dict[str, list[dict[str, Any]]] = {}
        with (folder / "records.jsonl").open(encoding="utf-8") as records:  # not splitlines: an answer may hold U+2028
            for record in map(json.loads, records):
                questions.setdefault(record["id"], []).append(record)
    except (OSError, ValueError, KeyError) as error:
        raise Refusal(f"{folder} is no run of ours, or damaged ({error!r}): repeat its `hopper-moe eval` command.") from error
    if len(questions) != settings["questions"] or {len(rows) for rows in questions.values()} != {settings["n_repeats"]}:
        raise Refusal(
            f"{folder}: records.jsonl holds {sum(map(len, questions.values()))} answers, not {settings['questions']} x "
            f"{settings['n_repeats']}: repeat its `hopper-moe eval` command."
        )
    return Run(
        folder,
        settings,
        metrics,
        list(questions),
        [rows[0]["problem"] for rows in questions.values()],
        [[r["score"] for r in rows] for rows in questions.values()],
        [[r["predicted_answer"] for r in rows] for rows in questions.values()],
    )


def check_pair(a: Run, b: Run) -> None:
    """Raises `Refusal` unless both runs asked the same questions in the same way."""
    for key in _SAME:
        if a.settings[key] != b.settings[key]:
            raise Refusal(
                f"{a.folder} has {key}={a.settings[key]!r} and {b.folder} {b.settings[key]!r}: only equal runs form pairs."
            )
    if a.ids != b.ids:
        raise Refusal(f"{a.folder} and {b.folder} hold different question ids: run both on the same data.")


def _complete(scores: list[float | None]) -> list[float] | None:
    """The scores of a question of which every repeat was answered, else None."""
    known = [score for score in scores if score is not None]
    return known if len(known) == len(scores) else None


def compare(a: Run, b: Run, margin: float) -> dict[str, Any]:
    """Difference B - A of pass@1 over questions answered in both. Differences up to `margin` (0..1) do not matter.

    One repeat: McNemar's exact test and the Bonett-Price (2012) interval of paired proportions. More repeats: sign-flip
    permutation test and percentile bootstrap of the per-question differences, which treats questions as the sample.
    """
    check_pair(a, b)
    both = zip(map(_complete, a.scores), map(_complete, b.scores), strict=True)
    pairs = [(i, x, y) for i, (x, y) in enumerate(both) if x is not None and y is not None]
    if not pairs:
        raise Refusal(f"{a.folder} and {b.folder} have no question that both answered: repeat the runs.")
    mean_a = np.array([np.mean(x) for _, x, _ in pairs])
    mean_b = np.array([np.mean(y) for _, _, y in pairs])
    difference = mean_b - mean_a
    lost = [i for (i, _, _), d in zip(pairs, difference, strict=True) if d < 0]
    won = [i for (i, _, _), d in zip(pairs, difference, strict=True) if d > 0]
    single = a.settings["n_repeats"] == 1
    low, high = bonett_price(len(won), len(lost), len(pairs)) if single else bootstrap_interval(difference)
    p_value = mcnemar(len(won), len(lost)) if single else permutation_p(difference)
    bootstrap_low, bootstrap_high = bootstrap_interval(difference)
    return {
        "a": str(a.folder),
        "b": str(b.folder),
        "label_a": a.label,
        "label_b": b.label,
        "questions": len(a.ids),
        "paired_questions": len(pairs),
        "n_repeats": a.settings["n_repeats"],
        "error_rate_a": a.metrics["error_rate"],
        "error_rate_b": b.metrics["error_rate"],
        "accuracy_a": float(mean_a.mean()),
        "accuracy_b": float(mean_b.mean()),
        "interval95_a": list(_interval(mean_a)),
        "interval95_b": list(_interval(mean_b)),
        "difference": float(difference.mean()),
        "interval95": [low, high],
        "interval_method": "Bonett-Price" if single else "bootstrap over questions",
        "bootstrap95": [bootstrap_low, bootstrap_high],
        "p_value": p_value,
        "test": "McNemar, exact" if single else "sign-flip permutation over questions",
        "won": [a.ids[i] for i in won],
        "lost": [a.ids[i] for i in lost],
        "margin": margin,
        "verdict": verdict(float(difference.mean()), low, high, p_value, margin),
    }


def verdict(difference: float, low: float, high: float, p_value: float, margin: float) -> str:
    """ "same": the interval lies within the margin. "worse"/"better": significantly different, and not within the margin.
    "undecided": the interval reaches beyond the margin, but no difference is shown either; more questions are needed.
    """
    if -margin <= low and high <= margin:
        return "same"
    if p_value < SIGNIFICANCE and difference != 0:
        return "worse" if difference < 0 else "better"
    return "undecided"


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided McNemar p-value from the discordant counts."""
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def bonett_price(won: int, lost: int, pairs: int) -> tuple[float, float]:
    """95 % interval of a difference of paired proportions (Bonett and Price 2012): one is added to each discordant count, so the
    interval has a width even when no question flipped.
    """
    p_won, p_lost = (won + 1) / (pairs + 2), (lost + 1) / (pairs + 2)
    centre = p_won - p_lost
    half = Z95 * math.sqrt((p_won + p_lost - centre**2) / (pairs + 2))
    return max(-1.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(difference: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over questions (fixed seed); (d, d) when all differences are equal."""
    if np.ptp(difference) == 0:
        return float(difference[0]), float(difference[0])
    result = stats.bootstrap(
        (difference,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0), batch=500
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def permutation_p(difference: np.ndarray) -> float:
    """Two-sided p-value of the mean under random signs (fixed seed)."""
    if not difference.any():
        return 1.0
    result = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=np.random.default_rng(0), batch=500
    )
    return float(result.pvalue)


def questions_needed(result: dict[str, Any]) -> int | None:
    """Questions that would bring the interval's half-width below the margin, at the spread seen; None without a margin."""
    half = (result["interval95"][1] - result["interval95"][0]) / 2
    return math.ceil(result["paired_questions"] * (half / result["margin"]) ** 2) if result["margin"] > 0 else None


def _interval(means: Sequence[float] | np.ndarray) -> tuple[float, float]:
    values = np.asarray(means)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return wilson(float(values.mean()), error, len(values))
