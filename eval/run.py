"""One evaluation run: ask every question n times, grade, report. Killed at any point, the same call carries on where it was."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sgl_eval.runner import run_examples
from sgl_eval.types import Example, GenConfig, Sample
from tqdm import tqdm

from hopper_moe.eval.benchmarks import Benchmark
from hopper_moe.eval.journal import LOCK, Journal, RunLock, json_line
from hopper_moe.eval.sampler import GIVE_UP_AFTER, Sampler
from hopper_moe.eval.statistics import Attempt, active_seconds, summarize
from hopper_moe.launch.signals import handled
from hopper_moe.quantization.errors import Refusal

COMPLETE, INTERRUPTED, NO_SERVER = 0, 130, 4
_OURS = ("settings.tmp", LOCK)  # what a run killed before its first question leaves


@dataclass(frozen=True)
class Options:
    """How to ask. `seed` None sends no seed; otherwise every (question, repeat) gets its own, derived from it."""

    n_repeats: int
    temperature: float
    top_p: float
    max_tokens: int | None
    thinking: bool
    seed: int | None
    extra_body: dict[str, Any] | None = None  # fields beyond OpenAI's protocol that the user asked for


@dataclass(frozen=True)
class Graded:
    """One answer and its grade; `score` None: the request failed."""

    sample: Sample
    score: float | None
    answer: str | None

    def attempt(self) -> Attempt:
        s = self.sample
        tokens = (s.completion_tokens or 0, s.prompt_tokens or 0)
        return Attempt(self.score, self.answer, s.finish_reason, *tokens, s.generation_start_time, s.generation_end_time)


def request_seed(seed: int | None, example_id: str, repeat: int) -> int | None:
    """Seed of one request: stable over restarts, different for every question and repeat."""
    if seed is None:
        return None
    return int.from_bytes(hashlib.sha256(f"{seed}/{example_id}/{repeat}".encode()).digest()[:4]) >> 1


def run_settings(
    benchmark: Benchmark,
    options: Options,
    base_url: str,
    sampler: Sampler,
    recorded_url: str | None = None,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Everything that decides the answers; a run directory only ever holds answers of one setting."""
    return {
        "benchmark": benchmark.name,
        "data": benchmark.source,
        "data_sha256": benchmark.data_sha256,
        "questions": len(benchmark.examples),
        "prompt": benchmark.prompt_name,
        "base_url": recorded_url or sampler.endpoint.shown_url,
        "model": sampler.model,
        "checkpoint": checkpoint,
        "server": _server_says(sampler),
        **asdict(options),
        "sgl_eval": version("sgl-eval"),
    }


def _server_says(sampler: Sampler) -> dict[str, Any]:
    """The model entry of /models without what changes at every start: the CPU host names its kernel there."""
    entry = next((e for e in sampler.models if e["id"] == sampler.model), {})
    said = {k: v for k, v in entry.items() if k in ("kernel", "root", "max_model_len", "owned_by")}
    return json.loads(sampler.endpoint.shown(json.dumps(said)))


