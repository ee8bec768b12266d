"""Greedy accuracy of a training state on held-out problems: no cache, every step recomputes the batch."""

from __future__ import annotations

import re
from collections import Counter

import torch

from hopper_moe.eval.gpu_model.data import EOS, LENGTH, encode
from hopper_moe.eval.gpu_model.forward import Parameters, forward
from hopper_moe.eval.word_problems import WordProblem


@torch.no_grad()
def accuracy(
    parameters: Parameters, questions: list[WordProblem], tokenizer, *, quantised: bool, dtype: torch.dtype
) -> dict[str, float]:
    """Share answered right, by kind of question and "all"."""
    device = next(iter(parameters.values())).device
    examples = encode(questions, tokenizer)
    ids = torch.from_numpy(examples.tokens.astype("int64")).to(device)
    position = torch.from_numpy(examples.prompt_length.astype("int64")).to(device)
    ids[torch.arange(LENGTH, device=device) >= position.unsqueeze(1)] = EOS
    rows, done = torch.arange(len(questions), device=device), torch.zeros(len(questions), dtype=torch.bool, device=device)
    while not done.all():
        logits, _ = forward(parameters, ids, quantised=quantised, dtype=dtype)
        token = logits[rows, position - 1].argmax(-1)
        ids[rows, position] = torch.where(done, EOS, token)
        done |= (token == EOS) | (position >= LENGTH - 1)
        position = torch.where(done, position, position + 1)
    asked: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for question, row, start in zip(questions, ids.tolist(), examples.prompt_length, strict=True):
        boxed = re.findall(r"\\boxed\{(-?\d+)\}", tokenizer.decode(row[start:]))
        for kind in ("all", question.kind):
            asked[kind] += 1
            right[kind] += bool(boxed) and int(boxed[-1]) == question.answer
    return {kind: right[kind] / asked[kind] for kind in asked}
