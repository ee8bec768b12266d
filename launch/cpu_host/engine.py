"""Generation for the CPU host: one worker thread that answers waiting requests in batches of equal prompt length.

Prompts of different length are never padded into one batch: the compressed attention of DeepSeek-V4 counts pad tokens.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Request:
    """One prompt (token ids) and how to continue it. `temperature` 0 is greedy; `top_k` 0 keeps every token."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """Generated token ids without the end token; `finish_reason` is "stop" or "length"."""

    tokens: tuple[int, ...]
    finish_reason: str


@dataclass
class _Row:
    request: Request
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class Engine:
    """Owns the model. `submit` may be called from any thread; up to `max_batch` rows run together after `window` seconds."""

    def __init__(self, model, tokenizer, max_batch: int = 32, window: float = 0.02) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._max_batch, self._window = max_batch, window
        ends = model.generation_config.eos_token_id or model.config.eos_token_id
        self._end_ids = set(ends) if isinstance(ends, (list, tuple)) else {ends}
        self._waiting: queue.SimpleQueue[tuple[Request, Future[Completion]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="cpu-host-engine").start()

    def submit(self, request: Request) -> Future[Completion]:
        future: Future[Completion] = Future()
        self._waiting.put((request, future))
        return future

    def _work(self) -> None:
        torch.set_num_threads(1)  # on two busy cores two threads are several times slower than one
        pending: dict[int, list[tuple[Request, Future[Completion]]]] = defaultdict(list)
        while True:
            if not pending:
                self._accept(pending, self._waiting.get())
                time.sleep(self._window)
            while not self._waiting.empty():
                self._accept(pending, self._waiting.get())
            # The length of the oldest request runs first, so that no request starves behind a frequent length.
            length = next(iter(pending))
            batch, rest = pending[length][: self._max_batch], pending[length][self._max_batch :]
            del pending[length]
            if rest:
                pending[length] = rest  # to the end of the queue
            # A client may have cancelled; afterwards it cannot, so setting the result cannot fail.
            batch = [(request, future) for request, future in batch if future.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[tuple[Request, Future[Completion]]]) -> None:
        try:
            done = self.generate([request for request, _ in batch])
        except Exception as error:  # the server must outlive one bad batch; the requests report it
            for _, future in batch:
                future.set_exception(error)
        else:
            for (_, future), completion in zip(batch, done, strict=True):
                future.set_result(completion)

    @staticmethod
    def _accept(pending, item: tuple[Request, Future[Completion]]) -> None:
        pending[len(item[0].prompt)].append(item)

    @torch.inference_mode()
    def generate(self, requests: list[Request]) -> list[Completion]:
        """Answer requests whose prompts all have the same number of tokens."""
        lengths = {len(r.prompt) for r in requests}
        if len(lengths) != 1:
            raise ValueError(f"prompts of {sorted(lengths)} tokens in one batch: DeepSeek-V4 attention allows one length only")
        rows = [_Row(r, _generator(r.seed)) for r in requests]
        ids, cache = torch.tensor([r.prompt for r in requests]), None
        while True:
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            chosen = [self._advance(row, logits) for row, logits in zip(rows, out.logits[:, -1].float(), strict=True)]
            if all(row.finish_reason for row in rows):
                return [Completion(tuple(row.tokens), row.finish_reason or "stop") for row in rows]
            ids = torch.tensor(chosen).unsqueeze(1)

    def _advance(self, row: _Row, logits: torch.Tensor) -> int:
        """Choose one row's next token and record whether the row is finished. Finished rows stay in the batch unused."""
        if row.finish_reason:
            return next(iter(self._end_ids))
        token = choose_token(logits, row.request, row.generator)
        if token in self._end_ids:
            row.finish_reason = "stop"
            return token
        row.tokens.append(token)
        if row.request.stop and any(s in self.tokenizer.decode(row.tokens, skip_special_tokens=True) for s in row.request.stop):
            row.finish_reason = "stop"
        elif len(row.tokens) >= row.request.max_tokens:
            row.finish_reason = "length"
        return token


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    return generator


def choose_token(logits: torch.Tensor, request: Request, generator: torch.Generator) -> int:
    """Greedy, or a draw after temperature, top-k, min-p and top-p in this order. logits: float32 [vocab]."""
    if request.temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / request.temperature, -1).sort(descending=True)
    if request.top_k:
        probabilities[request.top_k :] = 0
    probabilities[probabilities < request.min_p * probabilities[0]] = 0
    probabilities /= probabilities.sum()
    dropped = probabilities.cumsum(-1) - probabilities >= request.top_p  # keeps the token that crosses top_p
    dropped[0] = False  # a top_p below float32's smallest number would be 0 here
    probabilities[dropped] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
