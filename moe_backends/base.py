"""What a kernel choice has to offer: one small interface between the quant method and the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from hopper_moe.moe_backends.env_table import DEFAULT_TIMEOUT_S

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


@dataclass(frozen=True)
class ExpertShard:
    """The experts that one rank holds, and the sizes that its kernel is built for.

    Expert ids everywhere in this package are *global* (physical ids under EPLB). This rank holds the ids
    `first_expert .. first_expert + num_local_experts - 1`.
    """

    num_experts: int  # over all ranks
    first_expert: int
    num_local_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int  # of this rank: already divided by the tensor-parallel size of the experts
    swiglu_limit: float | None  # None: no clamp
    max_tokens_per_rank: int
    group: dist.ProcessGroup | None = None  # ranks that exchange tokens inside the kernel; None: SGLang moves them
    fp8_combine: bool = False  # options of that exchange (contract section 1)
    fp4_dispatch: bool = False
    timeout_s: float = DEFAULT_TIMEOUT_S  # how long to wait for a rank of the group
    layer: int = field(default=-1, compare=False)  # its number, for messages


class ExpertTensors(Protocol):
    """A layer's local experts as one kernel reads them: a frozen dataclass whose fields are tensors with dim 0 = local expert.

    The loader makes it `empty`, stores one expert after the other, and registers its fields as parameters of the layer: a layer
    exists in one format only, and SGLang's EPLB moves an expert by copying dim 0 of each.
    """

    holds_every_row: ClassVar[bool]  # False: rows whose scales span more than 12 octaves have to be refused first

    @classmethod
    def empty(cls, num_experts: int, hidden_size: int, intermediate_size: int, device: torch.device | str) -> Self:
        """Uninitialised tensors for this many experts. Raises `Refusal` for sizes that the format does not have."""

    def store(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> None:
        """Convert one expert's checkpoint tensors (no expert dim, rows of w13 `[w1; w3]`) into slot `expert`.

        FP4 experts are bytes, FP8 ones float8_e4m3fn with float32 scales per 128 x 128; a format for FP8 takes both and expands
        the former.
        """


class ExpertRunner(Protocol):
    """Runs one layer's local experts. One object per layer, made by `registry.create_runner`."""

    experts_type: ClassVar[type[ExpertTensors]]  # what `prepare` takes

    def prepare(self, experts: ExpertTensors, shard: ExpertShard) -> None:
        """Take the layer's weights (kept by reference, never copied) and anything the kernel needs beside them.

        Called once per layer after loading; again after a weight reload, which must give the same state.
        Raises `Refusal` when the shapes do not fit the kernel.
        """

    def run(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the local experts' outputs.

        Args:
            hidden_states: bf16 [num_tokens, hidden_size]; num_tokens may be 0.
            topk_ids: int32 [num_tokens, top_k], global expert ids; -1 and ids outside the local range are skipped.
            topk_weights: float32 [num_tokens, top_k], the routed scaling factor already multiplied in.

        Returns:
            bf16 [num_tokens, hidden_size], a fresh tensor; rows without a local expert are exact zeros.
        """
