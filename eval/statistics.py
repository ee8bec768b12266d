"""Numbers of one run. An unanswered request is an error, never a wrong answer: it leaves the denominator and is reported apart.

With no errors, pass@1[avg-of-n], its spread, pass@n, majority@n and no_answer equal sgl-eval's own (NeMo-Skills definitions),
which the contract test checks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Attempt:
    """One repeat of one question; `score` None: the request failed."""

    score: float | None
    answer: str | None
    finish_reason: str | None
    completion_tokens: int = 0
    prompt_tokens: int = 0
    start: float | None = None
    end: float | None = None


def summarize(questions: Sequence[Sequence[Attempt]]) -> dict[str, Any]:
    """Metrics over questions x repeats (every question has the same number of attempts, at least one). Rates are in 0..1.

    pass@1 averages, over questions with an answer, the share of right answers. `standard_error` treats questions as a sample
    (clustered over repeats), `standard_error_sampling` only the repeats: the spread of whole-run accuracies over sqrt(n).
    pass@n and majority@n use the questions whose n requests were all answered.
    """
    n = len(questions[0])
    answered = [[a for a in q if a.score is not None] for q in questions]
    means = np.array([_mean_score(q) for q in answered if q])
    flat = [a for q in answered for a in q]
    planned = len(questions) * n
    accuracy = float(means.mean()) if len(means) else math.nan
    error = float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else math.nan
    low, high = wilson(accuracy, error, len(means))
    metrics: dict[str, Any] = {
        "questions": len(questions),
        "n_repeats": n,
        "pass@1": accuracy,
        "standard_error": error,
        "interval95": None if math.isnan(low) else [low, high],
    }
    if n > 1:
        runs = [[q[i] for q in questions if q[i].score is not None] for i in range(n)]
        run_means = [_mean_score(r) for r in runs if r]
        std = float(np.std(run_means, ddof=1)) if len(run_means) > 1 else math.nan
        metrics["std_between_repeats"] = std
        metrics["standard_error_sampling"] = std / math.sqrt(len(run_means)) if run_means else math.nan
        complete = [q for q in answered if len(q) == n]
        metrics[f"pass@{n}"] = _mean([float(any(a.score for a in q)) for q in complete])
        metrics[f"majority@{n}"] = _mean([majority(q) for q in complete])
    metrics |= {
        "no_answer": _mean([float(a.answer is None) for a in flat]),
        "stop_rate": _mean([float(a.finish_reason == "stop") for a in flat]),
        "truncated_rate": _mean([float(a.finish_reason == "length") for a in flat]),
        "error_rate": (planned - len(flat)) / planned,
        "errors": planned - len(flat),
        "completion_tokens": sum(a.completion_tokens for a in flat),
        "prompt_tokens": sum(a.prompt_tokens for a in flat),
    }
    return metrics


def majority(attempts: Sequence[Attempt]) -> float:
    """Score of the most frequent answer; ties share. No answer at all counts as wrong."""
    counts = Counter((a.answer, a.score) for a in attempts if a.answer is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    return float(np.mean([score for (_, score), count in counts.items() if count == most]))


def wilson(mean: float, standard_error: float, questions: int) -> tuple[float, float]:
    """95 % Wilson score interval of a mean in [0, 1], its sample size being what the standard error says.

    Without spread (all right or all wrong) the number of questions is used, so that 100 % never comes with a width of zero.
    """
    if not questions or math.isnan(mean):
        return math.nan, math.nan
    size = mean * (1 - mean) / standard_error**2 if standard_error and not math.isnan(standard_error) else questions
    centre = (mean + Z95**2 / (2 * size)) / (1 + Z95**2 / size)
    half = Z95 * math.sqrt(mean * (1 - mean) / size + Z95**2 / (4 * size**2)) / (1 + Z95**2 / size)
    return max(0.0, centre - half), min(1.0, centre + half)


def active_seconds(attempts: Sequence[Attempt]) -> float:
    """Seconds during which at least one request was being answered: the same whether a run was interrupted or not."""
    total, end = 0.0, -math.inf
    for begun, ended in sorted((a.start, a.end) for a in attempts if a.start is not None and a.end is not None):
        total += max(0.0, ended - max(begun, end))
        end = max(end, ended)
    return total


def _mean_score(answered: Sequence[Attempt]) -> float:
    return float(np.mean([a.score for a in answered if a.score is not None]))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
