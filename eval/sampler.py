"""Asks the endpoint: sgl-eval's sampler with our retry policy, counts of failed requests, and an early end when nothing works."""

from __future__ import annotations

import threading
import time
from typing import Any

import openai
from sgl_eval.runner import WorkerAborted
from sgl_eval.sampler import ChatCompletionSampler
from sgl_eval.types import GenConfig, MessageList, Sample

from hopper_moe.eval.interruptible import InterruptibleClient
from hopper_moe.moe_backends.errors import Refusal

GIVE_UP_AFTER = 20  # failed requests with not one success
LISTING_TIMEOUT = 30.0  # seconds for /models, which needs no generation


def served_models(base_url: str, api_key: str, model: str | None) -> list[dict[str, Any]]:
    """What /models lists, [] if it lists nothing and `model` is named. Raises `Refusal` for an endpoint that cannot be used."""
    try:
        client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=LISTING_TIMEOUT, max_retries=0)
        models = [entry.model_dump() for entry in client.models.list().data]
    except openai.APIStatusError as error:
        if model is not None:  # an endpoint without /models
            return []
        raise Refusal(f"{base_url} does not list its models ({error}): name the model with --model.") from error
    except (openai.OpenAIError, UnicodeError) as error:
        raise Refusal(f"{base_url} does not answer /models ({error}): check --base-url and --api-key.") from error
    if not models and model is None:
        raise Refusal(f"{base_url} lists no model: name it with --model.")
    return models


class Sampler(ChatCompletionSampler):
    """Tries each question `tries` times with 1, 2, 4, ... seconds between, and never silently: every failed request is counted.

    A question whose tries are used up is a `Sample` with finish_reason "error". HTTP 4xx is not tried again, but for 408 and 429.
    """

    def __init__(self, base_url: str, model: str | None, api_key: str, tries: int) -> None:
        self.models = served_models(base_url, api_key, model)
        super().__init__(base_url=base_url, model=model or self.models[0]["id"], api_key=api_key, max_retries=tries)
        self._interruptible = InterruptibleClient(self._http.timeout)
        self.client = self.client.with_options(max_retries=0, http_client=self._interruptible)
        self._http.close()
        self.requests = self.failed_requests = 0
        self.last_error = ""
        self.hopeless = False
        self._count_lock = threading.Lock()
        self._aborting = False

    def __call__(self, messages: MessageList, gen: GenConfig | None = None) -> Sample:
        kwargs = self._build_kwargs(messages, gen or GenConfig())
        for trial in range(self.max_retries):
            if self.aborted:
                raise WorkerAborted()
            start = time.time()
            try:
                response = self.client.chat.completions.create(**kwargs)
                sample = self._to_sample(response, start=start, end=time.time())
                if sample.finish_reason not in ("stop", "length", None):
                    raise RuntimeError(f"the server ended the answer with finish_reason {sample.finish_reason!r}")
            except Exception as error:  # openai, httpx and JSON errors alike: the server did not answer this request
                if self.aborted:
                    raise WorkerAborted() from error
                self._failed(error)
                status = getattr(error, "status_code", 500)
                if 400 <= status < 500 and status not in (408, 429):
                    break
                if trial + 1 < self.max_retries and self._abort_event.wait(2**trial):
                    raise WorkerAborted() from error
            else:
                with self._count_lock:
                    self.requests += 1
                return sample
        return Sample(text="", finish_reason="error")

    def abort(self) -> None:
        """End the run: requests in flight fail now, and nothing is asked any more. Safe in a signal handler."""
        if self._aborting:  # a second signal inside the first one's `set`, which holds a lock
            return
        self._aborting = True
        self._abort_event.set()
        self._interruptible.interrupt()

    def _failed(self, error: Exception) -> None:
        with self._count_lock:
            self.requests += 1
            self.failed_requests += 1
            self.last_error = f"{type(error).__name__}: {error}"
            if self.requests == self.failed_requests >= GIVE_UP_AFTER:
                self.hopeless = True
        if self.hopeless:
            self.abort()
