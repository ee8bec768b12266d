"""Whether the rows of a layer's experts can be packed exactly (`kernels/CONTRACT.md` section 3). Reads all scales, and the codes
of rows whose scales span too many octaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from hopper_moe.quantization import layout, row_scales
from hopper_moe.quantization.codecs import as_bytes
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.row_scales import Rounding, RowKind


@dataclass(frozen=True)
class InexactExpert:
    """A matrix of one expert with rows that no packed format can represent."""

    tensor: str  # "w13" or "w2"
    expert: int  # local index, dim 0 of the tensor
    num_nan: int  # scale bytes that are 255
    num_rows: int  # of `RowKind.BEYOND`
    worst_span: int  # octaves that the worst of these rows needs

    def sentence(self, name: str) -> str:
        """What is wrong, worst first; `name`: the tensor's name in messages."""
        where = f"{name} expert {self.expert}"
        if self.num_nan:
            return f"{where}: {self.num_nan} scale bytes are {layout.UE8M0_NAN} (NaN); the checkpoint is damaged, fetch it again."
        return (
            f"{where}: the scales of {self.num_rows} rows span up to {self.worst_span} powers of two, above the "
            f"{layout.WIDE_MAX_DELTA} that the packed FP4 format holds exactly; HOPPER_MOE_INEXACT_ROWS=round rounds their "
            "smallest weights, HOPPER_MOE_INEXACT_ROWS=reference runs such layers on the exact reference (slow)."
        )


@dataclass(frozen=True)
class ExactnessReport:
    """Result of `check_exact` over all experts of a layer."""

    inexact: tuple[InexactExpert, ...]
    rows: tuple[int, ...]  # number of rows of every `RowKind`
    num_rounded_values: int = 0  # weights of `RowKind.BEYOND` rows that packing changes
    largest_rounded_base: int = 0  # base byte of such a row

    @property
    def is_exact(self) -> bool:
        return not self.inexact

    @property
    def has_nan(self) -> bool:
        """Whether a scale is NaN, which means a damaged checkpoint that no kernel serves."""
        return any(found.num_nan for found in self.inexact)

    @property
    def num_rows(self) -> int:
        """Rows of both matrices, all experts."""
        return sum(self.rows)

    @property
    def num_inexact_rows(self) -> int:
        """Rows that no packed format holds (NaN bytes are not counted here)."""
        return self.rows[RowKind.BEYOND]

    def require_exact(self, layer: str = "") -> None:
        """Raises Refusal naming the first bad expert and the totals; does nothing if every row is exact. `layer` prefixes the
        tensor name.
        """
        if self.is_exact:
            return
        first = next((found for found in self.inexact if found.num_nan), self.inexact[0])
        sentence = first.sentence(f"{layer}.{first.tensor}" if layer else first.tensor)
        others = len(self.inexact) - 1
        rows = f"{self.num_inexact_rows} of {self.num_rows} rows in all"
        more = f" ({others} more expert matrices are affected, {rows})" if others else ""
        raise Refusal(sentence.removesuffix(".") + more + ".")

    def rounding_sentence(self, layer: str) -> str:
        """How many values packing rounds and the error bounds, for a report that is not exact."""
        exponent = self.largest_rounded_base + row_scales.ERROR_EXPONENT
        return (
            f"{layer}: {self.num_rounded_values} weights in {self.num_inexact_rows} of {self.num_rows} rows are rounded, each by "
            f"at most 2**{exponent} ({2.0**exponent:.2g}) and by at most 2**{row_scales.RELATIVE_ERROR_EXPONENT} "
            f"({2.0**row_scales.RELATIVE_ERROR_EXPONENT:.2g}) of the largest weight of its row"
        )


def check_exact(w13: torch.Tensor, w13_scale: torch.Tensor, w2: torch.Tensor, w2_scale: torch.Tensor) -> ExactnessReport:
    """Check every scale byte of a layer, and the codes of rows whose scales span too many octaves.

    Weights int8 or uint8 [E, rows, columns / 2], scales uint8 or float8_e8m0fnu [E, rows, columns / 32].
    """
    return _joined(
        [
            *_check_matrix("w13", as_bytes(w13), as_bytes(w13_scale)),
            *_check_matrix("w2", as_bytes(w2), as_bytes(w2_scale)),
        ]
    )


def add_rows(counts: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Rows of every `RowKind`, summed."""
    return tuple(map(sum, zip([0] * len(RowKind), *counts, strict=True)))


def _joined(reports: Sequence[ExactnessReport]) -> ExactnessReport:
    return ExactnessReport(
        tuple(found for report in reports for found in report.inexact),
        add_rows(report.rows for report in reports),
        sum(report.num_rounded_values for report in reports),
        max((report.largest_rounded_base for report in reports), default=0),
    )


def _check_matrix(name: str, weight: torch.Tensor, scale: torch.Tensor) -> list[ExactnessReport]:
    """One report per expert. If every row is plain, no codes are read and the host synchronises with the device twice."""
    if not scale.numel():
        return []
    is_nan = scale == layout.UE8M0_NAN
    num_nan = is_nan.sum((1, 2)).tolist()
    if any(num_nan):
        scale = torch.where(is_nan, scale.amin(-1, keepdim=True), scale)
    is_plain = row_scales.plain_base(scale, row_scales.E4M3_LIMITS)[1]
    return [
        _check_expert(InexactExpert(name, expert, num_nan[expert], 0, 0), weight[expert], scale[expert], is_plain[expert], others)
        for expert, others in enumerate((~is_plain).sum(1).tolist())
    ]


def _check_expert(
    found: InexactExpert, weight: torch.Tensor, scale: torch.Tensor, is_plain: torch.Tensor, num_others: int
) -> ExactnessReport:
    """Complete `found`, the report of the expert so far; `num_others`: its rows that are not plain."""
    rows = [0] * len(RowKind)
    rows[RowKind.PLAIN] = scale.shape[0] - num_others
    rounding = Rounding(0, 0)
    if num_others:
        weight, scale = weight[~is_plain], scale[~is_plain]
        kinds = row_scales.row_kinds(weight, scale)
        for kind, count in enumerate(torch.bincount(kinds, minlength=len(RowKind)).tolist()):
            rows[kind] += count
    if rows[RowKind.BEYOND]:
        weight, scale = weight[kinds == RowKind.BEYOND], scale[kinds == RowKind.BEYOND]
        span = int(row_scales.needed_span(*row_scales.exact_scales(weight, scale)).max())
        found = replace(found, num_rows=rows[RowKind.BEYOND], worst_span=span)
        rounding = row_scales.rounding_of(weight, scale)
    return ExactnessReport((found,) if found.num_nan or found.num_rows else (), tuple(rows), *rounding)
