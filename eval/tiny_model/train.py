"""Train the tiny DeepSeek-V4 model on one CPU thread, in two phases of about 15 and 8 minutes:

    python -m hopper_moe.eval.tiny_model.train --mix easy --steps 1600 --stop-after 800 --out EASY
    python -m hopper_moe.eval.tiny_model.train --mix standard --init EASY --steps 800 --stop-after 500 \\
        --lr 1e-3 --seed 1 --out DIR

Each writes `model.pt` (FP32 state) and `training.json`; `export.py` turns DIR into the committed checkpoint. Only questions of
the training split are ever seen (`word_problems.is_held_out`).
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
from hopper_moe.eval.word_problems import MIXES, WordProblem, problems

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


def batches(tokenizer, batch_size: int, seed: int, mix: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (input ids, labels), both int64 [batch, longest], right padded; the loss is on the answer only."""
    stream, r = problems(seed, held_out=False, mix=mix), random.Random(seed + 1)
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


def train(args: argparse.Namespace) -> None:
    """Run one phase as the command line says."""
    torch.set_num_threads(1)
    tokenizer, model = build_tokenizer(), build_model(args.seed)
    phases: list[dict[str, object]] = []
    if args.init:
        model.load_state_dict(torch.load(args.init / "model.pt", weights_only=True))
        phases = json.loads((args.init / "training.json").read_text())["phases"]
    model.set_experts_implementation("grouped_mm")
    skip_indexer_scores()
    balance_experts(model, speed=0.002)
    trained = {n: p for n, p in model.named_parameters() if ".indexer." not in n}
    groups = [
        dict(params=[p for p in trained.values() if p.ndim >= 2], weight_decay=0.05),
        dict(params=[p for p in trained.values() if p.ndim < 2], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    phase = {k: getattr(args, k) for k in ("mix", "steps", "stop_after", "batch_size", "lr", "seed")} | {"tokens": 0, "log": []}
    started = time.time()
    stream = batches(tokenizer, args.batch_size, args.seed + 7, args.mix)
    last = min(args.steps, args.stop_after or args.steps)
    for step in range(1, last + 1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        ids, labels = next(stream)
        loss = model(ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        phase["tokens"] += ids.numel()
        if step % 50 == 0:
            minutes = (time.time() - started) / 60
            print(f"step {step} loss {loss.item():.4f} {phase['tokens'] / 1e6:.2f} Mtok {minutes:.1f} min", flush=True)
        if step % args.check_every == 0 or step == last:
            phase["log"].append(dict(step=step, loss=loss.item(), held_out=accuracy(model, tokenizer, 200, args.mix)))
            print(f"   held-out accuracy {phase['log'][-1]['held_out']:.3f}", flush=True)
            torch.save(model.state_dict(), args.out / "model.pt")
            (args.out / "training.json").write_text(json.dumps({"phases": [*phases, phase]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mix", choices=list(MIXES), required=True)
    parser.add_argument("--init", type=Path, help="folder of an earlier phase to start from")
    parser.add_argument("--steps", type=int, required=True, help="length of the learning-rate schedule")
    parser.add_argument("--stop-after", type=int, help="stop the phase before its schedule ends")
    parser.add_argument("--check-every", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    transformers_logging.set_verbosity_error()
    train(args)


if __name__ == "__main__":
    main()
