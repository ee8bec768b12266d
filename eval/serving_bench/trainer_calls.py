"""SGLang's HTTP calls that change the weights of a running server, as a trainer makes them.

A bad update answers with HTTP 400 and a sentence, which is a result here and no failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hopper_moe.eval.serving_bench.http_calls import post, post_anyhow
from hopper_moe.eval.serving_bench.trainer_tensors import Named, serialized

PAUSES = ("retract", "abort", "in_place")
"""Modes of `pause_generation`: running requests wait to be continued, are answered as far as they are, or stand still."""

_TIMEOUT = 300.0  # seconds of one call


class Answer(NamedTuple):
    success: bool
    message: str


def call(url: str, name: str, body: dict[str, Any]) -> Answer:
    """POST one of SGLang's calls that answer with success and message. Raises `Refusal` if the server does not answer."""
    reply = post_anyhow(f"{url}/{name}", body, _TIMEOUT)
    try:
        found = reply.json()
        return Answer(bool(found["success"]), str(found["message"]))
    except (KeyError, TypeError, ValueError):
        return Answer(False, f"HTTP {reply.status_code}: {reply.text[:500]}")


class WeightCalls:
    """The calls of one server. Each raises `Refusal` only if the server does not answer at all.

    Args:
        url: of the server, without a path.
        ranks: its tensor-parallel ranks; each gets handles of its own.
        serialize: `trainer_tensors.serialized`, or what stands for it.
    """

    def __init__(
        self, url: str, ranks: int = 1, serialize: Callable[[Sequence[Named], bool, int], list[str]] = serialized
    ) -> None:
        self.url, self.ranks, self._serialize = url, ranks, serialize

    def pause(self, mode: str) -> None:
        post(f"{self.url}/pause_generation", {"mode": mode}, _TIMEOUT)

    def go_on(self) -> None:
        post(f"{self.url}/continue_generation", {}, _TIMEOUT)

    def begin(self) -> Answer:
        return self._call("begin_weight_update", {})

    def send(self, named: Sequence[Named], *, flat: bool = False, flush: bool = True, version: str | None = None) -> Answer:
        """`update_weights_from_tensor`. `flat`: as one flattened bucket. `flush`: the KV cache of the old weights goes."""
        body = {
            "serialized_named_tensors": self._serialize(named, flat, self.ranks),
            "load_format": "flattened_bucket" if flat else None,
            "flush_cache": flush,
            "weight_version": version,
        }
        return self._call("update_weights_from_tensor", body)

    def end(self) -> Answer:
        return self._call("end_weight_update", {})

    def from_disk(self, folder: str, version: str | None = None) -> Answer:
        """Without a pause SGLang lets running requests end first and new ones wait."""
        return self._call("update_weights_from_disk", {"model_path": folder, "load_format": "auto", "weight_version": version})

    def session(
        self, parts: Sequence[Sequence[Named]], *, flat: bool = False, flush: bool = True, version: str | None = None
    ) -> Answer:
        """Begin, one call for each part, end. The first answer that refuses, or that of the end; the session is closed then.

        The cache is flushed and the version set with the last part.
        """
        answers = [self.begin()]
        if not answers[0].success:
            return answers[0]
        for number, part in enumerate(parts, 1):
            is_last = number == len(parts)
            answers.append(self.send(part, flat=flat, flush=flush and is_last, version=version if is_last else None))
            if not answers[-1].success:
                break
        answers.append(self.end())
        return next((answer for answer in answers if not answer.success), answers[-1])

    def refresh(self, parts: Sequence[Sequence[Named]], *, mode: str = "retract", **how: Any) -> Answer:
        """A `session` while generation is paused. After a refusal it stays paused: a request to a layer that is not whole ends
        the server."""
        self.pause(mode)
        answer = self.session(parts, **how)
        if answer.success:
            self.go_on()
        return answer

    def release(self, *tags: str) -> None:
        post(f"{self.url}/release_memory_occupation", {"tags": tags}, _TIMEOUT)

    def resume(self, *tags: str) -> None:
        post(f"{self.url}/resume_memory_occupation", {"tags": tags}, _TIMEOUT)

    def flush(self) -> Answer:
        reply = post_anyhow(f"{self.url}/flush_cache", {}, _TIMEOUT)
        return Answer(reply.status_code == 200, reply.text.strip())

    def _call(self, name: str, body: dict[str, Any]) -> Answer:
        return call(self.url, name, body)
