"""The fused layer on emulated GPUs: the CUDA sources, compiled by the host's C++ compiler against `tests/emulator`, on one rank
or on several that exchange tokens.

The emulator replaces what is below `csrc/ptx/` (one instruction per function) and the CUDA runtime; everything else is what nvcc
compiles. `emulator/machine.hpp` says what it can show and what not.
"""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tvm_ffi
from mega_moe_rig import FACTOR, Batch, random_batch
from tvm_ffi import libinfo

from hopper_moe.kernels import jit
from hopper_moe.kernels.benchmarks.workload import ModelShape
from hopper_moe.kernels.failure import FailureRecord
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.kernels.tile_table import TileTable, smallest_tiles
from hopper_moe.kernels.workspace import LaunchShape, workspace_offsets
from hopper_moe.quantization.packing import PackedExperts
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts

EMULATOR = Path(__file__).parent / "emulator"
# Ubuntu's compiler fortifies by default, and a fortified longjmp between the emulator's stacks aborts.
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-w", "-ffp-contract=off", "-U_FORTIFY_SOURCE")
NUM_SMS = 3
MAX_STEPS = 10**9  # a hang ends here, after a few minutes; the longest test takes 10**8
GUARD_BYTES = 4096
GUARD = 0xA5
NO_TIMEOUT_S = 1e6

SPREAD = ModelShape(640, 256, 16, 3, 16)  # the layer that is spread over ranks
CAPACITY = 260  # of a rank: above kMinTokensToCombineEarly; 4 ranks bring an expert two blocks of 128 rows, if unevenly


def compile_emulated(name: str, folder: Path, csrc: Path = jit.SOURCE_DIR, *, races: bool = False) -> Path:
    """A library of `jit.LIBRARIES` for emulated GPUs, from the sources in `csrc`; `races`: one that can look for
    them."""
    sources, library, include = folder / f"{name}-sources", jit.LIBRARIES[name], f"-I{EMULATOR / 'include'}"
    shutil.copytree(csrc, sources, ignore=shutil.ignore_patterns("ptx"))
    (sources / "ptx").symlink_to(EMULATOR / "ptx")
    flags = [*FLAGS, include, *jit.include_flags(sources), *library.defines]
    watched = ("-fsanitize=thread", "-g1") if races else ()  # the emulator itself answers what this calls
    kernels, output = folder / f"{name}.o", folder / f"{name}.so"
    _compile(*flags, *watched, "-x", "c++", "-c", sources / library.source, "-o", kernels)
    tvm_ffi_folder = Path(libinfo.find_libtvm_ffi()).parent
    _compile("-shared", kernels, *_emulator(), "-o", output, f"-L{tvm_ffi_folder}", "-ltvm_ffi")
    return output


@functools.cache
def _emulator() -> tuple[Path, ...]:
    """The compiled emulator, the same for all kernels; goes with the process."""
    folder = tempfile.mkdtemp(prefix="hopper-moe-emulator-")
    atexit.register(shutil.rmtree, folder)
    objects = {source: Path(folder) / f"{source.stem}.o" for source in sorted(EMULATOR.glob("*.cpp"))}
    for source, output in objects.items():
        _compile(*FLAGS, f"-I{EMULATOR / 'include'}", *jit.include_flags(), "-c", source, "-o", output)
    return tuple(objects.values())


