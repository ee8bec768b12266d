"""What `refresh` does with a running server, step by step; each step says what it found and what is wrong with it.

Every step begins and ends with the weights of the folder that the server was started with, but for `whole` and `torn`, which come
last.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from hopper_moe.eval.serving_bench import refresh_load, trainer_ipc
from hopper_moe.eval.serving_bench.compare import greedy, scored
from hopper_moe.eval.serving_bench.refresh_bad import BAD_UPDATES, NOT_SERVED, BadUpdate
from hopper_moe.eval.serving_bench.soak import observe
from hopper_moe.eval.serving_bench.trainer_calls import Answer, WeightCalls
from hopper_moe.eval.serving_bench.trainer_group import BroadcastCalls, TrainerGroup
from hopper_moe.eval.serving_bench.trainer_tensors import (
    Named,
    Tensors,
    buckets,
    experts_of,
    experts_of_all,
    num_bytes,
    read,
    without,
)
from hopper_moe.quantization.errors import Refusal

SCORED = 500
GROWTH_MIB = 64  # more GPU memory after many refreshes than after the second: a leak (one expert of V4-Flash has 13)
RELEASED_MIB = 1024  # less than this is no release
_CAPTURE = re.compile(r"capture .*graph (?:begin|end)", re.IGNORECASE)

Bits = dict[str, Any]
Found = dict[str, Any]


def bits(url: str) -> Bits:
    """Log probabilities of given tokens (a prefill) and of a greedy continuation (decoding, in graphs), of always the same."""
    rng = random.Random(500)
    given = scored(url, [rng.randrange(256, 100_000) for _ in range(SCORED + 1)])
    chosen = greedy(url, [1000 + 7 * i for i in range(100)], 32)
    return {"scores": given, "tokens": chosen["tokens"], "logprobs": chosen["logprobs"]}


def unequal(what: str, found: Bits, wanted: Bits) -> list[str]:
    """Empty where all bits are equal, else one sentence."""
    pairs = list(zip(found["scores"], wanted["scores"], strict=True))
    changes = [abs(a - b) for a, b in pairs if a != b]
    said = [f"{len(changes)} of {len(pairs)} log probabilities differ, by up to {max(changes):.2g}"] if changes else []
    said += [f"greedy {name} differ" for name in ("tokens", "logprobs") if found[name] != wanted[name]]
    return [f"{what}: {', '.join(said)}"] if said else []


class Lost(Refusal):
    """The server is not whole and could not be healed: nothing may be asked of it any more."""


@dataclass(frozen=True)
class Run:
    """One server and the two checkpoints. Tensors are read to `device` when a step first needs them, and stay there."""

    calls: WeightCalls
    same_folder: Path
    other_folder: Path | None = None
    other_bits: Bits | None = None  # of a fresh server started with `other_folder`
    log: Path | None = None
    times: int = 20
    layer: int = 2
    num_layers: int | None = None  # of the server's model, for the step `whole`
    bucket_bytes: int = 512 << 20
    concurrency: int = 8
    group_backend: str = "nccl"  # of the step `distributed`
    device: str = "cuda"
    look: Callable[[str], dict[str, Any]] = field(default=observe)
    settle: float = 2.0  # seconds of load before and after an update
    join: Callable[[str, int, str], TrainerGroup] = TrainerGroup
    by_ipc: Callable[..., Answer] = trainer_ipc.send

    @cached_property
    def before(self) -> Bits:
        """Of the server as it was started."""
        return bits(self.url)

    @cached_property
    def same(self) -> Tensors:
        return read(self.same_folder, self.device)

    @cached_property
    def other(self) -> Tensors:
        if self.other_folder is None:
            raise Refusal("this step needs other weights: give --other FOLDER.")
        return read(self.other_folder, self.device)

    @property
    def url(self) -> str:
        return self.calls.url

    def parts(self, tensors: Tensors) -> list[list[Named]]:
        return buckets(tensors, self.bucket_bytes)

    def captures(self) -> int | None:
        """Lines about graph capture in the server's log; None: no log was given."""
        return len(_CAPTURE.findall(self.log.read_text(errors="replace"))) if self.log else None

    def refused(self, what: str, answer: Answer) -> list[str]:
        """Empty where it was not, else one sentence; the server has its own weights again then, and goes on.

        Raises `Lost` where it does not take them.
        """
        if answer.success:
            return []
        said = f"{what}: refused ({answer.message[:300]})"
        healed = self.calls.from_disk(str(self.same_folder))
        if not healed.success:
            raise Lost(f"{said}, and nor are the server's own weights taken ({healed.message[:300]}).")
        self.calls.go_on()
        return [said]

    def check(self, what: str, answer: Answer, wanted: Bits) -> list[str]:
        return self.refused(what, answer) or unequal(what, bits(self.url), wanted)

    def back(self) -> list[str]:
        """The server's own weights again."""
        return self.check("back", self.calls.refresh(self.parts(self.same), flat=True), self.before)


