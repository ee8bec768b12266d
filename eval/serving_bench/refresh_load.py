"""Requests that are running while weights change, and of which weights each answer is.

A greedy answer is scored again when the new weights are in place: tokens of the new weights then have about the log
probabilities that they were sent with, tokens of others far lower ones. So an answer of both is found, whatever SGLang says.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hopper_moe.eval.serving_bench.compare import scored
from hopper_moe.eval.serving_bench.http_calls import post
from hopper_moe.quantization.errors import Refusal

NEAR = 1.0
"""Median change of log probabilities below which tokens are of the same weights: batches round differently (0.15 between kernels,
see README.md), other random weights are apart by about 10."""

BLOCK = 16
"""Tokens that are judged together: of fewer a median says nothing."""

_TIMEOUT = 300.0


@dataclass(frozen=True)
class Reply:
    """One request and what came of it. `failure`: a sentence in place of an answer."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finish: str = ""  # "length", or "abort"
    versions: int = 0  # of the weights that sampled it, as SGLang counts them
    failure: str | None = None


def ask(url: str, prompt: list[int], num_tokens: int) -> Reply:
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
    try:
        return _reply(prompt, post(f"{url}/generate", body, _TIMEOUT).json()["meta_info"], num_tokens)
    except (Refusal, KeyError, TypeError, ValueError) as error:
        return Reply(prompt, [], [], failure=f"{type(error).__name__}: {error}")


def _reply(prompt: list[int], meta: dict[str, Any], num_tokens: int) -> Reply:
    chosen, finish = meta.get("output_token_logprobs") or [], meta["finish_reason"]["type"]
    short = f"{len(chosen)} of {num_tokens} tokens, finished by {finish}"
    return Reply(
        prompt,
        [token for _, token, *_ in chosen],
        [logprob for logprob, *_ in chosen],
        finish,
        len(meta.get("weight_versions") or [None]),
        None if finish == "abort" or len(chosen) == num_tokens else short,
    )


@contextmanager
def traffic(url: str, concurrency: int, seed: int) -> Iterator[list[Reply]]:
    """So many requests at a time while the block runs, of 48 to 159 tokens. The list is whole when it has ended."""
    replies: list[Reply] = []
    is_over = threading.Event()

    def work(number: int) -> None:
        rng = random.Random(seed * 1000 + number)
        while not is_over.is_set():
            prompt = [rng.randrange(256, 100_000) for _ in range(rng.randrange(8, 64))]
            replies.append(ask(url, prompt, rng.randrange(48, 160)))
            if replies[-1].failure:
                time.sleep(0.2)  # a server that is gone is not asked a thousand times

    with ThreadPoolExecutor(concurrency) as pool:
        workers: list[Future[None]] = [pool.submit(work, number) for number in range(concurrency)]
        try:
            yield replies
        finally:
            is_over.set()
            for worker in workers:
                worker.result()


def wait_for_more(replies: Sequence[Reply], count: int, timeout: float = 60.0) -> None:
    """Until so many more have come, or `timeout` seconds are over."""
    wanted, end = len(replies) + count, time.monotonic() + timeout
    while len(replies) < wanted and time.monotonic() < end:
        time.sleep(0.1)


def weights_of(sent: Sequence[float], again: Sequence[float]) -> str:
    """ "new", "old" or "mixed": log probabilities as sent against those under the new weights, block by block."""
    changes = [abs(a - b) for a, b in zip(sent, again, strict=True)]
    blocks = [changes[start : start + BLOCK] for start in range(0, len(changes) - BLOCK + 1, BLOCK)]
    found = {statistics.median(block) < NEAR for block in blocks}
    return "mixed" if len(found) == 2 else "new" if found == {True} else "old"


def judge(url: str, replies: Sequence[Reply], score: Callable[[str, list[int]], list[float]] = scored) -> dict[str, Any]:
    """Counts of `replies` by what they are; `unmarked`: of both weights, and SGLang's `weight_versions` name one."""
    failures = [reply.failure for reply in replies if reply.failure]
    aborted = sum(reply.finish == "abort" for reply in replies)
    judged = [reply for reply in replies if not reply.failure and len(reply.tokens) >= BLOCK]

    def kind(reply: Reply) -> str:
        return weights_of(reply.logprobs, score(url, reply.prompt + reply.tokens)[len(reply.prompt) - 1 :])

    with ThreadPoolExecutor(8) as pool:
        kinds = list(pool.map(kind, judged))
    counts = {name: kinds.count(name) for name in ("old", "new", "mixed")}
    unmarked = sum(found == "mixed" and reply.versions < 2 for found, reply in zip(kinds, judged, strict=True))
    facts = {"requests": len(replies), "failed": len(failures), "aborted": aborted}
    return {**facts, **counts, "unmarked": unmarked, "failures": failures[:5]}


def problems(mode: str, counts: dict[str, Any]) -> list[str]:
    """What must not be. Answers of both weights are what "retract" is for: there they must say so."""
    found = [f"{mode}: {counts['failed']} requests failed, the first: {counts['failures'][0]}"] if counts["failed"] else []
    mixed = counts["unmarked"] if mode == "retract" else counts["mixed"]
    if mixed:
        found.append(f"{mode}: {mixed} answers are of both weights" + (" and do not say so" if mode == "retract" else ""))
    if counts["aborted"] and mode != "abort":
        found.append(f"{mode}: {counts['aborted']} requests were aborted")
    if not counts["new"] or not counts["old"] + counts["mixed"]:
        found.append(f"{mode}: no load before or none after the update, so nothing was shown")
    return found
