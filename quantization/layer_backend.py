"""Interface from the quantisation method to the code that runs a layer, which `moe_backends` injects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig

    from hopper_moe.quantization.expert_tensors import ExpertTensors


@dataclass(frozen=True)
class CheckpointExperts:
    """A layer's local experts as SGLang loaded them, dim 0 = local expert, rows of w13 `[w1; w3]`."""

    w13: torch.Tensor  # FP4: int8 [E, 2I, H/2]; FP8: float8_e4m3fn [E, 2I, H]
    w13_scale: torch.Tensor  # FP4: float8_e8m0fnu [E, 2I, H/32]; FP8: float32 [E, 2I/128, H/128]
    w2: torch.Tensor  # FP4: int8 [E, H, I/2]; FP8: float8_e4m3fn [E, H, I]
    w2_scale: torch.Tensor  # FP4: float8_e8m0fnu [E, H, I/32]; FP8: float32 [E, H/128, I/128]

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The four tensors in the order of the fields."""
        return self.w13, self.w13_scale, self.w2, self.w2_scale

    def store(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> None:
        """Replace one expert's tensors (no expert dim, the same types)."""
        for mine, given in zip(self.tensors, (w13, w13_scale, w2, w2_scale), strict=True):
            mine[expert].copy_(given)

    def holds(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> bool:
        """Whether these are one expert's tensors, bit for bit."""
        given = (w13, w13_scale, w2, w2_scale)
        return all(
            torch.equal(mine[expert].view(torch.uint8), other.view(torch.uint8))
            for mine, other in zip(self.tensors, given, strict=True)
        )


class LayerBackend(Protocol):
    """One layer's kernel. One object per layer, made by the hook that gives SGLang the quant method."""

    exchanges: bool
    """Whether the kernel itself moves tokens between ranks (`run_across_ranks`); else SGLang's dispatcher does (`run`)."""
    max_tokens_per_rank: int
    """Limit of one call of `run_across_ranks`; larger calls of `run` are split."""

    def build(self, layer: FusedMoE, config: MoeRunnerConfig) -> None:
        """The sizes are known: SGLang's layer has this rank's place in its groups, SGLang's config the sizes of its experts.

        Raises `Refusal` when the kernel does not fit them."""

    def choose_format(self, checkpoint: CheckpointExperts) -> type[ExpertTensors] | None:
        """The packed format of this layer; None: it runs on the checkpoint's own tensors. Ranks that exchange tokens agree.

        Raises `Refusal` for a layer that no allowed format holds exactly.
        """

    def require_fit(self, expert: CheckpointExperts, name: str) -> bool:
        """Whether the format chosen at load holds one new expert (dim 0 is 1, `name` in messages) exactly; False: it may round.

        Raises `Refusal` for one that the format cannot hold.
        """

    def expect(self, checkpoint: CheckpointExperts) -> None:
        """Compute the self-check's expected result from the tensors as they were loaded."""

    def prepare(self, experts: ExpertTensors | CheckpointExperts) -> None:
        """Pass the experts to the kernel and run the self-check. Raises `Refusal` when the result differs from the reference."""

    @property
    def kept_tensors(self) -> tuple[torch.Tensor, ...]:
        """After `prepare`: what must outlive a release of the weights' memory, besides the experts."""

    def add_ready(self, parameters: list[torch.Tensor]) -> None:
        """Count the layer and its device memory."""

    def run(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Partial sums of this rank's experts: bf16 [M, H] from bf16 [M, H], int32 [M, K] and float32 [M, K]."""

    def run_blocks(self, blocks: torch.Tensor, counts: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """One expert's output for every row that lies in its block, without weights and sums. Never waits for the device.

        Args:
            blocks: bf16 [E, M, H], contiguous; rows from `counts` on may hold anything, NaN too.
            counts: int32 [E] on the device, valid rows of each of this rank's experts.
            num_tokens: that this rank brought to the call, for the metrics.

        Returns:
            bf16 [E, M, H]; rows from `counts` on are undefined.
        """

    def run_across_ranks(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Complete sums for this rank's rows. Every rank of the group calls it, also with 0 tokens."""
