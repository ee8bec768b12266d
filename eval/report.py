"""Markdown and PNG report of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hopper_moe.eval.paired import Run, questions_needed

SHOWN_FLIPS = 20
_MEANING = {
    "same": "the whole interval lies within the margin",
    "worse": "B is significantly worse, and not within the margin",
    "better": "B is significantly better, and not within the margin",
    "undecided": "the interval reaches beyond the margin, but no difference is shown: more questions are needed",
}


def points(value: float) -> str:
    """A difference of rates in percentage points, with sign."""
    return f"{value * 100:+.2f} points"


def one_line(result: dict[str, Any]) -> str:
    """The comparison in one line."""
    low, high = result["interval95"]
    return (
        f"{result['label_b']} against {result['label_a']}: {points(result['difference'])} "
        f"[{low * 100:+.2f}, {high * 100:+.2f}], p = {result['p_value']:.2g} ({result['test']}), "
        f"{len(result['won'])} won and {len(result['lost'])} lost of {result['paired_questions']}: {result['verdict']} "
        f"at a margin of {result['margin'] * 100:g} points"
    )


def write_report(result: dict[str, Any], a: Run, b: Run, out: Path) -> None:
    """report.md, report.png and compare.json in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "report.md").write_text(markdown(result, a, b), encoding="utf-8", errors="backslashreplace")
    plot(result, out / "report.png")


def markdown(result: dict[str, Any], a: Run, b: Run) -> str:
    """The whole report as Markdown."""
    low, high = result["interval95"]
    lines = [
        f"# {b.settings['benchmark']}: {result['label_b']} (B) against {result['label_a']} (A)",
        "",
        f"**{result['verdict']}** at a margin of {result['margin'] * 100:g} points: {_MEANING[result['verdict']]}.",
        "",
        f"Difference B - A of pass@1: **{points(result['difference'])}**, 95 % interval [{low * 100:+.2f}, {high * 100:+.2f}] "
        f"({result['interval_method']}), p = {result['p_value']:.3g} ({result['test']}), "
        f"{result['paired_questions']} paired questions x {result['n_repeats']}.",
        "",
        "| | A | B |",
        "|---|---|---|",
        f"| server | {result['label_a']} | {result['label_b']} |",
        f"| pass@1 | {_rate(result, 'a')} | {_rate(result, 'b')} |",
    ]
    for key in ("no_answer", "stop_rate", "truncated_rate", "error_rate"):
        lines.append(f"| {key} | {a.metrics[key]:.2%} | {b.metrics[key]:.2%} |")
    lines += [f"| folder | {result['a']} | {result['b']} |", ""]
    if result["verdict"] == "undecided" and questions_needed(result):
        lines += [f"About {questions_needed(result)} questions would be needed for an interval no wider than the margin.", ""]
    if result["paired_questions"] < result["questions"]:
        left = result["questions"] - result["paired_questions"]
        lines += [f"{left} questions are left out: a request for them failed in one of the runs.", ""]
    lines += [
        "## Flipped questions",
        "",
        f"{len(result['lost'])} right in A and worse in B, {len(result['won'])} the other way round.",
        "",
    ]
    lines += _flips(result, a, b)
    asked = {k: v for k, v in a.settings.items() if k not in ("base_url", "model", "server", "data")}
    lines += ["## Settings", "", "```json", json.dumps(asked, indent=1), "```", ""]
    return "\n".join(lines)


def _rate(result: dict[str, Any], side: str) -> str:
    value, interval = result[f"accuracy_{side}"], result[f"interval95_{side}"]
    return f"{value:.2%} [{interval[0]:.2%}, {interval[1]:.2%}]"


def _flips(result: dict[str, Any], a: Run, b: Run) -> list[str]:
    ids = result["lost"] + result["won"]
    if not ids:
        return []
    lines = ["| id | question | A answered | B answered | B is |", "|---|---|---|---|---|"]
    index = {question: i for i, question in enumerate(a.ids)}
    for question in ids[:SHOWN_FLIPS]:
        i = index[question]
        text = " ".join(a.problems[i].split()).replace("|", "\\|")[:100]
        kind = "worse" if question in result["lost"] else "better"
        lines.append(f"| {question} | {text} | {_answers(a, i)} | {_answers(b, i)} | {kind} |")
    if len(ids) > SHOWN_FLIPS:
        lines += ["", f"... and {len(ids) - SHOWN_FLIPS} more, all in compare.json."]
    return [*lines, ""]


def _answers(run: Run, i: int) -> str:
    return ", ".join(str(x).replace("|", "\\|") for x in run.answers[i][:4])


def plot(result: dict[str, Any], path: Path) -> None:
    """Three panels: both accuracies, the difference against the margin, the flips."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.6, 1])
    names = [f"A: {result['label_a']}", f"B: {result['label_b']}"]
    values = [100 * result["accuracy_a"], 100 * result["accuracy_b"]]
    ranges = [[100 * v for v in result[key]] for key in ("interval95_a", "interval95_b")]
    errors = [[v - r[0] for v, r in zip(values, ranges, strict=True)], [r[1] - v for v, r in zip(values, ranges, strict=True)]]
    left.bar(names, values, yerr=errors, capsize=5, color=["#7f8fa6", "#2f6f9f"], width=0.6)
    for x, (value, limits) in enumerate(zip(values, ranges, strict=True)):
        left.annotate(f"{value:.1f}", (x, limits[1]), xytext=(0, 4), textcoords="offset points", ha="center")
    left.set(ylabel="pass@1, %", ylim=(0, 112), title="Accuracy, 95 % interval")

    low, high = (100 * v for v in result["interval95"])
    margin = 100 * result["margin"]
    middle.axvspan(-margin, margin, color="#d8ead3", label=f"margin of {margin:g} points")
    middle.axvline(0, color="black", linewidth=0.8)
    centre = 100 * result["difference"]
    middle.hlines(0, low, high, color="#2f6f9f", linewidth=3)
    middle.plot([centre], [0], "o", color="#2f6f9f", markersize=8)
    reach = 1.25 * max(abs(low), abs(high), margin, 0.1)
    middle.set(
        xlim=(-reach, reach), ylim=(-1, 1), yticks=[], xlabel="B - A, percentage points", title=f"Difference: {result['verdict']}"
    )
    middle.legend(loc="upper right", frameon=False)

    counts = [len(result["lost"]), len(result["won"])]
    right.barh(["lost by B", "won by B"], counts, color=["#b5523b", "#4f8a5b"], height=0.5)
    for y, count in enumerate(counts):
        right.annotate(str(count), (count, y), xytext=(4, 0), textcoords="offset points", va="center")
    right.set(xlabel=f"questions of {result['paired_questions']}", title="Flipped", xlim=(0, 1.2 * max(counts + [1])))
    figure.savefig(path, dpi=130)
