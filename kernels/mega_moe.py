"""The fused MoE layer on SM90, FP4 or FP8 weights: Python face of `csrc/` (`kernels/CONTRACT.md` says what it computes)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from hopper_moe.kernels import jit
from hopper_moe.kernels.failure import FailureRecord
from hopper_moe.kernels.symmetric import SymmetricBuffer, check_group
from hopper_moe.kernels.tile_table import TileTable, table_for
from hopper_moe.moe_backends.env_table import DEFAULT_TIMEOUT_S
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.quantization import layout
from hopper_moe.quantization.packing import PackedExperts
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts

# Order of the byte offsets that the library's workspace_layout returns (struct Workspace in csrc/layout.cuh).
_WORKSPACE_FIELDS = (
    "epoch", "exit_count", "gave_up", "arrived", "results_sent", "received_count", "expert_load", "expert_count",
    "x_ready", "h_ready",
    "group_done", "group_claimed", "next_task", "control_bytes", "slot_list", "x", "x_exponent", "x_scale", "topk_ids",
    "topk_weights", "combine", "combine_scale",
    "pool_x", "pool_x_scale", "pool_weight", "pool_slot", "pool_h", "pool_h_scale", "num_bytes",
)  # fmt: skip
MAX_EXPERTS = 400  # kMaxExperts in csrc/layout.cuh: what the table in shared memory holds
MAX_CAPACITY_SLOTS = 1 << 24  # a slot number shares 32 bits with the rank


class _Shape(NamedTuple):
    """struct Shape of csrc/layout.cuh, in its order."""

    hidden_size: int
    intermediate_size: int
    top_k: int
    num_experts: int
    num_local_experts: int
    first_expert: int
    num_ranks: int
    rank: int
    capacity: int
    wave_rows: int
    fp8_combine: bool
    fp4_dispatch: bool

    def integers(self) -> list[int]:
        """As the library takes it."""
        return [int(value) for value in self]


def _workspace_offsets(shape: _Shape, library: str = PackedExperts.library) -> dict[str, int]:
    """Byte offset of every workspace field, by name."""
    return dict(zip(_WORKSPACE_FIELDS, map(int, jit.load(library)["workspace_layout"](shape.integers())), strict=True))


def _wave_rows(num_ranks: int, capacity: int, top_k: int, num_local_experts: int) -> int:
    """Pool rows of one wave: everything one rank can bring, or with several ranks 1.5 times a balanced share of a full batch,
    so that the pools do not grow with the number of ranks; a launch that sends more rows here runs in several waves."""
    slots = capacity * top_k
    most = slots if num_ranks == 1 else min(num_ranks * slots, slots + slots // 2)
    return -(-most // layout.ROW_BLOCK) * layout.ROW_BLOCK + num_local_experts * layout.ROW_BLOCK


def workspace_bytes(
    *,
    num_tokens_capacity: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    num_local_experts: int,
    num_ranks: int = 1,
    fp8_combine: bool = False,
    fp4_dispatch: bool = False,
    library: str = PackedExperts.library,
) -> int:
    """Bytes of device memory that a `MegaMoE` takes besides the weights. Compiles the library if need be; needs no GPU."""
    shape = _Shape(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        top_k=top_k,
        num_experts=num_experts,
        num_local_experts=num_local_experts,
        first_expert=0,
        num_ranks=num_ranks,
        rank=0,
        capacity=num_tokens_capacity,
        wave_rows=_wave_rows(num_ranks, num_tokens_capacity, top_k, num_local_experts),
        fp8_combine=fp8_combine,
        fp4_dispatch=fp4_dispatch,
    )
    return _workspace_offsets(shape, library)["num_bytes"]


class MegaMoE:
    """Workspace and launch of the fused kernel for one shape; shared by all layers of a model.

    With a `group` every rank brings its own tokens and holds `num_experts / num_ranks` experts; one launch moves rows and
    results between the ranks. All ranks then construct it together and make the same sequence of calls, those without tokens
    too. A peer that does not come within `timeout_s` ends the process's CUDA context; `failure.check()`, and every later call,
    raise `PeerTimeout`.

    Calls are CUDA-graph capturable: no allocation besides the output, no host synchronisation, fixed addresses.
    All calls on one object must be ordered on one stream (or by events): they share the workspace.
    """

    def __init__(
        self,
        *,
        num_tokens_capacity: int,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        num_local_experts: int | None = None,
        first_expert: int = 0,
        device: torch.device | str = "cuda",
        tiles: TileTable | None = None,
        group: dist.ProcessGroup | None = None,
        fp8_combine: bool = False,
        fp4_dispatch: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        wave_rows: int | None = None,
        weights: type[PackedExperts] | type[PackedFp8Experts] = PackedExperts,
    ) -> None:
        """Allocates the workspace; `num_bytes` says how much.

        Args:
            num_tokens_capacity: most tokens one call may bring.
            num_experts: size of the id space of `topk_ids`; this object computes the ids
                `first_expert .. first_expert + num_local_experts - 1` (default: all), others are skipped.
            tiles: token tiles; default: the table of this GPU's SKU.
            group: ranks that exchange tokens; rank r computes the r-th `num_experts / num_ranks` ids. None: this rank alone.
            fp8_combine: expert outputs travel as E4M3 with one scale per 128 columns (contract section 1, options).
            fp4_dispatch: tokens travel as E2M1 with one exponent per 32 features (same place).
            timeout_s: how long a kernel waits for a peer.
            wave_rows: rows the pools hold, a multiple of 128; default: enough for all rows of one rank, 1.5 balanced shares of
                several. Results do not depend on it.
            weights: the format of the experts that calls bring.

        Raises:
            Refusal: sizes the kernel is not built for, a device that is no SM90 GPU, or a group whose GPUs cannot reach each
            other.
        """
        layout.check_shape(hidden_size, intermediate_size, num_experts, top_k)
        num_ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        if group is not None:
            if num_local_experts is not None or first_expert:
                raise Refusal("num_local_experts and first_expert follow from the group: give them only without one.")
            num_local_experts = num_experts // num_ranks
            first_expert = rank * num_local_experts
        num_local_experts = num_experts if num_local_experts is None else num_local_experts
        if num_experts > MAX_EXPERTS:
            raise Refusal(f"num_experts {num_experts} is above the {MAX_EXPERTS} the kernel's table holds.")
        if not (0 <= first_expert and 0 < num_local_experts and first_expert + num_local_experts <= num_experts):
            raise Refusal(f"experts {first_expert}..{first_expert + num_local_experts - 1} are not inside 0..{num_experts - 1}.")
        if not 0 < num_tokens_capacity * top_k <= MAX_CAPACITY_SLOTS:
            raise Refusal(f"num_tokens_capacity {num_tokens_capacity} must be 1..{MAX_CAPACITY_SLOTS // top_k} at top_k {top_k}.")
        self.device = torch.device(device)
        if self.device.type != "cuda" or torch.cuda.get_device_capability(self.device) != (9, 0):
            raise Refusal(f"device {device} is no SM90 GPU (H20, H100, H200): use HOPPER_MOE_KERNEL=reference there.")
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.hidden_size, self.intermediate_size, self.top_k = hidden_size, intermediate_size, top_k
        self.num_experts, self.num_local_experts, self.first_expert = num_experts, num_local_experts, first_expert
        self.capacity = num_tokens_capacity
        self.tiles = tiles if tiles is not None else table_for(properties.name)
        self._tile_list = self.tiles.as_list()
        self._num_sms = properties.multi_processor_count
        self._weights, library = weights, jit.load(weights.library)
        self._pre_dispatch, self._mega_moe = library["pre_dispatch"], library["mega_moe"]
        if group is not None:
            check_group(group, self.device, num_experts)
        if wave_rows is None:
            wave_rows = _wave_rows(num_ranks, num_tokens_capacity, top_k, num_local_experts)
        if wave_rows < layout.ROW_BLOCK or wave_rows % layout.ROW_BLOCK:
            raise Refusal(f"wave_rows {wave_rows} is not a positive multiple of {layout.ROW_BLOCK}.")
        shape = _Shape(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            top_k=top_k,
            num_experts=num_experts,
            num_local_experts=num_local_experts,
            first_expert=first_expert,
            num_ranks=num_ranks,
            rank=rank,
            capacity=num_tokens_capacity,
            wave_rows=wave_rows,
            fp8_combine=fp8_combine,
            fp4_dispatch=fp4_dispatch,
        )
        self._shape = shape.integers()
        self.offsets = _workspace_offsets(shape, weights.library)
        self.num_bytes = self.offsets["num_bytes"]
        self.buffer = SymmetricBuffer(self.num_bytes, self.device, group)
        self.workspace = self.buffer.tensor
        self.workspace[: self.offsets["control_bytes"]].zero_()
        self.buffer.barrier()  # zeroed everywhere before anybody may launch
        self.failure = FailureRecord(rank, timeout_s, watch=num_ranks > 1)
        self._timeout_ns = int(timeout_s * 1e9)
        # Ids that some rank of this launch computes.
        self._id_range = (0, num_experts) if group is not None else (first_expert, first_expert + num_local_experts)

    def __call__(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        packed: PackedExperts | PackedFp8Experts,
        *,
        swiglu_limit: float | None,
        routed_scaling_factor: float = 1.0,
        num_valid_tokens: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        layer: int = -1,
    ) -> torch.Tensor:
        """The layer's routed experts on this rank's tokens.

        Args:
            hidden_states: bf16 [num_tokens, hidden_size], contiguous.
            topk_ids: int32 [num_tokens, top_k], global ids; -1 or an id that no rank of the launch computes: skipped.
            topk_weights: float32 [num_tokens, top_k]; multiplied by `routed_scaling_factor` (1.0 when the router already did it).
            swiglu_limit: the checkpoint's clamp; None: none.
            num_valid_tokens: int32 [1] on the device: rows from it on are treated as masked (changing counts under graph replay).
            out: bf16 [num_tokens, hidden_size] to write to; default: a fresh tensor.
            layer: named when a peer does not come.

        Returns:
            bf16 [num_tokens, hidden_size]; rows without a valid slot are exact zeros.

        Raises:
            Refusal: arguments that do not fit. PeerTimeout: an earlier call lost a peer.
        """
        self.failure.check()
        num_tokens = hidden_states.shape[0]
        self._check(hidden_states, topk_ids, topk_weights, packed, num_valid_tokens, out)
        y = torch.empty_like(hidden_states) if out is None else out
        if num_tokens == 0 and self.buffer.num_ranks == 1:
            return y
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device).cuda_stream
            self._pre_dispatch(
                self._shape, self.workspace.data_ptr(), hidden_states.data_ptr(), topk_ids.data_ptr(), topk_weights.data_ptr(),
                0 if num_valid_tokens is None else num_valid_tokens.data_ptr(), routed_scaling_factor, num_tokens, num_tokens,
                *self._id_range, stream,
            )  # fmt: skip
            self._mega_moe(
                self._shape, self.buffer.rank_bases, self._tile_list, *(t.data_ptr() for t in packed.tensors), y.data_ptr(),
                float("inf") if swiglu_limit is None else swiglu_limit, num_tokens, layer, self._timeout_ns, self.failure.address,
                self._num_sms, stream,
            )  # fmt: skip
        return y

    def expert_load(self) -> torch.Tensor:
        """int64 [num_local_experts]: slots that each local expert has computed since the workspace was made (a copy; EPLB's
        input)."""
        begin = self.offsets["expert_load"]
        return self.workspace[begin : begin + 8 * self.num_local_experts].view(torch.int64).clone()

    def destroy(self) -> None:
        """Gives the workspace back. Collective with a group. The object is unusable afterwards."""
        del self.workspace
        self.buffer.destroy()

    def _check(self, hidden_states, topk_ids, topk_weights, packed, num_valid_tokens, out) -> None:
        num_tokens = hidden_states.shape[0]
        if num_tokens > self.capacity:
            raise Refusal(f"{num_tokens} tokens are above the capacity {self.capacity}: raise HOPPER_MOE_MAX_TOKENS_PER_RANK.")
        wanted = {
            "hidden_states": (hidden_states, torch.bfloat16, (num_tokens, self.hidden_size)),
            "topk_ids": (topk_ids, torch.int32, (num_tokens, self.top_k)),
            "topk_weights": (topk_weights, torch.float32, (num_tokens, self.top_k)),
        }
        if num_valid_tokens is not None:
            wanted["num_valid_tokens"] = (num_valid_tokens, torch.int32, (1,))
        if out is not None:
            wanted["out"] = (out, torch.bfloat16, (num_tokens, self.hidden_size))
        for name, (tensor, dtype, shape) in wanted.items():
            if (
                tensor.dtype is not dtype
                or tuple(tensor.shape) != shape
                or not tensor.is_contiguous()
                or tensor.device != self.device
            ):
                raise Refusal(
                    f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, not a contiguous {dtype} "
                    f"{list(shape)} on {self.device}."
                )
        if type(packed) is not self._weights:
            raise Refusal(f"the experts are {type(packed).__name__}, this MegaMoE was made for weights={self._weights.__name__}.")
        mine = (self.num_local_experts, self.hidden_size, self.intermediate_size, self.device)
        if (packed.num_experts, packed.hidden_size, packed.intermediate_size, packed.device) != mine:
            raise Refusal(
                f"the packed experts are {packed.num_experts} x (hidden {packed.hidden_size}, intermediate "
                f"{packed.intermediate_size}) on "
                f"{packed.device}, this MegaMoE is for {mine[0]} x ({mine[1]}, {mine[2]}) on {mine[3]}."
            )
