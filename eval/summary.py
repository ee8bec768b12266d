"""A run's metrics as lines for people."""

from __future__ import annotations

from typing import Any


def percent(value: float | None) -> str:
    """A rate as a percentage; None: not measured."""
    return "n/a" if value is None else f"{value:.2%}"


def format_summary(name: str, metrics: dict[str, Any]) -> str:
    """The table printed at the end of a run."""
    n = metrics["n_repeats"]
    low, high = metrics["interval95"] or (None, None)
    rows = [
        (
            f"pass@1[avg-of-{n}]",
            f"{percent(metrics['pass@1'])} +/- {percent(metrics['standard_error'])} (standard error over questions), "
            f"95 % interval {percent(low)} to {percent(high)}",
        )
    ]
    if n > 1:
        rows += [
            ("", f"+/- {percent(metrics['standard_error_sampling'])} (standard error over repeats: sampling noise only)"),
            (f"pass@{n}", percent(metrics[f"pass@{n}"])),
            (f"majority@{n}", percent(metrics[f"majority@{n}"])),
        ]
    for key in ("no_answer", "stop_rate", "truncated_rate"):
        rows.append((key, percent(metrics[key])))
    failed = metrics["timing"]["failed_requests_this_session"]
    asked = metrics["timing"]["requests_this_session"]
    rows.append(("error_rate", f"{percent(metrics['error_rate'])} ({metrics['errors']} without an answer, not counted as wrong)"))
    if failed:
        rows.append(("failed requests", f"{failed} of {asked} in this session, tries that succeeded later included"))
    speed = metrics["timing"]["output_tokens_per_second"]
    rows.append(("tokens/s", f"{speed:.0f} ({metrics['completion_tokens']} generated)" if speed else "n/a"))
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {value}" for label, value in rows]
    return "\n".join([f"{name}: {metrics['questions']} questions x {n}", *lines])


def reasoning_hint(metrics: dict[str, Any]) -> str | None:
    """One sentence when answers have no text but reasoning: the server's parser took everything, or there was no room left."""
    count = metrics["reasoning_only"]
    if not count:
        return None
    return (
        f"hint: {count} answers have no content, all is in reasoning_content: raise --max-tokens if they are truncated; "
        "otherwise start the server with its --reasoning-parser, or without one if the model does not think."
    )
