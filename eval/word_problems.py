"""Synthetic grade-school arithmetic word problems: a seeded generator with a held-out split by construction.

Whether a question may be used for training depends on nothing but its own text: the first byte of its SHA-256 puts it
into one of 256 buckets, and the buckets below `HELD_OUT_BUCKETS` belong to the held-out split. So no seed, no number
of training steps and no later change of the trainer can ever train on a held-out question.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

HELD_OUT_BUCKETS = 32  # of 256: one question in eight is never trained on

NAMES = "Ann Ben Cara Dan Eva Finn Gina Hugo Ida Jack Kim Leo Mia Noah Olga Paul".split()
THINGS = "apples books cards coins eggs pens shells stamps stones toys".split()


@dataclass(frozen=True)
class WordProblem:
    """One question with its worked solution.

    `solution` is the calculation in words a model is trained to write ("7+5=12."), `answer` the integer result.
    """

    question: str
    solution: str
    answer: int
    kind: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.question)


def is_held_out(question: str) -> bool:
    """True if this exact question text belongs to the held-out split."""
    return hashlib.sha256(question.encode()).digest()[0] < HELD_OUT_BUCKETS


def _ask(name: str, things: str) -> str:
    return f"How many {things} does {name} have now?"


def _number(r: random.Random, largest: int, by_digits: bool) -> int:
    """1..largest, uniform; `by_digits`: every number of digits equally likely (`largest` is then all nines)."""
    if not by_digits:
        return r.randint(1, largest)
    digits = r.randint(1, len(str(largest)))
    return r.randint(10 ** (digits - 1), 10**digits - 1)


def _add(r: random.Random, largest: int, by_digits: bool) -> WordProblem:
    name, things = r.choice(NAMES), r.choice(THINGS)
    a, b = (_number(r, largest, by_digits) for _ in range(2))
    story = r.choice(["{n} has {a} {t} and buys {b} more.", "{n} had {a} {t} and found {b} more."])
    return WordProblem(f"{story.format(n=name, a=a, b=b, t=things)} {_ask(name, things)}", f"{a}+{b}={a + b}.", a + b, "add")


def _subtract(r: random.Random, largest: int, by_digits: bool) -> WordProblem:
    name, things = r.choice(NAMES), r.choice(THINGS)
    b, a = sorted(_number(r, largest, by_digits) for _ in range(2))
    story = r.choice(["{n} has {a} {t} and loses {b}.", "{n} had {a} {t} and gave away {b}."])
    return WordProblem(f"{story.format(n=name, a=a, b=b, t=things)} {_ask(name, things)}", f"{a}-{b}={a - b}.", a - b, "subtract")


def _multiply(r: random.Random, largest: int) -> WordProblem:
    name, things, a, b = r.choice(NAMES), r.choice(THINGS), r.randint(2, largest), r.randint(2, largest)
    question = f"{name} buys {a} boxes with {b} {things} in each box. {_ask(name, things)}"
    return WordProblem(question, f"{a}*{b}={a * b}.", a * b, "multiply")


def _two_steps(r: random.Random, largest: int) -> WordProblem:
    name, things, a, b = r.choice(NAMES), r.choice(THINGS), r.randint(1, largest), r.randint(1, largest)
    c = r.randint(1, a + b)
    question = f"{name} has {a} {things}, buys {b} more and gives away {c}. {_ask(name, things)}"
    return WordProblem(question, f"{a}+{b}={a + b}. {a + b}-{c}={a + b - c}.", a + b - c, "two steps")


def _three_steps(r: random.Random, largest: int) -> WordProblem:
    name, things, a, b, c = r.choice(NAMES), r.choice(THINGS), r.randint(2, 9), r.randint(2, 9), r.randint(1, largest)
    d = r.randint(1, a * b + c)
    question = f"{name} buys {a} boxes with {b} {things} in each box, finds {c} more and gives away {d}. {_ask(name, things)}"
    solution = f"{a}*{b}={a * b}. {a * b}+{c}={a * b + c}. {a * b + c}-{d}={a * b + c - d}."
    return WordProblem(question, solution, a * b + c - d, "three steps")


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds (the rest is two-step) and the largest numbers in them."""

    add: float
    subtract: float
    multiply: float
    largest: int
    largest_two_steps: int
    three_steps: float = 0.0
    largest_factor: int = 9
    by_digits: bool = False  # how the numbers of one-step sums and differences are drawn, see `_number`


# "easy" is for learning to calculate at all; the tiny model is scored on "standard", the GPU model on "hard". Products of two
# numbers of two digits, written without steps, are what a small model does not master: they keep "hard" below 100 %.
MIXES = {
    "easy": Mix(0.34, 0.34, 0.14, 20, 10),
    "standard": Mix(0.31, 0.31, 0.10, 50, 20),
    "hard": Mix(0.20, 0.20, 0.25, 999, 99, three_steps=0.15, largest_factor=99, by_digits=True),
}


def draw(r: random.Random, mix: str = "standard") -> WordProblem:
    """One problem of a mix, of either split."""
    m, x = MIXES[mix], r.random()
    if x < m.add:
        return _add(r, m.largest, m.by_digits)
    if x < m.add + m.subtract:
        return _subtract(r, m.largest, m.by_digits)
    if x < m.add + m.subtract + m.multiply:
        return _multiply(r, m.largest_factor)
    if x < m.add + m.subtract + m.multiply + m.three_steps:
        return _three_steps(r, m.largest_two_steps)
    return _two_steps(r, m.largest_two_steps)


def problems(seed: int, *, held_out: bool, mix: str = "standard") -> Iterator[WordProblem]:
    """An endless seeded stream of problems of one split. The same seed gives the same stream on every machine."""
    r = random.Random(seed)
    while True:
        p = draw(r, mix)
        if p.held_out == held_out:
            yield p


def question_set(seed: int, count: int, mix: str = "standard") -> list[WordProblem]:
    """`count` distinct held-out problems (no question twice), in stream order."""
    found: dict[str, WordProblem] = {}
    for p in problems(seed, held_out=True, mix=mix):
        found.setdefault(p.question, p)
        if len(found) == count:
            return list(found.values())
    raise AssertionError("unreachable: the stream is endless")