def step_same(run: Run) -> Found:
    """The same weights by every path: no bit changes."""
    found = unequal("asked twice", bits(run.url), run.before)
    captures = run.captures()
    experts = experts_of(run.same, run.layer)
    for what, refresh in {
        "from disk": lambda: run.calls.from_disk(str(run.same_folder)),
        "tensors": lambda: run.calls.refresh(run.parts(run.same)),
        "flattened buckets": lambda: run.calls.refresh(run.parts(run.same), flat=True),
        "experts of one layer": lambda: run.calls.refresh(run.parts(experts)),
        "all but these": lambda: run.calls.refresh(run.parts(without(run.same, experts)), flat=True),
        "nothing": lambda: run.calls.refresh([]),
    }.items():
        found += run.check(what, refresh(), run.before)
    return {"problems": found + recaptured(captures, run.captures())}


def step_other(run: Run) -> Found:
    """Other weights by every path: the bits of a server started with them."""
    wanted, experts = run.other_bits, experts_of(run.other, run.layer)
    if wanted is None:
        raise Refusal("this step needs the answers of a fresh server: give --other-answers FILE.")
    found = [] if wanted["scores"] != run.before["scores"] else ["both checkpoints answer alike: nothing can be shown"]
    found += run.check("flattened buckets", run.calls.refresh(run.parts(run.other), flat=True), wanted)
    found += run.back()
    found += run.refused("experts of one layer", run.calls.refresh(run.parts(experts)))
    found += [] if unequal("", bits(run.url), run.before) else ["other experts in one layer changed nothing"]
    found += run.check("and then the rest", run.calls.refresh(run.parts(without(run.other, experts))), wanted)
    found += run.check("from disk, back", run.calls.from_disk(str(run.same_folder)), run.before)
    found += run.check("from disk", run.calls.from_disk(str(run.other_folder)), wanted)
    return {"problems": found + run.back()}


def recaptured(before: int | None, after: int | None) -> list[str]:
    return [] if before == after else [f"the log has {after} lines about graph capture, it had {before}"]


def step_many(run: Run) -> Found:
    """Refreshes in a row, other and own weights in turn: seconds, bytes, memory, and no new graphs."""
    turns = [run.other, run.same] if run.other_folder else [run.same]
    captures, seconds, memory, found = run.captures(), [], [], []
    for turn in range(run.times):
        parts = run.parts(turns[turn % len(turns)])
        started = time.monotonic()
        found += run.refused(f"refresh {turn + 1}", run.calls.refresh(parts, flat=True))
        seconds.append(round(time.monotonic() - started, 3))
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()  # of this process, so that only the server's memory can grow
        memory.append(run.look(run.url)["gpu_mib"])
    if run.times % len(turns):
        found += run.back()
    found += unequal(f"after {run.times} refreshes", bits(run.url), run.before)
    if (grown := memory[-1] - memory[min(1, len(memory) - 1)]) > GROWTH_MIB:
        found.append(f"GPU memory grew by {grown:.0f} MiB after the second refresh")
    sizes = {"bytes": num_bytes(run.same.values()), "calls": len(run.parts(run.same)), "seconds": seconds, "gpu_mib": memory}
    return {**sizes, "problems": found + recaptured(captures, run.captures())}


