"""Which rows of a layer's experts the packed format holds exactly (`kernels/CONTRACT.md` section 3). Reads scales only."""

from dataclasses import dataclass

import torch

from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.quantization import layout
from hopper_moe.quantization.codecs import as_bytes


@dataclass(frozen=True)
class InexactExpert:
    """One expert's matrix with rows that the packed format cannot hold."""

    tensor: str  # "w13" or "w2"
    expert: int  # local index, dim 0 of the tensor
    num_nan: int  # scale bytes that are 255
    num_wide_rows: int  # rows whose scale bytes span more than 11
    num_large_rows: int  # rows whose base byte is above 249
    worst_span: int  # largest max - min over the rows' scale bytes, NaN bytes left out
    worst_base: int  # largest base byte of a row

    def sentence(self, name: str) -> str:
        """What is wrong, worst first; `name` says which tensor of which layer."""
        where = f"{name} expert {self.expert}"
        if self.num_nan:
            return f"{where}: {self.num_nan} scale bytes are {layout.UE8M0_NAN} (NaN); the checkpoint is damaged, fetch it again."
        if self.num_wide_rows:
            found = f"the scales of {self.num_wide_rows} rows span up to {self.worst_span} powers of two"
            limit = layout.MAX_DELTA
        else:
            found = f"the smallest scale byte of {self.num_large_rows} rows is up to {self.worst_base}"
            limit = layout.MAX_BASE
        return (
            f"{where}: {found}, above the {limit} that the packed FP4 format holds exactly; "
            "HOPPER_MOE_INEXACT_ROWS=reference runs such layers on the exact reference (slow)."
        )


@dataclass(frozen=True)
class ExactnessReport:
    """What `check_exact` found over all experts of a layer."""

    inexact: tuple[InexactExpert, ...]
    num_rows: int  # rows looked at, both matrices
    worst_span: int  # over all rows

    @property
    def is_exact(self) -> bool:
        return not self.inexact

    @property
    def has_nan(self) -> bool:
        """A NaN scale is a damaged checkpoint: no kernel may serve it."""
        return any(found.num_nan for found in self.inexact)

    @property
    def num_inexact_rows(self) -> int:
        """Rows that span too much or start too high (NaN bytes are not counted here)."""
        return sum(found.num_wide_rows + found.num_large_rows for found in self.inexact)

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


def check_exact(w13_scale: torch.Tensor, w2_scale: torch.Tensor) -> ExactnessReport:
    """Looks at every scale byte of a layer: uint8 or float8_e8m0fnu [E, rows, groups]. One device synchronisation per matrix and
    layer.
    """
    inexact: list[InexactExpert] = []
    num_rows = worst_span = 0
    for tensor, scale in (("w13", w13_scale), ("w2", w2_scale)):
        data = as_bytes(scale)
        num_rows += data.shape[0] * data.shape[1]
        if not data.numel():
            continue
        smallest, largest = data.amin(-1).int(), data.amax(-1).int()
        num_nan = (data == layout.UE8M0_NAN).sum((1, 2))
        if bool(num_nan.any()):
            largest = data.masked_fill(data == layout.UE8M0_NAN, 0).amax(-1).int()
        span = (largest - smallest).clamp_min(0)  # a row of NaNs only has largest 0
        wide, large = span > layout.MAX_DELTA, (smallest > layout.MAX_BASE) & (smallest < layout.UE8M0_NAN)
        per_expert = torch.stack((num_nan, wide.sum(1), large.sum(1), span.amax(1), smallest.amax(1)), 1).tolist()
        worst_span = max(worst_span, *(row[3] for row in per_expert))
        inexact += [InexactExpert(tensor, expert, *row) for expert, row in enumerate(per_expert) if any(row[:3])]
    return ExactnessReport(tuple(inexact), num_rows, worst_span)
