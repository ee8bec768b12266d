"""The interface between the quantisation method and the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from hopper_moe.kernels.shard import ExpertShard
    from hopper_moe.quantization.expert_tensors import ExpertTensors


class ExpertRunner(Protocol):
    """Runs one layer's local experts. One object per layer, made by `registry.create_runner`."""

    @property
    def experts_type(self) -> type[ExpertTensors]:
        """What `prepare` takes. The reference takes the checkpoint's tensors too."""

    def prepare(self, experts: Any, shard: ExpertShard) -> None:
        """Keep the layer's weights (by reference, without a copy) and allocate what the kernel needs besides them.

        Called once per layer after loading; again after a weight reload, which must give the same state.
        Raises `Refusal` when the shapes do not fit the kernel.
        """

    @property
    def kept_tensors(self) -> tuple[torch.Tensor, ...]:
        """After `prepare`: small tensors besides the weights whose contents must outlive a release of the weights' memory. Layers
        that share one give the same object."""

    def run(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weighted sum of the local experts' outputs.

        Args:
            hidden_states: bf16 [num_tokens, hidden_size]; num_tokens may be 0.
            topk_ids: int32 [num_tokens, top_k], global expert ids; -1 and ids outside the local range are skipped.
            topk_weights: float32 [num_tokens, top_k], the routed scaling factor already multiplied in.
            out: bf16 [num_tokens, hidden_size], contiguous, to write to; None: a fresh tensor.

        Returns:
            bf16 [num_tokens, hidden_size]; rows without a local expert are exact zeros, whatever they hold.
        """

    @property
    def launch_counter(self) -> torch.Tensor | None:
        """uint8 [4]: little-endian number of launches of this rank's kernel, all layers together, kept by the kernel itself;
        None: the kernel counts none."""


class ExchangingRunner(ExpertRunner, Protocol):
    """Of a kernel that moves tokens between ranks itself (`KernelSpec.multi_rank`)."""

    def run_across_ranks(
        self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        """`run`, but complete: tokens visit the experts of every rank of `group`. Ranks without tokens call it too.

        Returns:
            bf16 [num_tokens, hidden_size] of this rank's rows.
        """
