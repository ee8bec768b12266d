"""Greedy accuracy of a model object on held-out problems, without a server (training and export use it)."""

from __future__ import annotations

import re
from collections import defaultdict

import torch

from hopper_moe.eval.word_problems import question_set

EVALUATION_SEED = 4242  # not the seed of the committed question file


@torch.no_grad()
def accuracy(model, tokenizer, count: int, mix: str, max_new_tokens: int = 40) -> float:
    """Share of `count` held-out problems answered right, greedy.

    Prompts are batched by equal token length: left padding is wrong for the compressed attention of DeepSeek-V4.
    """
    model.eval()
    by_length: dict[int, list[tuple[list[int], int]]] = defaultdict(list)
    for p in question_set(EVALUATION_SEED, count, mix):
        chat = [{"role": "user", "content": p.question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        by_length[len(ids)].append((ids, p.answer))
    right = 0
    for length, rows in by_length.items():
        ids = torch.tensor([r[0] for r in rows])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
        for answer, (_, expected) in zip(tokenizer.batch_decode(out[:, length:]), rows, strict=True):
            boxed = re.findall(r"\\boxed\{(-?\d+)\}", answer)
            right += bool(boxed) and int(boxed[-1]) == expected
    return right / count