def step_load(run: Run) -> Found:
    """Other weights while requests run: without a pause from disk, and in SGLang's pause modes from tensors."""
    parts, counts, found = run.parts(run.other), {}, []
    updates: dict[str, Callable[[], Answer]] = {
        "drain": lambda: run.calls.from_disk(str(run.other_folder), version="drain"),
        "retract": lambda: run.calls.refresh(parts, flat=True, mode="retract", version="retract"),
        "abort": lambda: run.calls.refresh(parts, flat=True, mode="abort", version="abort"),
    }
    for number, (mode, update) in enumerate(updates.items()):
        with refresh_load.traffic(run.url, run.concurrency, seed=number) as replies:
            time.sleep(run.settle)
            found += run.refused(mode, update())
            refresh_load.wait_for_more(replies, 2 * run.concurrency)  # those running now may be of both weights
        counts[mode] = refresh_load.judge(run.url, replies)
        found += refresh_load.problems(mode, counts[mode]) + run.back()
    return {**counts, "problems": found}


def step_bad(run: Run) -> Found:
    """Bad updates: a sentence each, the documented state, and healed by an update of the layer's experts where it has to be."""
    said = {}
    found: list[str] = []
    for bad in BAD_UPDATES:
        answer, wrong = try_bad(run, bad)
        said[bad.name] = {"answer": answer.message[:300], "state": bad.state}
        found += wrong
    return {"answers": said, "problems": found}


def try_bad(run: Run, bad: BadUpdate) -> tuple[Answer, list[str]]:
    """Paused throughout: a layer that is not whole must not meet a request."""
    run.calls.pause("retract")
    answer = bad.make(run.calls, run.same, run.layer)
    if answer.success:
        found = [f"{bad.name}: was taken"]
    else:
        found = [] if re.search(bad.words, answer.message) else [f"{bad.name}: says {answer.message[:300]!r}"]
    if bad.state == NOT_SERVED or answer.success:
        found += run.refused(f"{bad.name}, healing", run.calls.session(run.parts(experts_of(run.same, run.layer))))
    run.calls.go_on()
    return answer, found + unequal(f"{bad.name}, afterwards", bits(run.url), run.before)


def step_sleep(run: Run) -> Found:
    """Weights and KV cache released and resumed without a backup, then every tensor sent: the bits from before."""
    wanted, parts, captures = run.before, run.parts(run.same), run.captures()
    awake = run.look(run.url)["gpu_mib"]
    run.calls.pause("abort")
    run.calls.release("kv_cache", "weights")
    asleep = run.look(run.url)["gpu_mib"]
    run.calls.resume("weights")
    answer = run.calls.session(parts, flat=True, flush=False)
    run.calls.resume("kv_cache")
    found = run.refused("after the sleep", answer)
    if awake - asleep < RELEASED_MIB:
        found.append(f"{awake - asleep:.0f} MiB were released: start the server with --enable-memory-saver")
    if answer.success:
        run.calls.go_on()
        found += run.refused("flush", run.calls.flush()) + unequal("after the sleep", bits(run.url), wanted)
    again = run.look(run.url)["gpu_mib"]
    memory = {"gpu_mib": {"awake": awake, "asleep": asleep, "again": again}}
    return {**memory, "problems": found + recaptured(captures, run.captures())}


def step_distributed(run: Run) -> Found:
    """Flattened buckets by broadcast: the same weights change no bit, other ones (if their answers are known) come and go."""
    turns = [("the same", run.same, run.before)]
    if run.other_folder and run.other_bits:
        turns += [("other", run.other, run.other_bits), ("the same again", run.same, run.before)]
    captures, seconds, found = run.captures(), [], []
    with run.join(run.url, run.calls.ranks, run.group_backend) as group:
        calls = BroadcastCalls(group)
        for what, tensors, wanted in turns:
            parts = run.parts(tensors)
            started = time.monotonic()
            answer = calls.refresh(parts, flat=True)
            seconds.append(round(time.monotonic() - started, 3))
            found += run.check(what, answer, wanted)
            if not answer.success:
                break  # the group is not usable any more
    facts = {"backend": run.group_backend, "bytes": num_bytes(run.same.values()), "calls": len(run.parts(run.same))}
    return {**facts, "seconds": seconds, "problems": found + recaptured(captures, run.captures())}


