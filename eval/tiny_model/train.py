"""Train the tiny DeepSeek-V4 model on the CPU: `python -m hopper_moe.eval.tiny_model.train --out DIR`.

One thread, about 25 minutes. Writes `model.pt` (FP32 state) and `training.json` into DIR; `export.py` turns that into the
committed checkpoint. Only questions of the training split are ever seen (`word_problems.is_held_out`).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from transformers import logging as transformers_logging
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as dsv4

from hopper_moe.eval.tiny_model.config import build_model
from hopper_moe.eval.tiny_model.evaluate import accuracy
from hopper_moe.eval.tiny_model.tokenizer import MATH_INSTRUCTION, build_tokenizer
from hopper_moe.eval.word_problems import WordProblem, problems

INSTRUCTION_EVERY = 12  # one batch in so many carries sgl-eval's maths instruction (all of it, so that little is padded)
THINKING_SHARE = 0.05  # answers written as <think>calculation</think>\boxed{answer}


def example(tokenizer, problem: WordProblem, *, instruction: bool, thinking: bool) -> tuple[list[int], list[int]]:
    """(prompt ids, target ids) of one training example."""
    question = (MATH_INSTRUCTION if instruction else "") + problem.question
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, thinking=thinking, tokenize=False
    )
    separator = "</think>" if thinking else " "
    target = f"{problem.solution}{separator}\\boxed{{{problem.answer}}}{tokenizer.eos_token}"
    return (tokenizer(prompt, add_special_tokens=False).input_ids, tokenizer(target, add_special_tokens=False).input_ids)


def batches(tokenizer, batch_size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input ids, labels), both int64 [batch, longest], right padded; the loss is on the answer only."""
    stream, r = problems(seed, held_out=False), random.Random(seed + 1)
    for number in count():
        instruction = number % INSTRUCTION_EVERY == 0
        chunk = [
            example(tokenizer, next(stream), instruction=instruction, thinking=r.random() < THINKING_SHARE)
            for _ in range(batch_size)
        ]
        longest = max(len(p) + len(t) for p, t in chunk)
        ids = torch.full((batch_size, longest), tokenizer.pad_token_id)
        labels = torch.full((batch_size, longest), -100)
        for row, (p, t) in enumerate(chunk):
            ids[row, : len(p) + len(t)] = torch.tensor(p + t)
            labels[row, len(p) : len(p) + len(t)] = torch.tensor(t)
        yield ids, labels


def skip_indexer_scores() -> None:
    """In training, let the lightning indexer return what it must while a sequence has at most `index_topk` entries: all of them.

    Training sequences are far shorter than `index_topk * 4` tokens, so this changes nothing but the time: the scores are a third
    of a training step, and the indexer's weights get no gradient either way.
    """
    whole = dsv4.DeepseekV4Indexer.forward

    def forward(self, hidden_states, q_residual, position_ids, past_key_values, layer_idx):
        if not self.training:
            return whole(self, hidden_states, q_residual, position_ids, past_key_values, layer_idx)
        entries = torch.arange(hidden_states.shape[1] // self.compress_rate).expand(*hidden_states.shape[:2], -1)
        return torch.where(entries >= ((position_ids + 1) // self.compress_rate).unsqueeze(-1), -1, entries)

    dsv4.DeepseekV4Indexer.forward = forward


def balance_experts(model, speed: float) -> None:
    """Bias routing towards experts with less than their share of tokens, as DeepSeek's `noaux_tc` does in training."""

    def after_routing(router, _inputs, output) -> None:
        if router.training:
            load = torch.bincount(output[2].flatten(), minlength=router.num_experts).float()
            router.e_score_correction_bias += speed * torch.sign(load.mean() - load)

    for layer in model.model.layers:
        if hasattr(layer.mlp.gate, "e_score_correction_bias"):
            layer.mlp.gate.register_forward_hook(after_routing)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then linear decay to 2 % of the peak."""
    return peak * min(1.0, (step + 1) / 100) * (1.0 - 0.98 * step / steps)


def train(out: Path, steps: int, batch_size: int, peak: float, seed: int) -> None:
    torch.set_num_threads(1)
    tokenizer, model = build_tokenizer(), build_model(seed)
    model.set_experts_implementation("grouped_mm")
    skip_indexer_scores()
    balance_experts(model, speed=0.002)
    trained = {n: p for n, p in model.named_parameters() if ".indexer." not in n}
    groups = [
        dict(params=[p for p in trained.values() if p.ndim >= 2], weight_decay=0.05),
        dict(params=[p for p in trained.values() if p.ndim < 2], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    log: list[dict[str, float]] = []
    started, tokens = time.time(), 0
    stream = batches(tokenizer, batch_size, seed + 7)
    for step in range(steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        ids, labels = next(stream)
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        if (step + 1) % 50 == 0:
            minutes = (time.time() - started) / 60
            print(f"step {step + 1} loss {loss.item():.4f} {tokens / 1e6:.2f} Mtok {minutes:.1f} min", flush=True)
        if (step + 1) % 400 == 0 or step + 1 == steps:
            log.append(dict(step=step + 1, loss=loss.item(), held_out=accuracy(model, tokenizer, 200)))
            print(f"   held-out accuracy {log[-1]['held_out']:.3f}", flush=True)
            torch.save(model.state_dict(), out / "model.pt")
    record = dict(steps=steps, batch_size=batch_size, peak_learning_rate=peak, seed=seed, tokens=tokens, log=log)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    transformers_logging.set_verbosity_error()
    train(args.out, args.steps, args.batch_size, args.lr, args.seed)


if __name__ == "__main__":
    main()
