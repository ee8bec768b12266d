"""Greedy answers of a running server, kept as JSON, and the comparison of two such files.

\b
    python -m hopper_moe.eval.serving_bench.compare ask http://127.0.0.1:30000 kernel.json
    python -m hopper_moe.eval.serving_bench.compare diff kernel.json reference.json

Prompts are token ids drawn from --seed, of several lengths, and one chat question; with --questions the problems of a file, as
chats. Each position keeps the chosen token's log probability and the runner-up, so that a difference can be told from a near tie.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click

from hopper_moe.eval.serving_bench.http_calls import post
from hopper_moe.kernels.benchmarks.options import RefusingCommand

PROMPT_LENGTHS = (4, 17, 64, 200)
SCORED_LENGTH = 512
QUESTION = "Mia has 7 apples and buys 5 more. How many apples does Mia have now?"
_TIMEOUT = 600.0


def prompts(seed: int, vocab_size: int) -> list[list[int]]:
    """Token ids of the prompts; special ids (below 256) are left out."""
    rng = random.Random(seed)
    return [[rng.randrange(256, vocab_size) for _ in range(length)] for length in PROMPT_LENGTHS]


def greedy(url: str, input_ids: list[int], num_tokens: int) -> dict[str, Any]:
    """One greedy continuation by SGLang's native endpoint: chosen ids, their log probabilities, the runner-ups'."""
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    body = {"input_ids": input_ids, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": 2}
    reply = post(f"{url}/generate", body, _TIMEOUT)
    meta = reply.json()["meta_info"]
    chosen = meta["output_token_logprobs"]
    runner_up = [min(pair, key=lambda entry: entry[0]) for pair in meta["output_top_logprobs"]]
    return {
        "prompt_tokens": len(input_ids),
        "tokens": [token for _, token, *_ in chosen],
        "logprobs": [logprob for logprob, *_ in chosen],
        "second_logprobs": [logprob for logprob, *_ in runner_up],
    }


def scored(url: str, input_ids: list[int]) -> list[float]:
    """Log probability of every given token after the first: nothing is sampled, so no early difference hides the later ones."""
    body = {
        "input_ids": input_ids,
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    reply = post(f"{url}/generate", body, _TIMEOUT)
    return [logprob for logprob, *_ in reply.json()["meta_info"]["input_token_logprobs"][1:]]


def chat(url: str, question: str = QUESTION) -> str:
    """One greedy answer of /v1/chat/completions."""
    body = {"model": "default", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 16}
    reply = post(f"{url}/v1/chat/completions", body, _TIMEOUT)
    message = reply.json()["choices"][0]["message"]
    return message["content"] or message.get("reasoning_content") or ""


def answer(url: str, question: str, num_tokens: int) -> dict[str, Any]:
    """One greedy answer of /v1/chat/completions as `greedy` gives them; tokens are strings, the last one may end the answer."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": num_tokens,
        "logprobs": True,
        "top_logprobs": 2,
    }
    reply = post(f"{url}/v1/chat/completions", body, _TIMEOUT)
    content, prompt_tokens = reply.json()["choices"][0]["logprobs"]["content"], reply.json()["usage"]["prompt_tokens"]
    return {
        "prompt_tokens": prompt_tokens,
        "tokens": [entry["token"] for entry in content],
        "logprobs": [entry["logprob"] for entry in content],
        "second_logprobs": [min(top["logprob"] for top in entry["top_logprobs"]) for entry in content],
    }


def answers(url: str, questions: Sequence[str], num_tokens: int, at_once: int | None = None) -> list[dict[str, Any]]:
    """`answer` to every question, so many asked at once (None: all). A few at once keep prefill and small decode batches taking
    turns; one file asked with 1 and another with 8 show whether a server's answers depend on what runs beside them."""
    with ThreadPoolExecutor(at_once or len(questions)) as pool:
        return list(pool.map(lambda question: answer(url, question, num_tokens), questions))


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """First position where two continuations differ (None: nowhere), and log probabilities up to and at it.

    `logprob_change`: largest change of a chosen token's log probability before it; `gap`: how far the two best tokens were apart
    there, by the second run: a gap below the usual change is a tie that rounding decides. No `gap` where that run had ended.
    """
    pairs = list(zip_longest(ours["tokens"], theirs["tokens"]))
    first = next((position for position, (a, b) in enumerate(pairs) if a != b), None)
    common = range(len(pairs) if first is None else first)
    found: dict[str, Any] = {
        "prompt_tokens": ours["prompt_tokens"],
        "length": len(pairs),
        "first_difference": first,
        "logprob_change": max((abs(ours["logprobs"][i] - theirs["logprobs"][i]) for i in common), default=0.0),
    }
    if first is not None:
        found |= {"tokens_there": list(pairs[first])}
        if first < len(theirs["tokens"]):
            found |= {"gap": theirs["logprobs"][first] - theirs["second_logprobs"][first]}
    return found


