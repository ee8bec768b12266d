"""What `hopper-moe checkpoint inspect` reports: sizes, scale statistics, memory per rank, kernels that can serve it. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hopper_moe.moe_backends.registry import REGISTRY, LayerShape, layer_refusals
from hopper_moe.quantization import layout
from hopper_moe.quantization.checkpoint_check import check_config, check_experts, check_other_tensors, check_scale
from hopper_moe.quantization.checkpoint_files import TensorInfo, read_config, read_headers

EP_SIZES = (1, 2, 4, 8)
_GIB = 1 << 30


@dataclass(frozen=True)
class ScaleStatistics:
    """Over all rows of all expert matrices. A row's span is its largest minus its smallest scale byte."""

    rows_by_span: tuple[int, ...]  # index: span, 0..254
    smallest: int
    largest: int
    num_large_base_rows: int  # rows whose smallest byte is above 249

    @property
    def num_rows(self) -> int:
        return sum(self.rows_by_span)

    @property
    def num_inexact_rows(self) -> int:
        """Rows that the packed format cannot hold exactly."""
        return sum(self.rows_by_span[layout.MAX_DELTA + 1 :]) + self.num_large_base_rows

    @property
    def worst_span(self) -> int:
        return max(span for span, rows in enumerate(self.rows_by_span) if rows)


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect_checkpoint` found."""

    folder: Path
    config: Mapping[str, Any]
    num_tensors: int
    num_bytes: int
    expert_bytes: int
    expert_layers: tuple[str, ...]
    expert_types: tuple[str, str]  # of weights and scales, safetensors names
    scales: ScaleStatistics | None  # None: not read

    def rank_gib(self, ep_size: int) -> float | None:
        """GiB of weights on one rank: its share of the experts and all other tensors. None: experts do not divide evenly."""
        if self.config["n_routed_experts"] % ep_size:
            return None
        return (self.expert_bytes / ep_size + self.num_bytes - self.expert_bytes) / _GIB

    def kernel_problems(self, kernel: str) -> list[str]:
        """Why `kernel` cannot serve this checkpoint; empty: it can (on the machine it needs)."""
        config, spec = self.config, REGISTRY[kernel]
        shape = LayerShape(
            config["hidden_size"],
            config["moe_intermediate_size"],
            config["n_routed_experts"],
            config["num_experts_per_tok"],
            config["expert_dtype"],
        )
        problems = [] if spec.factory else ["it is not built in this release"]
        return problems + [sentence.rstrip(".") for sentence in layer_refusals(spec, shape)]


def inspect_checkpoint(path: str | Path, *, read_scales: bool = True, progress: bool = False) -> Inspection:
    """Reads config.json, headers and (unless told not to) every expert scale. Raises Refusal as `validate_checkpoint` does."""
    folder = Path(path)
    config = read_config(folder)
    check_config(config, folder)
    tensors = read_headers(folder)
    layers = check_experts(config, tensors)
    check_other_tensors(config, tensors)
    experts = [info for layer in layers.values() for info in layer.values()]
    scales = [info for info in experts if info.name.endswith(".scale")]
    weights = [info for info in experts if info.name.endswith(".weight")]
    types = tuple("/".join(sorted({info.dtype for info in infos})) for infos in (weights, scales))
    return Inspection(
        folder,
        config,
        len(tensors),
        sum(info.num_bytes for info in tensors.values()),
        sum(info.num_bytes for info in experts),
        tuple(layers),
        types,
        _statistics(scales, progress) if read_scales else None,
    )


def _statistics(scales: list[TensorInfo], progress: bool) -> ScaleStatistics:
    rows_by_span = np.zeros(255, np.int64)
    smallest, largest, num_large = 254, 0, 0
    for info in tqdm(scales, desc="scales", unit="tensor", disable=not progress):
        data = check_scale(info)
        low, high = data.min(1), data.max(1)
        rows_by_span += np.bincount(high - low, minlength=255)
        smallest, largest = min(smallest, int(low.min())), max(largest, int(high.max()))
        num_large += int((low > layout.MAX_BASE).sum())
    return ScaleStatistics(tuple(rows_by_span.tolist()), smallest, largest, num_large)


def _number(gib: float) -> str:
    """Two decimals, or two significant digits for what is smaller than that."""
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.2g}"


def report_lines(found: Inspection) -> list[str]:
    """The inspection as lines of text."""
    config = found.config
    weight_type, scale_type = found.expert_types
    gib = ", ".join(
        f"EP {size}: {_number(value)}" if value is not None else f"EP {size}: experts do not divide"
        for size in EP_SIZES
        for value in [found.rank_gib(size)]
    )
    lines = [
        f"checkpoint         {found.folder}",
        f"architecture       {', '.join(config.get('architectures', ['unknown']))}",
        f"experts            {config['expert_dtype']}: weights {weight_type}, scales {scale_type}",
        f"shape              hidden_size {config['hidden_size']}, intermediate_size {config['moe_intermediate_size']}, "
        f"{config['n_routed_experts']} experts, top_k {config['num_experts_per_tok']}, {len(found.expert_layers)} expert layers",
        f"gating             swiglu_limit {config.get('swiglu_limit')}, "
        f"routed_scaling_factor {config.get('routed_scaling_factor', 1.0)}",
        f"weights            {found.num_tensors} tensors, {_number(found.num_bytes / _GIB)} GiB, of which experts "
        f"{_number(found.expert_bytes / _GIB)} GiB",
        f"GiB per rank       {gib} (experts divided, everything else on every rank)",
    ]
    if found.scales:
        spans = found.scales
        counts = ", ".join(f"{span}: {rows}" for span, rows in enumerate(spans.rows_by_span) if rows)
        lines += [
            f"scales             2**{spans.smallest - layout.UE8M0_BIAS} .. 2**{spans.largest - layout.UE8M0_BIAS}",
            f"rows by span       {counts} (powers of two between a row's smallest and largest scale)",
            f"exact              {spans.num_rows - spans.num_inexact_rows} of {spans.num_rows} rows fit the packed format",
        ]
        if spans.num_inexact_rows:
            lines.append(
                f"inexact            {spans.num_inexact_rows} rows, span up to {spans.worst_span} of {layout.MAX_DELTA}: "
                "HOPPER_MOE_INEXACT_ROWS refuses their layers or runs them on the slow exact reference"
            )
    for kernel in REGISTRY:
        problems = found.kernel_problems(kernel)
        lines.append(f"kernel {kernel:<12}{'can serve it' if not problems else 'cannot serve it: ' + '; '.join(problems)}")
    return lines
