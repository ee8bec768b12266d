"""Train the GPU model on one Hopper GPU in about five minutes of wall time:

    python -m hopper_moe.eval.gpu_model.train --seconds 300 --out DIR

    python -m hopper_moe.eval.gpu_model.train --seconds 120 --init DIR --quantise-from 0 --lr 1e-3 --seed 1 --out DIR2     goes on

Writes the FP32 state as `state-N.safetensors` and `training.json`, the record; `export.py` makes the checkpoint of them. Plain
training first, then quantisation-aware: weights, expert inputs and cached keys as they will be served. A step is one CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hopper_moe.eval.gpu_model.config import CONFIG, MIX
from hopper_moe.eval.gpu_model.data import LENGTH, Examples, held_out_questions, training_examples
from hopper_moe.eval.gpu_model.forward import forward
from hopper_moe.eval.gpu_model.score import accuracy
from hopper_moe.eval.gpu_model.state import initial_state, is_trained
from hopper_moe.eval.tiny_model.tokenizer import build_tokenizer
from hopper_moe.eval.word_problems import MIXES

VALIDATION_SEED, TEST_SEED = 4243, 4244  # held-out questions for the log; the committed ones have another seed
WARM_UP_STEPS = 200
BALANCE_SPEED = 0.001
SHARD_BYTES = 14 << 20
State = dict[str, torch.Tensor]


class Batches:
    """Random batches from examples kept on the device, in fixed buffers that a CUDA graph can read."""

    def __init__(self, examples: Examples, batch_size: int, device: torch.device, seed: int) -> None:
        self._tokens = torch.from_numpy(examples.tokens.astype("int16")).to(device)
        self._first = torch.from_numpy(examples.prompt_length).to(device)
        self._end = torch.from_numpy(examples.length).to(device)
        self._generator = torch.Generator(device).manual_seed(seed)
        self.ids = torch.zeros(batch_size, LENGTH, dtype=torch.int64, device=device)
        self.first, self.end = (torch.zeros(batch_size, 1, dtype=torch.int64, device=device) for _ in range(2))

    def draw(self) -> None:
        size, device = len(self.ids), self.ids.device
        picked = torch.randint(len(self._tokens), (size,), device=device, generator=self._generator)
        self.ids.copy_(self._tokens[picked])
        self.first.copy_(self._first[picked].unsqueeze(1))
        self.end.copy_(self._end[picked].unsqueeze(1))


def answer_loss(
    state: State, batches: Batches, *, quantised: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, State, torch.Tensor]:
    """(mean cross-entropy of the answers' tokens, selected experts by router, which tokens are no padding [B, T])."""
    logits, chosen = forward(state, batches.ids, quantised=quantised, dtype=dtype)
    place = torch.arange(LENGTH, device=batches.ids.device)
    answers = (place >= batches.first) & (place < batches.end)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batches.ids[:, 1:].flatten(), reduction="none")
    wanted = answers[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum(), chosen, place < batches.end


@torch.no_grad()
def balance_experts(state: State, chosen: State, valid: torch.Tensor) -> None:
    """Bias routing towards experts with less than their share of tokens, as DeepSeek's `noaux_tc` does in training."""
    for name, experts in chosen.items():
        bias = state.get(f"{name}.e_score_correction_bias")
        if bias is not None:
            ones = valid.flatten().float().unsqueeze(1).expand_as(experts)
            load = torch.zeros_like(bias).scatter_add_(0, experts.flatten(), ones.flatten())
            bias.add_(torch.sign(load.mean() - load), alpha=BALANCE_SPEED)


class Trainer:
    """Optimiser, schedule and the step; `replay` runs it, from a CUDA graph where there is CUDA."""

    def __init__(self, state: State, batches: Batches, dtype: torch.dtype, eager: bool = False) -> None:
        self.state, self.batches, self.dtype = state, batches, dtype
        self._graph = batches.ids.is_cuda and not eager
        trained = {n: t.requires_grad_() for n, t in state.items() if is_trained(n)}
        self.trained = list(trained.values())
        cuda = batches.ids.is_cuda
        self.rate = torch.zeros((), device=batches.ids.device)
        groups = [
            {"params": [p for p in self.trained if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in self.trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.98), fused=cuda, capturable=cuda)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.loss = torch.zeros((), device=batches.ids.device)

    def _step(self, quantised: bool) -> None:
        loss, chosen, valid = answer_loss(self.state, self.batches, quantised=quantised, dtype=self.dtype)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        balance_experts(self.state, chosen, valid)
        self.loss.copy_(loss.detach())

    def prepared(self, quantised: bool) -> Callable[[], None]:
        """The step as a function; capturing it runs three steps on the batch at hand."""

        def plain() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            self._step(quantised)

        if not self._graph:
            return plain
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                plain()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(quantised)
        return graph.replay


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Linear warm-up, then linear decay to 2 % of the peak; `progress` 0..1 is the share of the time used."""
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * (1.0 - 0.98 * progress)


def train(args: argparse.Namespace) -> None:
    """Run as the command line says."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.backends.cuda.matmul.allow_tf32 = True
    tokenizer = build_tokenizer()
    began = time.monotonic()
    examples = training_examples(args.seed, args.examples, args.workers)
    print(f"{len(examples.tokens)} examples, {time.monotonic() - began:.1f} s", flush=True)
    state = {k: v.to(device) for k, v in (read_state(args.init) if args.init else initial_state(args.seed)).items()}
    trainer = Trainer(state, Batches(examples, args.batch_size, device, args.seed), dtype, args.eager)
    validation, test = held_out_questions(VALIDATION_SEED, args.check), held_out_questions(TEST_SEED, args.test)

    def scores(questions, quantised: bool) -> dict[str, float]:
        return accuracy(state, questions, tokenizer, quantised=quantised, dtype=dtype)

    record = {k: v for k, v in vars(args).items() if k not in ("out", "init", "eager")}
    record |= {"mix": asdict(MIXES[MIX]), "device": device.type, "config": CONFIG, "tokens": 0, "log": []}
    if device.type == "cuda":
        record["device"] = torch.cuda.get_device_name()
    began, checked, step, quantised = time.monotonic(), 0.0, 0, args.quantise_from <= 0
    trainer.rate.fill_(learning_rate(0, 0.0, args.lr))
    trainer.batches.draw()
    run = trainer.prepared(quantised)
    while (elapsed := time.monotonic() - began) < args.seconds:
        progress = elapsed / args.seconds
        if not quantised and progress >= args.quantise_from:
            quantised = True
            run = trainer.prepared(quantised)
        trainer.rate.fill_(learning_rate(step, progress, args.lr))
        trainer.batches.draw()
        run()
        step += 1
        record["tokens"] += trainer.batches.ids.numel()
        if step % 50 == 0:
            loss = trainer.loss.item()  # waits for the device, so the clock above is the device's
            if step % 200 == 0:
                print(
                    f"{time.monotonic() - began:6.1f} s step {step} loss {loss:.4f} {record['tokens'] / 1e6:.1f} Mtok", flush=True
                )
            if elapsed - checked >= args.check_every:
                checked = elapsed
                found = {"quantised": scores(validation, True)} | ({} if quantised else {"plain": scores(validation, False)})
                record["log"].append({"seconds": elapsed, "step": step, "tokens": record["tokens"], "loss": loss, **found})
                print("   " + json.dumps(found), flush=True)
    record |= {"steps": step, "seconds_used": time.monotonic() - began}
    write_state(args.out, state)
    for name, q in (("test_plain", False), ("test_quantised", True)):
        record[name] = scores(test, q)
        print(name, json.dumps(record[name]), flush=True)
    earlier = json.loads((args.init / "training.json").read_text())["phases"] if args.init else []
    (args.out / "training.json").write_text(json.dumps({"phases": [*earlier, record]}, indent=1) + "\n")


def write_state(out: Path, state: State) -> None:
    """`state-N.safetensors` of at most 14 MiB each, FP32."""
    shards: list[State] = [{}]
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    for number, shard in enumerate(shards, 1):
        save_file(shard, out / f"state-{number}.safetensors")


def read_state(folder: Path) -> State:
    """What `write_state` wrote."""
    return {name: tensor for file in sorted(folder.glob("state-*.safetensors")) for name, tensor in load_file(file).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="folder with a state to go on from")
    parser.add_argument("--seconds", type=float, default=300.0, help="wall time of the training loop")
    parser.add_argument(
        "--quantise-from", type=float, default=0.6, help="share of the time after which training is quantisation-aware"
    )
    parser.add_argument("--examples", type=int, default=2_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--check", type=int, default=400, help="questions of a check")
    parser.add_argument("--check-every", type=float, default=30.0, help="seconds between checks")
    parser.add_argument("--test", type=int, default=1200, help="questions of the last check")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="no CUDA graph")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train(args)


if __name__ == "__main__":
    main()
