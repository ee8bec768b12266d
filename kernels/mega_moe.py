"""The fused MoE layer on SM90 with FP4 or FP8 weights: Python interface of `csrc/`. `kernels/CONTRACT.md` defines the result."""

from __future__ import annotations

import copy
from typing import Self

import torch
import torch.distributed as dist

from hopper_moe.kernels import jit
from hopper_moe.kernels.device import Device, require_sm90
from hopper_moe.kernels.failure import FailureRecord
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.kernels.symmetric import SymmetricBuffer, check_group
from hopper_moe.kernels.tile_table import TileTable, table_for
from hopper_moe.kernels.workspace import LaunchShape, workspace_offsets
from hopper_moe.quantization import layout
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import PackedExperts
from hopper_moe.quantization.packing_fp8 import PackedFp8Experts

MAX_CAPACITY_SLOTS = 1 << 24  # a slot number shares 32 bits with the rank


class MegaMoE:
    """Workspace and launch of the fused kernel for one shape; shared by all layers of a model.

    With a group in the shard every rank brings its own tokens and holds an equal share of the experts; one launch moves rows and
    results between the ranks. All ranks then construct it together and make the same sequence of calls, those without tokens
    too. A peer that does not come within the shard's `timeout_s` ends the process's CUDA context; `failure.check()`, and every
    later call, raise `PeerTimeout`.

    Calls are CUDA-graph capturable: no allocation besides the output, no host synchronisation, fixed addresses.
    All calls on one object must be ordered on one stream (or by events): they share the workspace.
    """

    def __init__(
        self,
        shard: ExpertShard,
        *,
        device: torch.device | str = "cuda",
        weights: type[PackedExperts] | type[PackedFp8Experts] = PackedExperts,
        tiles: TileTable | None = None,
        wave_rows: int | None = None,
    ) -> None:
        """Allocates the workspace; `num_bytes` says how much. Collective with a group.

        Args:
            shard: sizes, expert ids, capacity, group and options of the exchange. The SwiGLU limit and the layer's number are
                those of each call instead.
            weights: the format of the experts that calls bring.
            tiles: token tiles; default: the table measured on this GPU, or the nearest measured one.
            wave_rows: rows the pools hold, a multiple of 128; default: enough for all rows of one rank, 1.5 balanced shares of
                several. Results do not depend on it.

        Raises:
            Refusal: sizes the kernel is not built for, a device that is no SM90 GPU, or a group whose GPUs cannot reach each
                other.
            ValueError: a shard that is not this rank's equal share of its group, or wave_rows that are no multiple of 128.
        """
        _check_shard(shard)
        if wave_rows is not None and (wave_rows < layout.ROW_BLOCK or wave_rows % layout.ROW_BLOCK):
            raise ValueError(f"wave_rows {wave_rows} is not a positive multiple of {layout.ROW_BLOCK}")
        self.shard, self.device = shard, require_sm90(device)
        gpu = Device.of(torch.cuda.get_device_properties(self.device))
        if refusals := gpu.refusals(shard.num_exchanging_ranks):
            raise Refusal(refusals[0])
        self._num_sms = gpu.num_sms
        self.tiles = tiles if tiles is not None else table_for(gpu)
        self._tile_list = self.tiles.as_list()
        self._weights, library = weights, jit.load(weights.library)
        self._pre_dispatch, self._mega_moe = library["pre_dispatch"], library["mega_moe"]
        if shard.group is not None:
            check_group(shard.group, self.device, shard.num_experts)
        shape = LaunchShape.of(shard, shard.num_exchanging_ranks, wave_rows)
        self._shape = shape.integers()
        self.offsets = workspace_offsets(shape, library)
        self.num_bytes = self.offsets["num_bytes"]
        self.buffer = SymmetricBuffer(self.num_bytes, self.device, shard.group)
        self.workspace = self.buffer.tensor
        control = self.workspace[: self.offsets["control_bytes"]].zero_()
        # Of several ranks the buffer stays in place: peers write to it, so that putting back an older copy could undo a flag.
        self.kept_tensors = (control,) if self.buffer.num_ranks == 1 else ()
        self.buffer.barrier()  # zeroed everywhere before anybody may launch
        self.failure = FailureRecord(shape.rank, shard.timeout_s, watch=shape.num_ranks > 1)
        self._timeout_ns = int(shard.timeout_s * 1e9)
        # Ids that some rank of this launch computes.
        self._id_range = (shard.first_expert, shard.first_expert + shard.num_local_experts)
        if shard.group is not None:
            self._id_range = (0, shard.num_experts)

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
            Refusal: more tokens than the capacity. ValueError: tensors that do not fit. PeerTimeout: an earlier call lost a peer.
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

    def with_weights(self, weights: type[PackedExperts]) -> Self:
        """This layer for experts of another FP4 format, in the same workspace: calls on both must be ordered as those on one.
        Its `destroy` is this object's.
        """
        if not (issubclass(weights, PackedExperts) and issubclass(self._weights, PackedExperts)):
            raise ValueError(f"{weights.__name__} has another workspace than {self._weights.__name__}")
        other, library = copy.copy(self), jit.load(weights.library)
        other._weights, other._pre_dispatch, other._mega_moe = weights, library["pre_dispatch"], library["mega_moe"]
        return other

    def destroy(self) -> None:
        """Free the workspace. Collective with a group. The object is unusable afterwards."""
        del self.workspace, self.kept_tensors
        self.buffer.destroy()

    def _check(
        self,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        packed: PackedExperts | PackedFp8Experts,
        num_valid_tokens: torch.Tensor | None,
        out: torch.Tensor | None,
    ) -> None:
        shard, num_tokens = self.shard, hidden_states.shape[0]
        if num_tokens > shard.max_tokens_per_rank:
            raise Refusal(
                f"{num_tokens} tokens are above the capacity {shard.max_tokens_per_rank}: raise HOPPER_MOE_MAX_TOKENS_PER_RANK."
            )
        self._check_tensor("hidden_states", hidden_states, torch.bfloat16, num_tokens, shard.hidden_size)
        self._check_tensor("topk_ids", topk_ids, torch.int32, num_tokens, shard.top_k)
        self._check_tensor("topk_weights", topk_weights, torch.float32, num_tokens, shard.top_k)
        if num_valid_tokens is not None:
            self._check_tensor("num_valid_tokens", num_valid_tokens, torch.int32, 1)
        if out is not None:
            self._check_tensor("out", out, torch.bfloat16, num_tokens, shard.hidden_size)
        if type(packed) is not self._weights:
            raise ValueError(
                f"the experts are {type(packed).__name__}, this MegaMoE was made for weights={self._weights.__name__}"
            )
        mine = (shard.num_local_experts, shard.hidden_size, shard.intermediate_size, self.device)
        if (packed.num_experts, packed.hidden_size, packed.intermediate_size, packed.device) != mine:
            raise ValueError(
                f"the packed experts are {packed.num_experts} x ({packed.hidden_size}, {packed.intermediate_size}) "
                f"on {packed.device}, this MegaMoE is for {mine[0]} x ({mine[1]}, {mine[2]}) on {mine[3]}"
            )

    def _check_tensor(self, name: str, tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> None:
        found = (tensor.dtype, tuple(tensor.shape), tensor.device)
        if found != (dtype, shape, self.device) or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, not a contiguous {dtype} {list(shape)} on "
                f"{self.device}"
            )


