"""Report of `hopper-moe checkpoint inspect`: sizes, scale statistics, memory per rank, kernels that can serve it. torch is
imported only for rows whose codes have to be read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends.kernel_specs import REGISTRY
from hopper_moe.moe_backends.registry import layer_refusals
from hopper_moe.quantization import layout
from hopper_moe.quantization.checkpoint_check import check_scale, check_tensors, read_checkpoint
from hopper_moe.quantization.checkpoint_files import TensorInfo
from hopper_moe.quantization.checkpoint_memory import RankBytes, RankLayout, engram_on_host, weights_per_rank
from hopper_moe.quantization.checkpoint_names import EXPERT_TENSOR
from hopper_moe.quantization.model_facts import ModelFacts

EP_SIZES = (1, 2, 4, 8)
_GIB = 1 << 30
KIND_MEANINGS = (
    "as they are",
    "without their all-zero groups",
    "re-encoded at other scales",
    "in the wide format",
    f"span more than {layout.WIDE_MAX_DELTA} octaves",
)
"""Of every `row_scales.RowKind`."""
NUM_KINDS = len(KIND_MEANINGS)


@dataclass(frozen=True)
class ScaleStatistics:
    """Over all rows of all expert matrices. A row's span is its largest minus its smallest scale byte."""

    rows_by_span: tuple[int, ...]  # index: span, 0..254
    smallest: int
    largest: int
    rows_by_kind: tuple[int, ...]  # index: `row_scales.RowKind`
    num_wide_layers: int  # that need the wide format
    num_inexact_layers: int  # that have a row that no format holds

    @property
    def num_rows(self) -> int:
        return sum(self.rows_by_span)

    @property
    def num_inexact_rows(self) -> int:
        """Rows that no packed format holds exactly."""
        return self.rows_by_kind[-1]

    @property
    def worst_span(self) -> int:
        return max(span for span, rows in enumerate(self.rows_by_span) if rows)


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect_checkpoint`."""

    folder: Path
    facts: ModelFacts
    tensors: Mapping[str, TensorInfo]  # by original name
    expert_layers: tuple[str, ...]
    expert_types: tuple[str, str]  # of weights and scales, safetensors names
    scales: ScaleStatistics | None  # None: not read

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def expert_bytes(self) -> int:
        """Bytes of all routed experts as stored."""
        return sum(info.num_bytes for name, info in self.tensors.items() if EXPERT_TENSOR.match(name))

    def rank_bytes(self, ep_size: int) -> RankBytes | None:
        """Bytes on one of `ep_size` ranks that hold whole experts, the draft's included. None: experts do not divide evenly."""
        draft = self.facts.draft if any(layer.startswith("mtp.") for layer in self.expert_layers) else None
        if self.facts.num_experts % ep_size or (draft and draft.num_experts % ep_size):
            return None
        ranks = RankLayout(
            tp_size=ep_size, ep_size=ep_size, has_draft=draft is not None, engram_on_host=engram_on_host(os.environ)
        )
        return weights_per_rank(self.facts, self.tensors, ranks)

    def kernel_problems(self, kernel: str) -> list[str]:
        """Why `kernel` cannot serve this checkpoint; empty: it can (on the machine it needs)."""
        shard = ExpertShard.of(self.facts, max_tokens_per_rank=1)
        problems = layer_refusals(REGISTRY[kernel], shard, self.facts.expert_dtype)
        return [sentence.rstrip(".") for sentence in problems]


def inspect_checkpoint(path: str | Path, *, read_scales: bool = True, progress: bool = False) -> Inspection:
    """Read config.json, headers and (with `read_scales`) every FP4 scale. Raises Refusal as `validate_checkpoint` does."""
    folder = Path(path)
    facts, tensors = read_checkpoint(folder)
    layers = check_tensors(facts, tensors)
    experts = [(name, info) for layer in layers.values() for name, info in layer.items()]
    scales = [info for name, info in experts if name.endswith(".scale")]
    weights = [info for name, info in experts if name.endswith(".weight")]
    weight_types, scale_types = ("/".join(sorted({info.dtype for info in infos})) for infos in (weights, scales))
    fp4 = read_scales and facts.expert_dtype == "fp4"
    statistics = _statistics(list(layers.values()), progress) if fp4 else None
    return Inspection(folder, facts, tensors, tuple(layers), (weight_types, scale_types), statistics)


def _statistics(layers: list[dict[str, TensorInfo]], progress: bool) -> ScaleStatistics:
    """Of the expert tensors of every layer, by canonical name."""
    rows_by_span, rows_by_kind = np.zeros(255, np.int64), np.zeros(NUM_KINDS, np.int64)
    smallest, largest, num_wide, num_inexact = 254, 0, 0, 0
    num_scales = sum(len(layer) for layer in layers) // 2
    with tqdm(total=num_scales, desc="scales", unit="tensor", disable=not progress) as bar:
        for layer in layers:
            kinds = np.zeros(NUM_KINDS, np.int64)
            for name in (name for name in layer if name.endswith(".scale")):
                data = check_scale(layer[name])
                low, high = data.min(1), data.max(1)
                rows_by_span += np.bincount(high - low, minlength=255)
                smallest, largest = min(smallest, int(low.min())), max(largest, int(high.max()))
                kinds += _kinds(layer[name.removesuffix("scale") + "weight"], data)
                bar.update()
            rows_by_kind += kinds
            num_inexact += int(kinds[-1] > 0)
            num_wide += int(kinds[-2] > 0)
    return ScaleStatistics(tuple(rows_by_span.tolist()), smallest, largest, tuple(rows_by_kind.tolist()), num_wide, num_inexact)


def _kinds(weight: TensorInfo, scale: np.ndarray) -> np.ndarray:
    """Number of rows of each `RowKind` in one matrix. Weights are read only if a row's scales span too many octaves."""
    others = scale.max(1) - scale.min(1) > layout.MAX_DELTA
    if not others.any():
        return np.array([scale.shape[0]] + [0] * (NUM_KINDS - 1))
    import torch

    from hopper_moe.quantization.row_scales import row_kinds

    codes = weight.read_bytes().reshape(scale.shape[0], -1)[others]
    kinds = row_kinds(torch.from_numpy(codes), torch.from_numpy(scale[others])).numpy()
    counts = np.bincount(kinds, minlength=NUM_KINDS)
    counts[0] += scale.shape[0] - int(others.sum())
    return counts


def _number(gib: float) -> str:
    """Two decimals, or two significant digits for what is smaller than that."""
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.2g}"


def report_lines(found: Inspection) -> list[str]:
    """The inspection as lines of text."""
    facts = found.facts
    weight_type, scale_type = found.expert_types
    by_size = [(size, found.rank_bytes(size)) for size in EP_SIZES]
    gib = ", ".join(
        f"EP {size}: {_number(of_rank.device / _GIB)}" if of_rank is not None else f"EP {size}: experts do not divide"
        for size, of_rank in by_size
    )
    lines = [
        f"checkpoint         {found.folder}",
        f"architecture       {facts.architecture}",
        f"experts            {facts.expert_dtype}: weights {weight_type}, scales {scale_type}",
        f"shape              hidden_size {facts.hidden_size}, intermediate_size {facts.intermediate_size}, "
        f"{facts.num_experts} experts, top_k {facts.top_k}, {facts.num_moe_layers} expert layers",
    ]
    if facts.draft:
        held = "" if any(layer.startswith("mtp.") for layer in found.expert_layers) else " (not in this folder)"
        sizes = f"{facts.draft.num_layers} layers, {facts.draft.num_experts} experts, top_k {facts.draft.top_k}"
        lines.append(f"draft              {sizes}{held}")
    if facts.engram:
        where = "host memory" if engram_on_host(os.environ) else "device memory, divided over the ranks"
        lines.append(f"engram             {_number(facts.engram.table_bytes() / _GIB)} GiB of hash tables in {where}")
    lines += [
        f"gating             swiglu_limit {facts.swiglu_limit}, routed_scaling_factor {facts.routed_scaling_factor}",
        f"weights            {len(found.tensors)} tensors, {_number(found.num_bytes / _GIB)} GiB, of which experts "
        f"{_number(found.expert_bytes / _GIB)} GiB",
        f"GiB per rank       {gib} (as loaded: packed experts, draft, hash tables, everything else; --tp-size = --ep-size)",
    ]
    if found.scales:
        spans = found.scales
        counts = ", ".join(f"{span}: {rows}" for span, rows in enumerate(spans.rows_by_span) if rows)
        lines += [
            f"scales             2**{spans.smallest - layout.UE8M0_BIAS} .. 2**{spans.largest - layout.UE8M0_BIAS}",
            f"rows by span       {counts} (powers of two between a row's smallest and largest scale)",
            f"exact              {spans.num_rows - spans.num_inexact_rows} of {spans.num_rows} rows fit a packed format: "
            + ", ".join(f"{rows} {meaning}" for rows, meaning in zip(spans.rows_by_kind, KIND_MEANINGS[:-1], strict=False)),
        ]
        if spans.num_wide_layers:
            lines.append(f"wide format        {spans.num_wide_layers} of {len(found.expert_layers)} layers need it")
        if spans.num_inexact_rows:
            lines.append(
                f"inexact            {spans.num_inexact_rows} rows in {spans.num_inexact_layers} of {len(found.expert_layers)} "
                f"layers {KIND_MEANINGS[-1]}: HOPPER_MOE_INEXACT_ROWS refuses these layers, runs them on the slow exact "
                "reference or rounds the rows' smallest weights"
            )
    for kernel in REGISTRY:
        problems = found.kernel_problems(kernel)
        lines.append(f"kernel {kernel:<12}{'can serve it' if not problems else 'cannot serve it: ' + '; '.join(problems)}")
    return lines