def _compile(*arguments: str | Path) -> None:
    done = subprocess.run(["c++", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


class EmulationError(RuntimeError):
    """What the emulated GPUs could not go on with: a hang, a wrong use of an instruction, an access outside of shared memory."""


class Gpus:
    """Emulated GPUs, one per stream, with the kernels of one library."""

    def __init__(self, library: Path, max_steps: int = MAX_STEPS) -> None:
        self.library, self.functions, self.max_steps = library, tvm_ffi.load_module(str(library)), max_steps
        self.kept: list[object] = []  # what queued calls point to

    def run(self, seed: int) -> None:
        """All that is queued; `seed` decides the order of everything that has no other order."""
        words = str(self.functions["run"](seed, self.max_steps))
        self.kept.clear()
        if words:
            raise EmulationError(re.sub("@([0-9a-f]+)", self._lines, words))

    def _lines(self, address: re.Match) -> str:
        """Source lines of an instruction, the innermost first; the address is that behind it, and 0 is none of the kernels'."""
        if int(address[1], 16) == 0:
            return ""
        command = ["addr2line", "-i", "-e", self.library, hex(int(address[1], 16) - 1)]
        said = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")
        return "(" + " < ".join(Path(line.split()[0]).name for line in said[:4] if line) + ")"


def compiled_on_first_use(make_folder: Callable[[str], Path], **options) -> Callable[..., Gpus]:
    """A function from the type of weights (default: FP4) to emulated GPUs. `options`: as of `compile_emulated`."""

    @functools.cache
    def get(weights: type = PackedExperts) -> Gpus:
        return Gpus(compile_emulated(weights.library, make_folder("emulated"), **options))

    return get


@dataclass
class Rank:
    """What one rank has for itself. Named as in `MegaMoE`, so that `mega_moe_rig` can read its workspace."""

    shard: ExpertShard
    tiles: TileTable
    integers: list[int]  # struct Shape
    offsets: dict[str, int]
    packed: PackedExperts | PackedFp8Experts
    failure: FailureRecord
    memory: torch.Tensor  # the workspace and a guard behind it

    def __post_init__(self) -> None:
        self.memory[:] = GUARD
        self.poison()
        self.workspace[: self.offsets["control_bytes"]] = 0

    @property
    def workspace(self) -> torch.Tensor:
        return self.memory[: self.offsets["num_bytes"]]

    def poison(self) -> None:
        """NaN everywhere but in the counters."""
        self.workspace[self.offsets["control_bytes"] :] = 0xFF

    def check_guard(self) -> None:
        assert (self.memory[self.offsets["num_bytes"] :] == GUARD).all(), "written behind the workspace"


class EmulatedLayer:
    """A layer of `shape.num_experts` experts over `num_ranks` ranks; `experts`: all of them.

    `timeouts_s`: how long each rank waits for others, a nanosecond being a step of the emulator. `of_shard`: fp8_combine,
    fp4_dispatch.
    """

    def __init__(
        self,
        gpus: Gpus,
        shape: ModelShape,
        experts: PackedExperts | PackedFp8Experts,
        capacity: int,
        num_ranks: int = 1,
        *,
        tiles: TileTable | None = None,
        wave_rows: int | None = None,
        timeouts_s: Sequence[float] | None = None,
        **of_shard: bool,
    ) -> None:
        self.gpus, self.shape, self.num_ranks = gpus, shape, num_ranks
        self.num_sms = max(NUM_SMS, num_ranks)  # a CTA speaks to each rank
        shards = [
            ExpertShard.of(shape, capacity, rank=rank, num_ranks=num_ranks, timeout_s=timeout_s, **of_shard)
            for rank, timeout_s in enumerate(timeouts_s or [NO_TIMEOUT_S] * num_ranks)
        ]
        shapes = [LaunchShape.of(shard, num_ranks, wave_rows) for shard in shards]
        offsets = workspace_offsets(shapes[0], gpus.functions)
        self.memory = torch.empty(num_ranks, offsets["num_bytes"] + GUARD_BYTES, dtype=torch.uint8)
        self.ranks = [
            Rank(
                shard,
                tiles or smallest_tiles(),
                shapes[rank].integers(),
                offsets,
                type(experts)(*(tensor.chunk(num_ranks)[rank].contiguous() for tensor in experts.tensors)),
                FailureRecord(rank, shard.timeout_s, watch=False),
                self.memory[rank],
            )
            for rank, shard in enumerate(shards)
        ]

    def enqueue(self, rank: int, batch: Batch, *, layer: int = -1) -> torch.Tensor:
        """`MegaMoE.__call__` on one rank: queued behind its earlier calls. Returns y, which is NaN until `run`."""
        mine, num_tokens = self.ranks[rank], batch.x.shape[0]
        y = torch.full_like(batch.x, float("nan"))
        self.gpus.kept += (self, batch, y)
        self.gpus.functions["pre_dispatch"](
            mine.integers, mine.memory.data_ptr(), batch.x.data_ptr(), batch.topk_ids.data_ptr(), batch.topk_weights.data_ptr(),
            0, FACTOR, num_tokens, num_tokens, 0, self.shape.num_experts, rank,
        )  # fmt: skip
        limit = self.shape.swiglu_limit
        self.gpus.functions["mega_moe"](
            mine.integers, [other.memory.data_ptr() for other in self.ranks], mine.tiles.as_list(),
            *(tensor.data_ptr() for tensor in mine.packed.tensors), y.data_ptr(), float("inf") if limit is None else limit,
            num_tokens, layer, int(mine.shard.timeout_s * 1e9), mine.failure.address, self.num_sms, rank,
        )  # fmt: skip
        return y

    def look_for_races(self) -> None:
        """The GPUs' next runs look for them in shared memory and in the workspaces of these ranks."""
        self.gpus.functions["look_for_races"](self.memory.data_ptr(), self.memory.numel())

    def delay(self, rank: int, num_steps: int) -> None:
        """What the rank gets to do next waits so long."""
        self.gpus.functions["delay"](rank, num_steps)

    def run(self, batches: list[Batch], seed: int) -> list[torch.Tensor]:
        """One call of every rank, in poisoned memory."""
        for rank in self.ranks:
            rank.poison()
        results = [self.enqueue(rank, batch) for rank, batch in enumerate(batches)]
        self.gpus.run(seed)
        for rank in self.ranks:
            rank.check_guard()
        return results


def draw_batch(shape: ModelShape, num_tokens: int, routing: str, generator: torch.Generator, num_ranks: int = 1) -> Batch:
    """`random_batch` on the CPU."""
    return random_batch(shape, shape.num_experts, num_tokens, routing, generator, num_ranks, device="cpu")


def copies_of(experts: PackedExperts, num_experts: int) -> PackedExperts:
    """`num_experts` physical experts, as under EPLB: id e is a copy of the logical expert e % experts.num_experts."""
    logical = torch.arange(num_experts) % experts.num_experts
    return type(experts)(*(tensor[logical] for tensor in experts.tensors))


def joined(batches: Sequence[Batch]) -> Batch:
    """The tokens of all ranks, as one rank's."""
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in ("x", "topk_ids", "topk_weights")))


def bits_of(y: torch.Tensor) -> torch.Tensor:
    """So that NaN equals NaN, and 0 not -0."""
    return y.view(torch.int16)


@dataclass(frozen=True)
class SpreadLayer:
    """`SPREAD` over ranks, and its oracle: one rank that holds all experts."""

    spread: EmulatedLayer
    alone: EmulatedLayer

    @staticmethod
    def make(
        gpus: Gpus, experts: PackedExperts | PackedFp8Experts, num_ranks: int, *, capacity: int = CAPACITY, **options
    ) -> SpreadLayer:
        of_results = {name: options[name] for name in ("fp8_combine", "fp4_dispatch") if name in options}
        return SpreadLayer(
            EmulatedLayer(gpus, SPREAD, experts, capacity, num_ranks, **options),
            EmulatedLayer(gpus, SPREAD, experts, num_ranks * capacity, **of_results),
        )

    def assert_same_bits(self, batches: Sequence[Batch], got: Sequence[torch.Tensor], seed: int, what: str) -> None:
        (want,) = self.alone.run([joined(batches)], seed)
        assert not want.isnan().any(), "NaN from one rank alone"
        assert torch.equal(bits_of(torch.cat(list(got))), bits_of(want)), f"other bits than one rank alone: {what}"