def step_ipc(run: Run) -> Found:
    """Through checkpoint-engine: the same weights change no bit, other ones come and go, an expert that stays out is named."""
    turns = [("the same", run.same_folder, run.before)]
    if run.other_folder and run.other_bits:
        turns += [("other", run.other_folder, run.other_bits), ("the same again", run.same_folder, run.before)]
    captures, seconds, found = run.captures(), [], []
    for what, folder, wanted in turns:
        started = time.monotonic()
        answer = run.by_ipc(run.url, folder, run.calls.ranks)
        seconds.append(round(time.monotonic() - started, 3))
        found += run.check(what, answer, wanted)
    absent = f"layers.{run.layer}.ffn.experts.5."
    run.calls.pause("retract")  # the layer is not served until it is whole again
    answer = run.by_ipc(run.url, run.same_folder, run.calls.ranks, absent)
    if answer.success or not re.search(r"experts\.5\b.* did not come", answer.message):
        found.append(f"without {absent}*: {answer.message[:300]!r}")
    found += run.refused("healing", run.calls.session(run.parts(experts_of(run.same, run.layer))))
    run.calls.go_on()
    found += unequal("healed", bits(run.url), run.before)
    facts = {"bytes": num_bytes(run.same.values()), "seconds": seconds, "answer": answer.message[:300]}
    return {**facts, "problems": found + recaptured(captures, run.captures())}


def step_whole(run: Run) -> Found:
    """A last step: experts of every layer of a model of which `same` holds a few layers, three times: the first ones, others, and
    the first again, whose bits come back."""
    if run.num_layers is None:
        raise Refusal("this step sends experts for every layer of the server's model: give --layers.")
    captures, seconds, memory, answers, found = run.captures(), [], [], [], []
    for shift in (0, 1, 0):
        tensors = experts_of_all(run.same, run.num_layers, shift)
        started = time.monotonic()
        answer = run.calls.refresh(run.parts(tensors), flat=True)
        seconds.append(round(time.monotonic() - started, 3))
        if not answer.success:
            raise Lost(f"refused ({answer.message[:300]}).")
        memory.append(run.look(run.url)["gpu_mib"])
        answers.append(bits(run.url))
    found += unequal("the first experts again", answers[2], answers[0])
    found += [] if unequal("", answers[1], answers[0]) else ["other experts changed nothing"]
    if (grown := memory[2] - memory[0]) > GROWTH_MIB:
        found.append(f"GPU memory grew by {grown:.0f} MiB after the first refresh")
    sizes = {"bytes": num_bytes(tensors.values()), "calls": len(run.parts(tensors)), "seconds": seconds, "gpu_mib": memory}
    return {**sizes, "problems": found + recaptured(captures, run.captures())}


def step_torn(run: Run) -> Found:
    """The last step: after a bad update generation goes on, against the documentation. The server must end, not answer."""
    answer = run.calls.refresh([list(experts_of(run.same, run.layer, 5).items())[:3]])
    found = ["half an expert was taken"] if answer.success else []
    run.calls.go_on()
    with_answer = refresh_load.ask(run.url, [1000, 1001, 1002], 2)
    if with_answer.failure is None:
        found.append(f"a layer that is not whole answered {with_answer.tokens}")
    said = run.log.read_text(errors="replace") if run.log else ""
    if run.log and "one weight update that brings every expert" not in said:
        found.append("the log does not say why the server ended")
    return {"answer": answer.message[:300], "request": with_answer.failure, "problems": found}


STEPS: dict[str, Callable[[Run], Found]] = {
    "same": step_same,
    "other": step_other,
    "many": step_many,
    "load": step_load,
    "bad": step_bad,
    "sleep": step_sleep,
    "distributed": step_distributed,
    "ipc": step_ipc,
    "whole": step_whole,
    "torn": step_torn,
}
USUAL: Sequence[str] = ("same", "other", "many", "load", "bad")
