"""Word problems as token arrays: training examples made by many processes, held-out questions for scoring."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context

import numpy as np

from hopper_moe.eval.gpu_model.config import MIX
from hopper_moe.eval.tiny_model.tokenizer import build_tokenizer
from hopper_moe.eval.word_problems import WordProblem, problems, question_set

LENGTH = 80  # tokens; the longest problem of the mix with its answer is shorter. A multiple of 4.
BOS, EOS, PAD, USER, ASSISTANT, END_THINK = 0, 1, 2, 3, 4, 6  # tokenizer.SPECIAL_TOKENS


@dataclass(frozen=True)
class Examples:
    """`tokens` uint16 [N, LENGTH], padded; `prompt_length` and `length` (prompt and answer) uint8 [N]."""

    tokens: np.ndarray
    prompt_length: np.ndarray
    length: np.ndarray


def encode(questions: list[WordProblem], tokenizer) -> Examples:
    """Bare question, non-thinking chat, calculation, boxed answer. Raises ValueError if one is longer than LENGTH."""
    asked = tokenizer.backend_tokenizer.encode_batch([p.question for p in questions], add_special_tokens=False)
    answers = [f"{p.solution} \\boxed{{{p.answer}}}" for p in questions]
    answered = tokenizer.backend_tokenizer.encode_batch(answers, add_special_tokens=False)
    tokens = np.full((len(questions), LENGTH), PAD, np.uint16)
    prompt_length, length = np.zeros((2, len(questions)), np.uint8)
    for row, (question, answer) in enumerate(zip(asked, answered, strict=True)):
        prompt = [BOS, USER, *question.ids, ASSISTANT, END_THINK]
        whole = [*prompt, *answer.ids, EOS]
        tokens[row, : len(whole)] = whole
        prompt_length[row], length[row] = len(prompt), len(whole)
    return Examples(tokens, prompt_length, length)


def _training_part(seed: int, count: int) -> Examples:
    return encode(list(islice(problems(seed, held_out=False, mix=MIX), count)), build_tokenizer())


def training_examples(seed: int, count: int, workers: int) -> Examples:
    """`count` examples of the training split, made by `workers` processes with seeds of their own (`workers` divides `count`)."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_training_part, 1000 * seed + i, count // workers) for i in range(workers)]
        parts = [f.result() for f in futures]
    return Examples(*(np.concatenate([getattr(p, name) for p in parts]) for name in Examples.__dataclass_fields__))


def held_out_questions(seed: int, count: int) -> list[WordProblem]:
    return question_set(seed, count, MIX)
