"""Whether an answer depends on what runs beside it: the same prompts alone and in batches, compared bit for bit.

\b
    python -m hopper_moe.eval.serving_bench.batches http://127.0.0.1:30000 --out batches.json

Prompts are as long as each other, so that all of a batch decode together. For each batch size: how many log probabilities of
given tokens (prefill) and of greedy tokens (decoding, up to the first other token) have other bits than alone, and the largest
change. A first token comes from prefill, so decoding is counted from the second on.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import click

from hopper_moe.eval.serving_bench.http_calls import post
from hopper_moe.kernels.benchmarks.options import RefusingCommand, commit_option, numbers

_TIMEOUT = 600.0

Answers = list[dict[str, list[Any]]]


def answers(url: str, prompts: list[list[int]], num_tokens: int, batch: int) -> Answers:
    """`given` (log probabilities of the prompt), `tokens` and `chosen` (theirs) for each prompt, `batch` of them at a time."""
    found: Answers = []
    for first in range(0, len(prompts), batch):
        body = {
            "input_ids": prompts[first : first + batch],
            "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        post(f"{url}/flush_cache", {}, _TIMEOUT)  # a cached prefix would be neither computed nor compared
        for reply in post(f"{url}/generate", body, _TIMEOUT).json():
            meta = reply["meta_info"]
            chosen = meta["output_token_logprobs"]
            given = [logprob for logprob, *_ in meta["input_token_logprobs"][1:]]
            found.append(
                {"given": given, "tokens": [token for _, token, *_ in chosen], "chosen": [value for value, *_ in chosen]}
            )
    return found


def compared(alone: Answers, together: Answers) -> dict[str, Any]:
    """Counts of log probabilities, of those with other bits, and their largest change."""
    prefill, decode, parted = [], [], 0
    for a, b in zip(alone, together, strict=True):
        prefill += [abs(x - y) for x, y in zip(a["given"], b["given"], strict=True)]
        prefill += [abs(a["chosen"][0] - b["chosen"][0])]
        same = next((i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=True)) if x != y), len(a["tokens"]))
        parted += same < len(a["tokens"])
        decode += [abs(x - y) for x, y in zip(a["chosen"][1:same], b["chosen"][1:same], strict=True)]
    return {"prefill": _counts(prefill), "decode": _counts(decode), "answers": len(alone), "answers_that_part": parted}


def _counts(changes: list[float]) -> dict[str, Any]:
    return {"logprobs": len(changes), "other_bits": sum(change != 0 for change in changes), "largest": max(changes, default=0.0)}


@click.command(cls=RefusingCommand, help=__doc__)
@click.argument("url")
@click.option("--batch-sizes", default="2,4,8,16,32,64,128", show_default=True)
@click.option("--prompts", "num_prompts", default=128, show_default=True, type=click.IntRange(1))
@click.option("--length", default=64, show_default=True, type=click.IntRange(2), help="Tokens of a prompt.")
@click.option("--num-tokens", default=16, show_default=True, type=click.IntRange(2), help="Generated for each.")
@click.option("--vocab-size", default=100_000, show_default=True, help="Ids are drawn below this.")
@click.option("--seed", default=1, show_default=True)
@commit_option
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(
    url: str,
    batch_sizes: str,
    num_prompts: int,
    length: int,
    num_tokens: int,
    vocab_size: int,
    seed: int,
    commit: str,
    out: Path,
) -> None:
    rng, sizes = random.Random(seed), numbers("--batch-sizes", batch_sizes)
    prompts = [[rng.randrange(256, vocab_size) for _ in range(length)] for _ in range(num_prompts)]
    alone = answers(url, prompts, num_tokens, 1)
    found: dict[str, Any] = {"commit": commit, "prompts": num_prompts, "length": length, "tokens": num_tokens, "batches": {}}
    for size in [1, *sizes]:
        found["batches"][size] = result = compared(alone, answers(url, prompts, num_tokens, size))
        out.write_text(json.dumps(found, indent=1) + "\n")
        shown = ", ".join(f"{name} {result[name]['other_bits']} of {result[name]['logprobs']}" for name in ("prefill", "decode"))
        click.echo(f"batches of {size}: other bits in {shown}; {result['answers_that_part']} answers part")


if __name__ == "__main__":
    main()
