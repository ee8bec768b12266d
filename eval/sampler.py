"""Asks the endpoint: tries, waits between them, counts of failed requests, and an early end when nothing works any more."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from sgl_eval.runner import WorkerAborted
from sgl_eval.sampler import _raise_nofile_soft_limit
from sgl_eval.types import GenConfig, MessageList, Sample

from hopper_moe.eval.endpoint import Endpoint
from hopper_moe.eval.faults import RequestFailed, asking_again_helps
from hopper_moe.quantization.errors import Refusal

GIVE_UP_AFTER = 20  # questions in a row that were given up
LONGEST_ANSWER = 14400.0  # seconds; sgl-eval's and NeMo-Skills' own
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between tries: doubled from one to the other


def pause_after(trial: int) -> float:
    """Seconds between try number `trial` (from 0) and the next."""
    return min(FIRST_PAUSE * 2.0 ** min(trial, 30), LONGEST_PAUSE)


def served_models(endpoint: Endpoint, model: str | None, tries: int) -> list[dict[str, Any]]:
    """What /models lists; [] if it lists nothing and `model` is named. Raises `Refusal` for an endpoint that cannot be used.

    A server that says it is not ready yet is asked again, as for questions.
    """
    shown = endpoint.shown_url
    for trial in range(tries):
        try:
            models = endpoint.models()
        except RequestFailed as error:
            failure = error
        else:
            if not models and model is None:
                raise Refusal(f"{shown} lists no model: name it with --model.")
            return models
        if failure.status is None or not asking_again_helps(failure.status) or not failure.again:
            break
        if trial + 1 < tries:
            time.sleep(max(failure.wait or 0.0, pause_after(trial)))
    if failure.replied and model is not None:  # an endpoint without /models
        print(f"note: {shown} does not list its models: {failure}; {model} is asked for all the same", file=sys.stderr)
        return []
    if not failure.replied:
        raise Refusal(f"{shown} does not answer /models: {failure}: check --base-url and that the server is up.") from failure
    further = "" if failure.status in (401, 403) else "; an endpoint without /models is used with --model NAME"
    raise Refusal(f"{shown} does not list its models: {failure}{further}.") from failure


class Sampler:
    """Tries each question `tries` times, and never silently: every failed request is counted. A question whose tries are used up,
    or that the server refuses, is a `Sample` with finish_reason "error".

    Between two tries are 1, 2, 4, ... 60 seconds, or what the server's Retry-After asks for; then no question is sent before.
    After `GIVE_UP_AFTER` such questions in a row, with no answer to any other between, the run is `hopeless` and ends. Refusals
    of single questions (400, 413, 422) stop to count when `answered` says that there are answers.
    """

    def __init__(self, base_url: str, model: str | None, api_key: str, tries: int, longest: float = LONGEST_ANSWER) -> None:
        _raise_nofile_soft_limit()
        self.endpoint = Endpoint(base_url, api_key, longest)
        self.models = served_models(self.endpoint, model, tries)
        self.model = model or self.models[0]["id"]
        self.tries = tries
        self.requests = self.failed_requests = 0
        self.last_error = ""
        self.hopeless = False
        self.answered = False  # a resumed run sets it
        self._given_up = 0  # questions in a row
        self._not_before = 0.0  # by the monotonic clock: what a Retry-After asked for
        self._lock = threading.Lock()
        self._abort_event = threading.Event()
        self._aborting = False

    @property
    def aborted(self) -> bool:
        return self._abort_event.is_set()

    def __call__(self, messages: MessageList, gen: GenConfig) -> Sample:
        """The answer, or a `Sample` that says "error". Raises `WorkerAborted` when the run ends before."""
        request = self._request(messages, gen)
        for trial in range(self.tries):
            while (early := self._not_before - time.monotonic()) > 0:
                self._pause(early)
            if self.aborted:
                raise WorkerAborted()
            try:
                sample = self.endpoint.ask(**request)
            except RequestFailed as failure:
                if self.aborted:
                    raise WorkerAborted() from failure
                last = trial + 1 == self.tries or not failure.again
                self._failed(failure, last)
                if last:
                    break
                self._pause(pause_after(trial))
            else:
                with self._lock:
                    self.requests += 1
                    self._given_up, self.answered = 0, True
                return sample
        return Sample(text="", finish_reason="error")

    def abort(self) -> None:
        """End the run: requests in flight fail now, and nothing is asked any more. Safe in a signal handler."""
        if self._aborting:  # a second signal inside the first one's `set`, which holds a lock
            return
        self._aborting = True
        self._abort_event.set()
        self.endpoint.interrupt()

    def _request(self, messages: MessageList, gen: GenConfig) -> dict[str, Any]:
        """Only OpenAI's own fields, and beyond them what `gen` asks for: strict endpoints refuse the rest."""
        optional = {"max_tokens": gen.max_tokens, "seed": gen.seed}
        beyond = dict(gen.extra_body or {})
        if gen.chat_template_kwargs:
            beyond["chat_template_kwargs"] = gen.chat_template_kwargs
        return {
            "model": self.model,
            "messages": messages,
            "temperature": gen.temperature,
            "top_p": gen.top_p,
            "extra_body": beyond or None,
            **{name: value for name, value in optional.items() if value is not None},
        }

    def _pause(self, seconds: float) -> None:
        if self._abort_event.wait(seconds):
            raise WorkerAborted()

    def _failed(self, failure: RequestFailed, last: bool) -> None:
        with self._lock:
            self.requests += 1
            self.failed_requests += 1
            self.last_error = str(failure)
            if failure.again and failure.wait:
                self._not_before = max(self._not_before, time.monotonic() + failure.wait)
            if last and not (failure.of_this_question_only and self.answered):
                self._given_up += 1
                self.hopeless = self.hopeless or self._given_up >= GIVE_UP_AFTER
        if self.hopeless:
            self.abort()
