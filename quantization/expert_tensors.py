"""The interface of a packed expert format to the loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

if TYPE_CHECKING:
    import torch


MARK = "_hopper_moe_layer"
"""Attribute of layers that our quantisation method has packed."""


class ExpertTensors(Protocol):
    """A layer's local experts as one kernel reads them: a frozen dataclass whose fields are tensors with dim 0 = local expert.

    The loader creates it with `empty`, stores one expert after the other, and registers its fields as parameters of the layer.
    A layer has one format only, and SGLang's EPLB moves an expert by copying dim 0 of each field.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    holds_every_row: ClassVar[bool]  # False: see `exactness.check_exact` and `packing.choose_format`

    @classmethod
    def empty(cls, num_experts: int, hidden_size: int, intermediate_size: int, device: torch.device | str) -> Self:
        """Uninitialised tensors for this many experts. Raises `Refusal` for sizes that the format does not support."""

    def store(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> None:
        """Convert one expert's checkpoint tensors (no expert dim, rows of w13 `[w1; w3]`) into slot `expert`.

        FP4 experts are bytes, FP8 ones float8_e4m3fn with float32 scales per 128 x 128; a format for FP8 takes both and expands
        the former. A format that refuses an expert has not changed the slot.
        """

    def holds(self, expert: int, w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> bool:
        """Whether slot `expert` reads back as these tensors, which it holds exactly: the same values."""
