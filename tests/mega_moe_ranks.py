"""What the tests of several ranks run on every rank: one layer spread over the group, and the same layer whole on each GPU."""

from __future__ import annotations

import logging
import os
import random
import signal
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from mega_moe_rig import FACTOR, PAIRS, RANDOM_EXPERTS, Batch, random_batch

from hopper_moe.kernels.benchmarks.workload import ModelShape, make_layer
from hopper_moe.kernels.failure import PeerTimeout
from hopper_moe.kernels.mega_moe import MegaMoE
from hopper_moe.quantization.packing import PackedExperts, WidePackedExperts
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts

SHAPE = ModelShape(1024, 512, 48, 6, 12)
CAPACITY = 512

# "waves": pools so small that every larger call runs in many waves.
OPTIONS = {
    "bf16": {},
    "fp8_combine": {"fp8_combine": True},
    "fp4_dispatch": {"fp4_dispatch": True},
    "waves": {"wave_rows": 256},
    "fp8_weights": {"weights": PackedFp8Experts},
    "wide_weights": {"weights": WidePackedExperts},
    "pairs": {"tiles": PAIRS},
}


class SpreadLayer:
    """A layer of `shape.num_experts` over the ranks of `group`, and its oracle: one rank that holds all experts."""

    def __init__(self, group: dist.ProcessGroup, shape: ModelShape, capacity: int, seed: int, **options) -> None:
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.shape, self.group = shape, group
        make_experts = RANDOM_EXPERTS[options.get("weights", PackedExperts)]
        whole = make_experts(shape, shape.num_experts, torch.Generator("cuda").manual_seed(seed))  # the same on every rank
        self.whole = whole
        options.setdefault("timeout_s", 20)  # a hang fails soon
        mine = slice(self.rank * shape.num_experts // self.num_ranks, (self.rank + 1) * shape.num_experts // self.num_ranks)
        self.local = type(whole)(*(tensor[mine] for tensor in whole.tensors))
        self.spread = make_layer(shape, shape.num_experts, capacity, group=group, **options)
        for name in ("wave_rows", "timeout_s", "tiles"):
            options.pop(name, None)
        self.alone = make_layer(shape, shape.num_experts, capacity, **options)
        self.generator = torch.Generator("cuda").manual_seed(seed + 1 + self.rank)
        self.random = random.Random(seed + 1 + self.rank)

    def tokens_of(self, case: str) -> int:
        """See the function of this name."""
        return tokens_of(case, self.rank, self.num_ranks, CAPACITY, self.random)

    def batch(self, num_tokens: int, routing: str = "uniform") -> Batch:
        """See `random_batch`."""
        return random_batch(self.shape, self.shape.num_experts, num_tokens, routing, self.generator, self.num_ranks)

    def poison(self) -> None:
        """NaN everywhere but in the counters, while nobody runs."""
        self.spread.buffer.barrier()
        self.spread.workspace[self.spread.offsets["control_bytes"] :].fill_(0xFF)
        self.spread.buffer.barrier()

    def run(self, mm: MegaMoE, packed: PackedExperts | PackedFp8Experts, batch: Batch, **options) -> torch.Tensor:
        y = torch.full_like(batch.x, float("nan"))
        mm(
            batch.x, batch.topk_ids, batch.topk_weights, packed,
            swiglu_limit=self.shape.swiglu_limit, routed_scaling_factor=FACTOR,
            out=y, **options,
        )  # fmt: skip
        return y

    def differs(self, batch: Batch) -> torch.Tensor:
        """bool [] on the device: whether the ranks together give other bits than one rank alone."""
        return (self.run(self.spread, self.local, batch, layer=7) != self.run(self.alone, self.whole, batch)).any()


def tokens_of(case: str, rank: int, num_ranks: int, capacity: int, draw: random.Random) -> int:
    """Tokens of a rank: "ragged" a random number, "empty" none on odd ranks, "one" a single token on the last rank, "full" all
    there is room for, or a number."""
    if case == "ragged":
        return draw.randint(0, capacity)
    if case == "empty":
        return 0 if rank % 2 else draw.randint(1, capacity)
    if case == "one":
        return int(rank == num_ranks - 1)
    return capacity if case == "full" else int(case)


SCENARIOS = [
    (case, routing)
    for case in ("0", "1", "7", "ragged", "empty", "one", "full")
    for routing in ("uniform", "zipf", "one_hot", "to_rank_0")
]
SCENARIOS += [("ragged", "one_expert"), ("full", "one_expert")]


def same_bits(group: dist.ProcessGroup, seed: int, options: dict) -> dict[str, bool]:
    """ "case routing" -> whether the bits of this rank's rows are those of one rank alone."""
    layer = SpreadLayer(group, SHAPE, CAPACITY, seed, **options)
    found = {}
    for case, routing in SCENARIOS:
        batch = layer.batch(layer.tokens_of(case), routing)
        layer.poison()
        found[f"{case} {routing}"] = not bool(layer.differs(batch))
    layer.spread.destroy()
    return found


def same_bits_of_copies(group: dist.ProcessGroup, seed: int, num_experts: int, num_logical: int) -> list[bool]:
    """By number of tokens, whether this rank's bits are those of one rank that holds every expert once. Expert e of the group is
    a copy of the logical expert e % num_logical, as redundant experts are."""
    few, most = ModelShape(256, 128, num_logical, 3, num_logical), 64
    many = replace(few, num_experts=num_experts)
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    whole = RANDOM_EXPERTS[PackedExperts](few, num_logical, torch.Generator("cuda").manual_seed(seed))
    mine = torch.arange(num_experts, device="cuda").chunk(num_ranks)[rank]
    local = PackedExperts(*(tensor[mine % num_logical] for tensor in whole.tensors))
    spread, alone = make_layer(many, num_experts, most, group=group, timeout_s=20), make_layer(few, num_logical, most)
    generator, found = torch.Generator("cuda").manual_seed(seed + 1 + rank), []
    for num_tokens in (1, 7, most):
        batch = random_batch(many, num_experts, num_tokens, "uniform", generator, num_ranks)
        batch.topk_ids[0, 0] = num_experts - 1
        ids = torch.where(batch.topk_ids >= 0, batch.topk_ids % num_logical, -1).int()
        options = {"swiglu_limit": few.swiglu_limit, "routed_scaling_factor": FACTOR}
        got = spread(batch.x, batch.topk_ids, batch.topk_weights, local, **options)
        found.append(torch.equal(got, alone(batch.x, ids, batch.topk_weights, whole, **options)))
    spread.destroy()
    return found


def with_delays(group: dist.ProcessGroup, seed: int, num_calls: int) -> int:
    """Calls with other bits, of `num_calls` before which every rank sleeps a random time on the GPU, the first time two
    seconds."""
    layer = SpreadLayer(group, SHAPE, CAPACITY, seed)
    bad = torch.zeros((), dtype=torch.int64, device="cuda")
    for call in range(num_calls):
        batch = layer.batch(layer.tokens_of("ragged"), layer.random.choice(("uniform", "zipf", "one_hot", "to_rank_0")))
        cycles = layer.random.choice((0, 20_000, 200_000, 2_000_000))
        torch.cuda._sleep(3_600_000_000 if call == 0 and layer.rank == 1 else cycles)
        bad += layer.differs(batch)
    layer.spread.buffer.barrier()
    return int(bad)


def replayed(group: dist.ProcessGroup, seed: int, num_replays: int) -> dict[int, int]:
    """Size of the graph -> replays with other bits: tokens, routing and counts (from 0) change, differently on every rank."""
    layer = SpreadLayer(group, SHAPE, CAPACITY, seed)
    found = {}
    sizes = (1, 8, 64, 300)
    for size in sizes:
        bank = []
        for _ in range(24):
            batch, valid = (
                layer.batch(size, layer.random.choice(("uniform", "zipf", "one_hot", "to_rank_0"))),
                layer.random.randint(0, size),
            )
            ids = batch.topk_ids.clone()
            ids[valid:] = -1
            want = layer.run(layer.alone, layer.whole, Batch(batch.x, ids, batch.topk_weights))
            bank.append((batch, torch.tensor([valid], dtype=torch.int32, device="cuda"), want))
        static, valid = layer.batch(size), torch.zeros(1, dtype=torch.int32, device="cuda")
        y, bad = torch.empty_like(static.x), torch.zeros((), dtype=torch.int64, device="cuda")

        def call(y=y, static=static, valid=valid):
            layer.spread(
                static.x, static.topk_ids, static.topk_weights, layer.local, out=y, num_valid_tokens=valid,
                swiglu_limit=SHAPE.swiglu_limit, routed_scaling_factor=FACTOR,
            )  # fmt: skip

        call()
        layer.spread.buffer.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        for _ in range(num_replays // len(sizes)):
            batch, num_valid, want = layer.random.choice(bank)
            static.x.copy_(batch.x)
            static.topk_ids.copy_(batch.topk_ids)
            static.topk_weights.copy_(batch.topk_weights)
            valid.copy_(num_valid)
            y.fill_(float("nan"))
            graph.replay()
            bad += (y != want).any()
        layer.spread.buffer.barrier()
        found[size] = int(bad)
    return found


def lose_a_rank(group: dist.ProcessGroup, seed: int, timeout_s: float, result_dir: str) -> None:
    """The last rank is killed between two calls; every other rank writes what it then raises and logs, and after how long."""
    logging.basicConfig(filename=f"{result_dir}/{dist.get_rank(group)}.log")
    layer = SpreadLayer(group, SHAPE, CAPACITY, seed, timeout_s=timeout_s)
    layer.run(layer.spread, layer.local, layer.batch(8), layer=7)
    layer.spread.buffer.barrier()
    if layer.rank == layer.num_ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin, batch, y = time.monotonic(), layer.batch(8), torch.empty(8, SHAPE.hidden_size, dtype=torch.bfloat16, device="cuda")

    def call(number: int) -> None:
        layer.spread(batch.x, batch.topk_ids, batch.topk_weights, layer.local, swiglu_limit=None, out=y, layer=number)

    cuda_error = named_error = ""
    call(7)
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        cuda_error = str(error).splitlines()[0]
    seconds = time.monotonic() - begin
    try:
        call(8)
    except PeerTimeout as error:
        named_error = str(error)
    time.sleep(1)  # the log is written by a thread
    with open(f"{result_dir}/{layer.rank}.txt", "w") as file:
        file.write(f"{seconds:.1f}\n{cuda_error}\n{named_error}\n")
    os._exit(0)  # the context is gone: nothing can be torn down
