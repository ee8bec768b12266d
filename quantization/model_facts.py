"""Sizes and types of a model's routed experts, from config.json and safetensors headers. No torch.

The one reader of config.json: `serve`, `doctor`, `checkpoint inspect`, the CPU host and the plugin's checks all use it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hopper_moe.quantization import layout
from hopper_moe.quantization.checkpoint_files import TensorInfo
from hopper_moe.quantization.checkpoint_names import EXPERT_WEIGHT
from hopper_moe.quantization.config_types import check_types
from hopper_moe.quantization.config_values import ConfigValues
from hopper_moe.quantization.errors import Refusal

V4_ARCHITECTURES = ("DeepseekV4ForCausalLM", "DeepseekV4ForCausalLMNextN", "DeepseekV4ForCausalLMDSpark")
"""SGLang's classes of DeepSeek-V4 and V4.1 and of their drafts."""

SERVED_ARCHITECTURES = (
    *V4_ARCHITECTURES,
    "DeepseekV3ForCausalLM",
    "DeepseekV3ForCausalLMNextN",
    "DeepseekV32ForCausalLM",
    "GlmMoeDsaForCausalLM",
    "GlmMoeDsaForCausalLMNextN",
)
"""Models whose routing, clamp and scaling this backend was checked with; those after V4 have FP8 experts."""