def summary(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Two runs' answers to the same questions: how many are the same token for token, how far log probabilities moved where the
    tokens before agree, and how near a tie it was where they part."""
    found = [difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    parted = [entry for entry in found if entry["first_difference"] is not None]
    changes = sorted(
        abs(x - y)
        for a, b, entry in zip(ours, theirs, found, strict=True)
        for x, y in list(zip(a["logprobs"], b["logprobs"], strict=False))[: entry["first_difference"]]
    )
    result: dict[str, Any] = {
        "answers": len(found),
        "same": len(found) - len(parted),
        "tokens_compared": len(changes),
        "median_logprob_change": statistics.median(changes) if changes else None,
        "p99_logprob_change": changes[int(0.99 * (len(changes) - 1))] if changes else None,
        "largest_logprob_change": changes[-1] if changes else None,
    }
    if gaps := [entry["gap"] for entry in parted if "gap" in entry]:
        result |= {"median_gap_where_they_part": statistics.median(gaps), "largest_gap_where_they_part": max(gaps)}
    return result


def score_difference(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """How far two runs' log probabilities of the same tokens are apart, beside how much they vary over tokens."""
    changes = sorted(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    return {
        "tokens": len(changes),
        "median_change": statistics.median(changes),
        "p99_change": changes[int(0.99 * (len(changes) - 1))],
        "mean_shift": statistics.fmean(a - b for a, b in zip(ours, theirs, strict=True)),
        "spread": statistics.stdev(theirs),
        "correlation": statistics.correlation(ours, theirs),
    }


main = click.Group(help=__doc__)


@main.command(cls=RefusingCommand)
@click.argument("url")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--seed", default=1, show_default=True)
@click.option("--num-tokens", default=32, show_default=True)
@click.option("--vocab-size", default=100_000, show_default=True, help="Ids are drawn below this.")
@click.option("--questions", type=click.Path(exists=True, path_type=Path), help="JSON Lines with `problem`: ask these instead.")
@click.option("--num-questions", default=200, show_default=True, help="The first of them.")
@click.option("--at-once", type=click.IntRange(1), help="Questions that are asked at a time  [default: all]")
def ask(
    url: str,
    out: Path,
    seed: int,
    num_tokens: int,
    vocab_size: int,
    questions: Path | None,
    num_questions: int,
    at_once: int | None,
) -> None:
    """Ask the server at URL and write its answers to OUT."""
    if questions:
        problems = [json.loads(line)["problem"] for line in questions.read_text().splitlines()[:num_questions]]
        found = {"asked": [questions.name, len(problems)], "answers": answers(url, problems, num_tokens, at_once)}
        said = f"{len(problems)} answers"
    else:
        asked = [greedy(url, input_ids, num_tokens) for input_ids in prompts(seed, vocab_size)]
        rng = random.Random(seed + 1)
        scores = scored(url, [rng.randrange(256, vocab_size) for _ in range(SCORED_LENGTH)])
        said_to_chat = {"question": QUESTION, "answer": chat(url)}
        found = {"asked": ["seed", seed], "scores": scores, "chat": said_to_chat, "answers": asked}
        said = f"{len(asked)} continuations of {num_tokens} tokens and a chat answer {said_to_chat['answer']!r}"
    out.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(f"{said} in {out}")


@main.command()
@click.argument("ours", type=click.Path(exists=True, path_type=Path))
@click.argument("theirs", type=click.Path(exists=True, path_type=Path))
def diff(ours: Path, theirs: Path) -> None:
    """Compare the answers in OURS with those in THEIRS: a line for each prompt, of questions for each that differs."""
    a, b = (json.loads(path.read_text()) for path in (ours, theirs))
    if a["asked"] != b["asked"]:
        raise click.ClickException(f"{ours} was asked {a['asked']}, {theirs} {b['asked']}: ask both the same.")
    of_questions = "scores" not in a
    for number, (mine, other) in enumerate(zip(a["answers"], b["answers"], strict=True)):
        found = difference(mine, other)
        if not of_questions or found["first_difference"] is not None:
            click.echo(json.dumps({"question": number, **found} if of_questions else found))
    if of_questions:
        click.echo(json.dumps(summary(a["answers"], b["answers"])))
        return
    click.echo(json.dumps(score_difference(a["scores"], b["scores"])))
    click.echo(f"chat answers {'agree' if a['chat'] == b['chat'] else 'differ'}")


if __name__ == "__main__":
    main()
