"""Checkpoint MXFP4 experts -> the layout of FlashInfer's SM90 mixed-input GEMM, interleaved by FlashInfer's own helpers.

The layout depends on the installed FlashInfer (0.6.15 and 0.7 order the scales differently), so packed tensors are never stored
or moved to another installation. Rows of w13 are `[w3; w1]`: this kernel reads up before gate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch

from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import as_bytes
from hopper_moe.quantization.errors import Refusal


@dataclass(frozen=True)
class InterleavedExperts:
    """The experts of one layer on one rank (`ExpertTensors`), as many bytes as in the checkpoint; all uint8."""

    holds_every_row: ClassVar[bool] = True  # the kernel applies every scale byte unchanged

    w13_interleaved: torch.Tensor  # [E, 2I, H/2]
    w13_interleaved_scale: torch.Tensor  # [E, 2I * H/32]
    w2_interleaved: torch.Tensor  # [E, H, I/2]
    w2_interleaved_scale: torch.Tensor  # [E, H * I/32]

    @property
    def num_experts(self) -> int:
        """Experts held here (local)."""
        return self.w2_interleaved.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w2_interleaved.shape[1]

    @property
    def intermediate_size(self) -> int:
        return self.w2_interleaved.shape[2] * 2

    @property
    def device(self) -> torch.device:
        return self.w2_interleaved.device

    @classmethod
    def empty(cls, num_experts: int, hidden_size: int, intermediate_size: int, device: torch.device | str) -> InterleavedExperts:
        """Uninitialised tensors, to be filled with `store`. Refuses sizes that are no multiple of 128 (a block of scales)."""
        layout.check_dims(hidden_size, intermediate_size)

        def bytes_of(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.uint8, device=device)

        rows, group = 2 * intermediate_size, layout.MXFP4_GROUP
        return cls(
            bytes_of(num_experts, rows, hidden_size // 2),
            bytes_of(num_experts, rows * hidden_size // group),
            bytes_of(num_experts, hidden_size, intermediate_size // 2),
            bytes_of(num_experts, hidden_size * intermediate_size // group),
        )

    def store(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> None:
        """Interleave one expert's checkpoint tensors (no expert dim, rows `[w1; w3]`) into slot `expert`.

        Raises `Refusal` for a scale byte 0 (2**-127, which the kernel would read as 0), and ValueError off the GPU: the helper
        for weights is a CUDA kernel of the library that serves the layer, so the first call compiles it if it was not before.
        """
        matrices = {
            "w13": (up_first(as_bytes(w13)), up_first(as_bytes(w13_scale))),
            "w2": (as_bytes(w2), as_bytes(w2_scale)),
        }
        for name, (_, scale) in matrices.items():
            if not bool(scale.amin()):
                raise Refusal(f"{name} of local expert {expert} has a scale byte 0, which w4a16 reads as 0: use another kernel.")
        for name, (weight, scale) in matrices.items():
            getattr(self, f"{name}_interleaved")[expert].copy_(interleave_weight(weight))
            getattr(self, f"{name}_interleaved_scale")[expert].copy_(interleave_scale(scale))

    def holds(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> bool:
        """Whether slot `expert` has the bytes that these tensors interleave to; FlashInfer has no inverse."""
        again = type(self).empty(1, self.hidden_size, self.intermediate_size, self.device)
        again.store(0, w13, w13_scale, w2, w2_scale)
        return all(torch.equal(getattr(self, field.name)[expert], getattr(again, field.name)[0]) for field in fields(self))


def up_first(w13: torch.Tensor) -> torch.Tensor:
    """Rows `[w1; w3]` (gate, up) as `[w3; w1]`."""
    return w13.roll(w13.shape[0] // 2, 0)


def interleave_weight(weight: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K/2] of one matrix on the GPU -> the same shape in FlashInfer's order."""
    from flashinfer.fused_moe import interleave_moe_weights_for_sm90_mixed_gemm

    if not weight.is_cuda:
        raise ValueError(f"w4a16 weights are interleaved by a CUDA kernel: move them from {weight.device} to the GPU.")
    return interleave_moe_weights_for_sm90_mixed_gemm(weight.contiguous()[None], "fp4")[0]


def interleave_scale(scale: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K/32] of one matrix -> uint8 [N * K/32] in FlashInfer's order."""
    from flashinfer.fused_moe import interleave_moe_scales_for_sm90_mixed_gemm

    return interleave_moe_scales_for_sm90_mixed_gemm(scale.contiguous()[None], group_size=layout.MXFP4_GROUP).flatten()
