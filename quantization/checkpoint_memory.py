"""Bytes of weights that one rank holds once SGLang has loaded them and the experts are packed. Pure arithmetic, no torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hopper_moe.quantization import layout
from hopper_moe.quantization.checkpoint_files import TensorInfo
from hopper_moe.quantization.checkpoint_names import EXPERT_TENSOR
from hopper_moe.quantization.model_facts import ModelFacts

ENGRAM_ON_HOST = "SGLANG_ENABLE_DSV41_ENGRAM_HOST_TABLE"
_ENGRAM_TABLE = ".engram.embed."
# What SGLang cuts over the ranks of one attention group; other tensors are on every rank whole.
_ATTENTION_PARALLEL = re.compile(r"^(?:embed|head)\.weight$|\.attn\.(?:wq_b|wo_a|wo_b)\.")
_LAYER = re.compile(r"layers\.(\d+)\.")
_SHARED_EXPERT = ".ffn.shared_experts."


@dataclass(frozen=True)
class RankLayout:
    """How a launch spreads the weights, for one pipeline stage; sizes are numbers of ranks."""

    tp_size: int = 1
    ep_size: int = 1
    layers: range | None = None  # of the target in this stage; None: all
    attn_dp_size: int = 1
    exchanges: bool = False  # the kernel moves tokens between ranks: then every rank holds the whole shared expert
    has_draft: bool = False  # speculative decoding runs the checkpoint's draft
    redundant_experts: int = 0  # EPLB's further copies, over all ranks
    expand_fp4: bool = False  # FP4 experts are expanded to FP8 at load
    engram_on_host: bool = False

    @property
    def attn_tp_size(self) -> int:
        return max(self.tp_size // self.attn_dp_size, 1)


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank by kind."""

    experts: int  # of the target, packed
    draft_experts: int
    engram: int  # hash tables in device memory
    other: int | None  # attention, shared experts, embeddings, the draft's own; None: no headers to count them by
    engram_host: int = 0  # hash tables in host memory: of the whole stage

    @property
    def device(self) -> int:
        """All that is in device memory, as far as it is known."""
        return self.experts + self.draft_experts + self.engram + (self.other or 0)


def engram_on_host(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether SGLang will keep the Engram tables in host memory."""
    return environ.get(ENGRAM_ON_HOST, "").strip().lower() in ("1", "true", "yes", "y", "on", "t")


def weights_per_rank(facts: ModelFacts, tensors: Mapping[str, TensorInfo] | None, ranks: RankLayout) -> RankBytes:
    """Bytes of one rank.

    Args:
        facts: the model.
        tensors: headers by original name (`checkpoint_check.by_original_name`); None: only what config.json gives is counted.
        ranks: the launch. Sizes that do not divide are rounded up to the largest rank's share.
    """
    draft = facts.draft if ranks.has_draft else None
    layers = _layers(facts, ranks)
    tables = facts.engram.table_bytes(layers) if facts.engram else 0
    return RankBytes(
        experts=len(set(layers) - set(facts.dense_layers)) * _layer_bytes(facts, facts.num_experts, ranks),
        draft_experts=draft.num_layers * _layer_bytes(facts, draft.num_experts, ranks) if draft else 0,
        engram=0 if ranks.engram_on_host else -(-tables // ranks.tp_size),
        other=None if tensors is None else _other_bytes(facts, tensors, ranks),
        engram_host=tables if ranks.engram_on_host else 0,
    )


def _layers(facts: ModelFacts, ranks: RankLayout) -> range:
    return range(facts.num_layers) if ranks.layers is None else ranks.layers


def _layer_bytes(facts: ModelFacts, num_experts: int, ranks: RankLayout) -> int:
    """Packed experts of one layer on one rank."""
    intermediate_size = -(-facts.intermediate_size // max(ranks.tp_size // ranks.ep_size, 1))
    is_fp8 = facts.expert_dtype == "fp8" or ranks.expand_fp4
    of_one = layout.fp8_expert_bytes if is_fp8 else layout.packed_expert_bytes
    return -(-(num_experts + ranks.redundant_experts) // ranks.ep_size) * of_one(facts.hidden_size, intermediate_size)


def _other_bytes(facts: ModelFacts, tensors: Mapping[str, TensorInfo], ranks: RankLayout) -> int:
    """All tensors that are neither routed experts nor hash tables. The first stage holds the embedding, the last one the head;
    what else is outside of layers is counted for every stage."""
    layers, total = _layers(facts, ranks), 0
    outside = {"embed.weight": 0 in layers, "head.weight": facts.num_layers - 1 in layers}
    for name, info in tensors.items():
        if EXPERT_TENSOR.match(name) or _ENGRAM_TABLE in name or (name.startswith("mtp.") and not ranks.has_draft):
            continue
        layer = _LAYER.match(name)
        if outside.get(name, True) if layer is None else int(layer[1]) in layers:
            total += -(-_loaded_bytes(facts, name, info) // _shares(name, ranks))
    return total


def _shares(name: str, ranks: RankLayout) -> int:
    if _SHARED_EXPERT in name:
        return 1 if ranks.exchanges else ranks.tp_size
    return ranks.attn_tp_size if _ATTENTION_PARALLEL.search(name) else 1


def _loaded_bytes(facts: ModelFacts, name: str, info: TensorInfo) -> int:
    """Size as a parameter: scales of FP8 linears become FP32; `wo_a` becomes BF16 unless its blocks are 128 x 128 (SGLang's FP8
    product takes no others), then its scale goes."""
    stays_fp8 = facts.weight_block_size == (layout.FP8_BLOCK, layout.FP8_BLOCK) and not name.startswith("mtp.")
    if ".attn.wo_a." in name and not stays_fp8:
        return 0 if name.endswith(".scale") else 2 * math.prod(info.shape)
    return 4 * math.prod(info.shape) if name.endswith(".scale") else info.num_bytes