def _check_shard(shard: ExpertShard) -> None:
    """Raises Refusal for a layer that the kernel does not serve, ValueError for experts that are not this rank's."""
    layout.check_shape(shard.hidden_size, shard.intermediate_size, shard.num_experts, shard.top_k)
    layout.check_num_experts(shard.num_experts, shard.num_local_experts)
    first, last = shard.first_expert, shard.first_expert + shard.num_local_experts - 1
    if not 0 <= first <= last < shard.num_experts:
        raise ValueError(f"experts {first}..{last} are not inside 0..{shard.num_experts - 1}")
    if shard.group is not None:
        num_ranks, rank = dist.get_world_size(shard.group), dist.get_rank(shard.group)
        share = shard.num_experts // num_ranks
        if (first, shard.num_local_experts) != (rank * share, share):
            raise ValueError(f"experts {first}..{last} are not the share of rank {rank} of {num_ranks} in {shard.num_experts}")
    if not 0 < shard.max_tokens_per_rank * shard.top_k <= MAX_CAPACITY_SLOTS:
        raise Refusal(
            f"{shard.max_tokens_per_rank} tokens per rank are outside 1..{MAX_CAPACITY_SLOTS // shard.top_k}, the limit at top_k "
            f"{shard.top_k}: set HOPPER_MOE_MAX_TOKENS_PER_RANK inside it."
        )
