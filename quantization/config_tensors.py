"""The tensors of a DeepSeek-V4 checkpoint by its config.json, without the routed experts: for memory figures without weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hopper_moe.quantization import layout
from hopper_moe.quantization.checkpoint_files import TensorInfo
from hopper_moe.quantization.checkpoint_names import storage
from hopper_moe.quantization.config_values import ConfigValues

_TYPES = {"fp8": ("F8_E4M3", 1), "fp32": ("F32", 4), "integer": ("I64", 8), "bf16": ("BF16", 2)}
_MAX = 1 << 30
_KEYS = (
    "hidden_size moe_intermediate_size n_routed_experts n_shared_experts num_experts_per_tok num_hidden_layers vocab_size "
    "head_dim num_attention_heads q_lora_rank o_groups o_lora_rank hc_mult index_n_heads index_head_dim"
).split()

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def tensors_of(config: Mapping[str, Any], where: str) -> dict[str, TensorInfo] | None:
    """Headers by original name as released checkpoints have them; None for a model whose tensors are not known here: other than
    DeepSeek-V4 (V4.1 included), or with a DSpark draft. Raises Refusal for sizes that make no sense.

    Args:
        config: a flattened config.json.
        where: name of the file in messages.
    """
    if config.get("model_type") != "deepseek_v4" or config.get("dspark_target_layer_ids"):
        return None
    values = ConfigValues(where, config)
    sizes = {key: values.whole(key, 1, _MAX) for key in _KEYS}
    found: dict[str, TensorInfo] = {}
    for name, shape in _shapes(sizes, values):
        is_fp8 = storage(name) == "fp8" or name.endswith(("e_proj.weight", "h_proj.weight"))
        kind, width = _TYPES["fp8" if is_fp8 else storage(name)]
        found[name] = TensorInfo(name, kind, shape, Path(where), 0, math.prod(shape) * width)
        if is_fp8:
            scale, grid = name.removesuffix("weight") + "scale", tuple(-(-size // layout.FP8_BLOCK) for size in shape)
            found[scale] = TensorInfo(scale, "F8_E8M0", grid, Path(where), 0, math.prod(grid))
    return found


def _shapes(sizes: Mapping[str, int], values: ConfigValues) -> Shapes:
    hidden_size, num_layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    ratios = values.whole_list("compress_ratios", 0, _MAX)
    num_hash = values.whole("num_hash_layers", 0, _MAX, default=0)
    yield from ((name, (sizes["vocab_size"], hidden_size)) for name in ("embed.weight", "head.weight"))
    yield "norm.weight", (hidden_size,)
    yield from _head("", sizes)
    for layer in range(num_layers):
        yield from _layer(f"layers.{layer}.", sizes, ratios[layer] if layer < len(ratios) else 0, layer < num_hash)
    for layer in range(values.whole("num_nextn_predict_layers", 0, _MAX, default=0)):
        yield from _layer(f"mtp.{layer}.", sizes, 0, False)
        yield from ((f"mtp.{layer}.{norm}.weight", (hidden_size,)) for norm in ("enorm", "hnorm", "norm"))
        yield from ((f"mtp.{layer}.{linear}.weight", (hidden_size, hidden_size)) for linear in ("e_proj", "h_proj"))
        yield from _head(f"mtp.{layer}.", sizes)


def _head(prefix: str, sizes: Mapping[str, int]) -> Shapes:
    streams = sizes["hc_mult"]
    yield f"{prefix}hc_head_base", (streams,)
    yield f"{prefix}hc_head_fn", (streams, streams * sizes["hidden_size"])
    yield f"{prefix}hc_head_scale", (1,)


def _layer(prefix: str, sizes: Mapping[str, int], ratio: int, is_hash: bool) -> Shapes:
    hidden_size, num_experts, streams = sizes["hidden_size"], sizes["n_routed_experts"], sizes["hc_mult"]
    for part in ("attn", "ffn"):
        mixes = (2 + streams) * streams
        yield f"{prefix}{part}_norm.weight", (hidden_size,)
        yield f"{prefix}hc_{part}_base", (mixes,)
        yield f"{prefix}hc_{part}_fn", (mixes, streams * hidden_size)
        yield f"{prefix}hc_{part}_scale", (3,)
    yield from _attention(f"{prefix}attn.", sizes, ratio)
    yield f"{prefix}ffn.gate.weight", (num_experts, hidden_size)
    if is_hash:
        yield f"{prefix}ffn.gate.tid2eid", (sizes["vocab_size"], sizes["num_experts_per_tok"])
    else:
        yield f"{prefix}ffn.gate.bias", (num_experts,)
    shared = (sizes["n_shared_experts"] * sizes["moe_intermediate_size"], hidden_size)
    yield from (
        (f"{prefix}ffn.shared_experts.{name}.weight", shared[::-1] if name == "w2" else shared) for name in ("w1", "w2", "w3")
    )


def _attention(prefix: str, sizes: Mapping[str, int], ratio: int) -> Shapes:
    hidden_size, rank, outputs = sizes["hidden_size"], sizes["q_lora_rank"], sizes["num_attention_heads"] * sizes["head_dim"]
    groups, index = sizes["o_groups"], sizes["index_head_dim"]
    yield f"{prefix}attn_sink", (sizes["num_attention_heads"],)
    yield f"{prefix}kv_norm.weight", (sizes["head_dim"],)
    yield f"{prefix}q_norm.weight", (rank,)
    yield f"{prefix}wq_a.weight", (rank, hidden_size)
    yield f"{prefix}wq_b.weight", (outputs, rank)
    yield f"{prefix}wkv.weight", (sizes["head_dim"], hidden_size)
    yield f"{prefix}wo_a.weight", (groups * sizes["o_lora_rank"], outputs // groups)
    yield f"{prefix}wo_b.weight", (hidden_size, groups * sizes["o_lora_rank"])
    if ratio:
        yield from _compressor(f"{prefix}compressor.", ratio, sizes["head_dim"], hidden_size)
    if ratio == _INDEXED_RATIO:
        yield from _compressor(f"{prefix}indexer.compressor.", ratio, index, hidden_size)
        yield f"{prefix}indexer.weights_proj.weight", (sizes["index_n_heads"], hidden_size)
        yield f"{prefix}indexer.wq_b.weight", (sizes["index_n_heads"] * index, rank)


_INDEXED_RATIO = 4  # compressed tokens are selected by an indexer and overlap, which takes twice the columns


def _compressor(prefix: str, ratio: int, dim: int, hidden_size: int) -> Shapes:
    columns = 2 * dim if ratio == _INDEXED_RATIO else dim
    yield f"{prefix}ape", (ratio, columns)
    yield f"{prefix}norm.weight", (dim,)
    yield from ((f"{prefix}{name}.weight", (columns, hidden_size)) for name in ("wgate", "wkv"))