_MAX_SIZE, _MAX_LAYERS, _MAX_EXPERTS, _MAX_VOCABULARY, _MAX_ROWS = 1 << 20, 4096, 1 << 16, 1 << 26, 1 << 40
_STORED = {"I8": "fp4", "U8": "fp4", "F4": "fp4", "F8_E4M3": "fp8", "BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_DECLARED = {"mxfp4": "fp4", "float8_e4m3fn": "fp8"}  # other spellings of expert_dtype


@dataclass(frozen=True)
class DraftFacts:
    """Layers of the multi-token-prediction or DSpark draft (`mtp.N`); hidden and intermediate size are the target's."""

    num_layers: int
    num_experts: int
    top_k: int


@dataclass(frozen=True)
class EngramFacts:
    """Hash tables of DeepSeek-V4.1: E4M3 rows with one UE8M0 scale per 32 values."""

    layers: tuple[int, ...]
    rows: tuple[int, ...]  # of each layer's table
    dim: int  # values a row

    def table_bytes(self, layers: range | None = None) -> int:
        """Bytes of the tables of these layers together, scales included; None: of all."""
        rows = sum(rows for layer, rows in zip(self.layers, self.rows, strict=True) if layers is None or layer in layers)
        return rows * (self.dim + self.dim // layout.MXFP4_GROUP)


@dataclass(frozen=True)
class ModelFacts:
    """Routed experts of a model and other sizes that determine its memory."""

    architecture: str  # as SGLang names it
    quantization: str | None  # quantization_config's quant_method; None: SGLang would build no quantized layer
    expert_dtype: str  # "fp4", "fp8", "nvfp4", another stored type, or "unknown"
    weight_block_size: tuple[int, int] | None  # of FP8 linears and FP8 experts; FP4 experts always have groups of 32
    hidden_size: int
    intermediate_size: int  # of one routed expert
    num_experts: int
    top_k: int
    swiglu_limit: float | None
    num_moe_layers: int  # of the target; the draft has its own
    draft: DraftFacts | None = None
    engram: EngramFacts | None = None
    routed_scaling_factor: float = 1.0
    dense_layers: tuple[int, ...] = ()  # layers of the target without routed experts
    vocab_size: int | None = None  # None: absent from config.json
    model_type: str | None = None  # selects the class with which SGLang reads config.json

    @property
    def num_layers(self) -> int:
        """Layers of the target."""
        return self.num_moe_layers + len(self.dense_layers)

    @property
    def is_v4(self) -> bool:
        """DeepSeek-V4 or V4.1, whose layers all have routed experts and whose drafts are named `mtp.N`."""
        return self.architecture in V4_ARCHITECTURES


def stored_dtype(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Type of the routed-expert weights, of most of them if they differ; None: there are none."""
    dtypes = Counter(info.dtype for name, info in tensors.items() if EXPERT_WEIGHT.search(name))
    return _STORED.get(most := dtypes.most_common(1)[0][0], most) if dtypes else None


def facts_of(config: Mapping[str, Any], where: str, stored: str | None = None) -> ModelFacts:
    """Facts from a flattened config.json (`config_values.flatten`).

    Args:
        config: the keys.
        where: name of the file in messages.
        stored: type of the expert weights by their header, which SGLang prefers to config.json; None: not known.
    """
    values = ConfigValues(where, config)
    architecture = _architecture(values)
    if not config.get("n_routed_experts"):
        raise Refusal(f"{where} has no n_routed_experts, so there are no experts to serve: use `sglang serve` for it.")
    num_layers = values.whole("num_hidden_layers", 1, _MAX_LAYERS)
    dense = _dense_layers(values, num_layers)  # read for every model: SGLang's configuration class refuses what is no number
    is_v4 = architecture in V4_ARCHITECTURES
    num_experts = values.whole("n_routed_experts", 1, _MAX_EXPERTS)
    top_k = values.whole("num_experts_per_tok", 1, _MAX_EXPERTS)
    if top_k > num_experts:
        raise Refusal(f"{where}: num_experts_per_tok {top_k} is above n_routed_experts {num_experts}: mend config.json.")
    quantization = values.nested("quantization_config")
    facts = ModelFacts(
        architecture=architecture,
        quantization=quantization.text("quant_method"),
        expert_dtype=_expert_dtype(values, quantization, architecture, stored),
        weight_block_size=_block_size(quantization),
        hidden_size=values.whole("hidden_size", 1, _MAX_SIZE),
        intermediate_size=values.whole("moe_intermediate_size", 1, _MAX_SIZE),
        num_experts=num_experts,
        top_k=top_k,
        swiglu_limit=values.positive("swiglu_limit"),
        num_moe_layers=num_layers if is_v4 else num_layers - len(dense),
        draft=_draft(values, num_experts, top_k),
        engram=_engram(values, num_layers),
        routed_scaling_factor=values.positive("routed_scaling_factor") or 1.0,
        dense_layers=() if is_v4 else dense,
        vocab_size=values.whole("vocab_size", 0, _MAX_VOCABULARY, default=0) or None,
        model_type=values.text("model_type"),
    )
    check_types(where, config)  # last: what is read above says better what is wrong with it
    return facts


def block_size_refusal(facts: ModelFacts) -> str | None:
    """Why FP8 experts of these blocks are not served; None: they are, or the experts are not FP8."""
    wanted = (layout.FP8_BLOCK, layout.FP8_BLOCK)
    if facts.expert_dtype != "fp8" or facts.weight_block_size in (None, wanted):
        return None
    return (
        f"the experts are FP8 in blocks of {list(facts.weight_block_size)} (quantization_config.weight_block_size), but FP8 "
        f"experts are served in blocks of {list(wanted)} only: use --moe-runner-backend auto."
    )


def _architecture(values: ConfigValues) -> str:
    names = values.values.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str) or not names[0].isprintable():
        raise Refusal(f"{values.where} has no architectures, a list that names the model's class: fetch the file again.")
    return names[0]


def _dense_layers(values: ConfigValues, num_layers: int) -> tuple[int, ...]:
    """Layers without routed experts of the DeepSeek-V3 family; an absent key has the default of its configuration class."""
    first = values.whole("first_k_dense_replace", 0, _MAX_LAYERS, default=3)
    every = values.whole("moe_layer_freq", 1, _MAX_LAYERS, default=1)
    return tuple(layer for layer in range(num_layers) if layer < first or layer % every)


def _draft(values: ConfigValues, num_experts: int, top_k: int) -> DraftFacts | None:
    """Draft sizes as SGLang reads them: one DSpark stage per target layer id; absent or zero numbers are the target's."""
    stages = len(values.whole_list("dspark_target_layer_ids", 0, _MAX_LAYERS))
    predicted = values.whole("num_nextn_predict_layers", 0, _MAX_LAYERS, default=stages)
    num_layers = predicted and (stages or predicted)  # 0: the checkpoint was published without its draft
    own_experts = values.whole("dspark_n_routed_experts", 0, _MAX_EXPERTS, default=0) or num_experts
    own_top_k = values.whole("dspark_num_experts_per_tok", 0, _MAX_EXPERTS, default=0) or top_k
    if num_layers == 0:
        return None
    if own_top_k > own_experts:
        raise Refusal(
            f"{values.where}: dspark_num_experts_per_tok {own_top_k} is above dspark_n_routed_experts {own_experts}: "
            "mend config.json."
        )
    return DraftFacts(num_layers, own_experts, own_top_k)


def _engram(values: ConfigValues, num_layers: int) -> EngramFacts | None:
    layers = values.whole_list("engram_layer_ids", 0, num_layers - 1)
    rows = values.whole_list("engram_num_embeddings", 1, _MAX_ROWS)
    if not layers:
        return None
    if len(rows) != len(layers):
        raise Refusal(
            f"{values.where} has {len(layers)} engram_layer_ids but {len(rows)} engram_num_embeddings: mend config.json."
        )
    return EngramFacts(layers, rows, values.whole("engram_head_dim", 1, _MAX_SIZE))


def _block_size(quantization: ConfigValues) -> tuple[int, int] | None:
    sizes = quantization.whole_list("weight_block_size", 1, _MAX_SIZE)
    if not sizes:
        return None
    if len(sizes) != 2:
        raise Refusal(f"{quantization.where} has weight_block_size={list(sizes)}, but two sizes are needed: mend config.json.")
    return sizes[0], sizes[1]


def _expert_dtype(values: ConfigValues, quantization: ConfigValues, architecture: str, stored: str | None) -> str:
    """Type by the header, else by config.json, else SGLang's default: FP4 for DeepSeek-V4, the linears' type for others."""
    if (quantization.text("quant_algo") or "").upper() == "MIXED_PRECISION" and (
        quantization.text("moe_quant_algo") or ""
    ).upper() == "NVFP4":
        return "nvfp4"
    declared = values.text("expert_dtype") or quantization.text("expert_dtype")
    declared = declared or quantization.text("routed_experts_quant_method")
    declared = declared and _DECLARED.get(declared, declared)
    if stored and declared and declared != stored:
        raise Refusal(f"{values.where} says expert_dtype={declared}, but the expert weights are {stored}: mend config.json.")
    if known := stored or declared:
        return known
    if architecture in V4_ARCHITECTURES:
        return "fp4"
    return "fp8" if quantization.text("quant_method") == "fp8" else "unknown"