def default_directory(settings: dict[str, Any]) -> Path:
    """The folder that a repeated call finds again: named after benchmark, model and a digest of all settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    model = "".join(c if c.isprintable() else "_" for c in Path(str(settings["model"])).name)[:100] or "model"
    return Path("eval-runs") / f"{settings['benchmark']}-{model}-{digest}"


def claim_directory(out: Path) -> RunLock:
    """Make the run directory ours until the lock is closed. Raises `Refusal` for a folder of something else, and while another
    run writes in it.
    """
    try:
        if out.exists() and not (out / "settings.json").exists() and any(p.name not in _OURS for p in out.iterdir()):
            raise Refusal(f"{out} is not empty and holds no run of ours: give another --out.")
        out.mkdir(parents=True, exist_ok=True)
        return RunLock(out)
    except OSError as error:
        raise Refusal(f"{out} cannot be a run folder ({error.strerror}): give another --out.") from error


def open_directory(out: Path, settings: dict[str, Any], fresh: bool) -> None:
    """Prepare the claimed run directory. Raises `Refusal` when it holds a run with other settings."""
    path, temporary = out / "settings.json", out / "settings.tmp"
    if path.exists() and not fresh:
        known = _known_settings(path)
        for key in settings:
            if known.get(key) != settings[key]:
                raise Refusal(
                    f"{out} holds a run with {key}={known.get(key)!r}, not {settings[key]!r}: "
                    "give another --out, or --fresh to start over."
                )
        return
    for name in ("metrics.json", "records.jsonl", "answers.jsonl", "settings.json"):
        (out / name).unlink(missing_ok=True)
    temporary.write_text(json.dumps(settings, indent=1) + "\n")
    temporary.replace(path)


def _known_settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise Refusal(f"{path} is damaged ({error}): give another --out, or --fresh to start over.") from error


class _Progress:
    """The bar, and the grades so far; both are touched by the main thread only."""

    def __init__(self, name: str, total: int, replayed: frozenset[tuple[str, int]]) -> None:
        self._replayed = replayed
        self.graded: dict[tuple[str, int], Graded] = {}
        self._right, self._errors = 0.0, 0
        interval = 0.2 if sys.stderr.isatty() else 5.0  # seconds between redraws: a log file needs few lines
        bar = {"desc": name, "unit": "answer", "dynamic_ncols": True, "smoothing": 0.05, "mininterval": interval}
        self.bar = tqdm(total=total, initial=len(replayed), **bar)

    def __call__(self, example: Example, repeat: int, sample: Sample, score: float, extracted: str | None) -> None:
        failed = sample.finish_reason == "error"
        self.graded[example.id, repeat] = Graded(sample, None, None) if failed else Graded(sample, score, extracted)
        self._errors += failed
        self._right += 0 if failed else score
        accuracy = self._right / max(1, len(self.graded) - self._errors)
        self.bar.set_postfix({"accuracy": f"{accuracy:.1%}", "errors": self._errors}, refresh=False)
        if (example.id, repeat) not in self._replayed:
            self.bar.update(1)


def _ask(benchmark: Benchmark, sampler: Sampler, options: Options, journal: Journal, example: Example, repeat: int) -> Sample:
    """The journal's answer, or the server's, which the journal keeps unless the request failed."""
    known = journal.answers.get((example.id, repeat))
    if known is not None:
        return known
    gen = GenConfig(
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_tokens,
        seed=request_seed(options.seed, example.id, repeat),
        chat_template_kwargs={"thinking": True} if options.thinking else None,
        extra_body=options.extra_body,
    )
    sample = sampler(benchmark.messages(example), gen)
    if sample.finish_reason != "error":
        try:
            journal.add(example.id, repeat, gen.seed, sample)
        except Refusal:
            sampler.abort()  # nothing further is asked whose answer could not be kept
            raise
    return sample


def evaluate(
    benchmark: Benchmark, sampler: Sampler, options: Options, settings: dict[str, Any], out: Path, concurrency: int
) -> tuple[int, dict[str, Any] | None]:
    """(exit status, metrics). Status `INTERRUPTED` (Ctrl-C, SIGTERM, SIGHUP) and `NO_SERVER` (nothing was ever answered) come
    without metrics.

    Writes answers.jsonl while it runs, then records.jsonl and metrics.json. Call it from the main thread: the graders' timeouts
    are signals.
    """
    journal = Journal(out / "answers.jsonl")
    sampler.answered = sampler.answered or bool(journal.answers)
    total = len(benchmark.examples) * options.n_repeats
    progress = _Progress(benchmark.name, total, frozenset(journal.answers))
    if journal.answers:
        note = f"{out}: {len(journal.answers)} of {total} answers are there and not asked again (--fresh asks all again)"
        progress.bar.write(note, file=sys.stderr)

    try:
        with handled(lambda *_: sampler.abort()):
            run_examples(
                name=benchmark.name,
                examples=benchmark.examples,
                sample_fn=partial(_ask, benchmark, sampler, options, journal),
                score_one_fn=lambda e, s: (0.0, None) if s.finish_reason == "error" else benchmark.grade(e, s),
                num_threads=concurrency,
                n_repeats=options.n_repeats,
                progress=False,
                on_sample_scored=progress,
            )
    finally:
        progress.bar.close()
        journal.close()
    if sampler.hopeless:
        print(
            f"gave up: {GIVE_UP_AFTER} questions in a row got no answer, the last because {sampler.last_error}; "
            f"{len(journal.answers)} of {total} answers are in {out}, the same command carries on",
            file=sys.stderr,
        )
        return NO_SERVER, None
    if len(progress.graded) < total:
        print(f"stopped with {len(journal.answers)} of {total} answers in {out}: the same command carries on", file=sys.stderr)
        return INTERRUPTED, None
    metrics = write_report(benchmark, options, settings, progress.graded, sampler, out)
    return COMPLETE, metrics


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def write_report(
    benchmark: Benchmark,
    options: Options,
    settings: dict[str, Any],
    graded: dict[tuple[str, int], Graded],
    sampler: Sampler,
    out: Path,
) -> dict[str, Any]:
    """records.jsonl (one line per request, in question order) and metrics.json; the metrics are returned too."""
    questions: list[list[Attempt]] = []
    unfinished = out / "records.tmp"
    with unfinished.open("wb") as records:
        for e in benchmark.examples:
            of_question = [graded[e.id, repeat] for repeat in range(options.n_repeats)]
            questions.append([g.attempt() for g in of_question])
            for repeat, g in enumerate(of_question):
                record = {
                    "id": e.id,
                    "repeat": repeat,
                    "seed": request_seed(options.seed, e.id, repeat),
                    "problem": e.inputs["problem"],
                    "expected_answer": e.target,
                    "generation": g.sample.text,
                    "reasoning_content": g.sample.reasoning_content,
                    "predicted_answer": g.answer,
                    "score": g.score,
                    "finish_reason": g.sample.finish_reason,
                    "prompt_tokens": g.sample.prompt_tokens,
                    "completion_tokens": g.sample.completion_tokens,
                    "start": g.sample.generation_start_time,
                    "end": g.sample.generation_end_time,
                }
                records.write(json_line(record))
    unfinished.replace(out / "records.jsonl")
    metrics: dict[str, Any] = {
        name: None if _is_nan(value) else value for name, value in summarize(questions).items()
    }  # JSON has no NaN
    samples = [g.sample for g in graded.values() if g.score is not None]
    metrics["reasoning_only"] = sum(not s.text.strip() and bool((s.reasoning_content or "").strip()) for s in samples)
    seconds = active_seconds([a for q in questions for a in q])
    metrics["timing"] = {
        "active_seconds": seconds,
        "output_tokens_per_second": metrics["completion_tokens"] / seconds if seconds else None,
        "requests_this_session": sampler.requests,
        "failed_requests_this_session": sampler.failed_requests,
    }
    temporary = out / "metrics.tmp"
    temporary.write_text(json.dumps({**metrics, "settings": settings}, indent=1) + "\n")
    temporary.replace(out / "metrics.json")
    return metrics
