"""JSON types that transformers, which reads config.json for SGLang, demands of keys that nothing here uses. No torch.

`tests/stock_sglang` compares the tables with transformers' own configuration classes.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from hopper_moe.quantization.errors import Refusal

_WORDS = {int: "a whole number", float: "a number with a decimal point", bool: "true or false", str: "a text", list: "a list"}
_WORDS[type(None)] = "null"
_NULL = type(None)


def _typed(names: str, *types: type) -> dict[str, tuple[type, ...]]:
    return dict.fromkeys(names.split(), types)


V3_TYPES: Mapping[str, tuple[type, ...]] = {
    **_typed("chunk_size_feed_forward vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers", int),
    **_typed("num_attention_heads n_shared_experts n_routed_experts kv_lora_rank qk_rope_head_dim qk_nope_head_dim", int),
    **_typed("max_position_embeddings num_mtp_layers", int),
    **_typed("num_key_value_heads q_lora_rank v_head_dim n_group topk_group num_experts_per_tok", int, _NULL),
    **_typed("first_k_dense_replace pad_token_id bos_token_id pretraining_tp", int, _NULL),
    **_typed("routed_scaling_factor initializer_range rms_norm_eps", float),
    **_typed("output_router_logits use_cache tie_word_embeddings attention_bias is_encoder_decoder", bool),
    **_typed("norm_topk_prob rope_interleave output_hidden_states return_dict", bool, _NULL),
    **_typed("hidden_act", str),
    **_typed("transformers_version", str, _NULL),
    **_typed("eos_token_id", int, list, _NULL),
    **_typed("attention_dropout", float, int, _NULL),
}
"""DeepSeek-V3's class, from which V4.1's derives."""

_V4_ONLY: Mapping[str, tuple[type, ...]] = {
    **_typed("num_key_value_heads head_dim q_lora_rank num_experts_per_tok hc_mult hc_sinkhorn_iters sliding_window", int),
    **_typed("o_groups o_lora_rank index_n_heads index_head_dim index_topk num_nextn_predict_layers", int),
    **_typed("swiglu_limit hc_eps router_aux_loss_coef router_jitter_noise attention_dropout", float),
    **_typed("rope_theta compress_rope_theta", float, int),
    **_typed("norm_topk_prob mlp_bias", bool),
    **_typed("scoring_func", str),
    **_typed("partial_rotary_factor", float, _NULL),
    **_typed("layer_types mlp_layer_types", list, _NULL),
}
V4_TYPES: Mapping[str, tuple[type, ...]] = {**V3_TYPES, **_V4_ONLY}
"""DeepSeek-V4's class. SGLang reads the file with it first and then with one that derives from V3's."""

_TYPES = {"deepseek_v4": V4_TYPES, "deepseek_v3": V3_TYPES, "deepseek_v41": V3_TYPES, "deepseek_v41_text": V3_TYPES}
_FLOAT_TYPES = ("bfloat16", "float16", "half", "float32", "float")


def check_types(where: str, config: Mapping[str, Any]) -> None:
    """Raises Refusal for the first value whose type stops SGLang's reader of the file."""
    model_type = config.get("model_type")
    for key, types in _TYPES.get(model_type if isinstance(model_type, str) else "", {}).items():
        if key in config and type(config[key]) not in types:
            shown = "null" if config[key] is None else reprlib.repr(config[key])
            raise Refusal(
                f"{where} has {key}={shown}, which stops SGLang's reader of the file: only "
                f"{' or '.join(_WORDS[kind] for kind in types)} makes sense there, so fetch the file again."
            )
    for key in ("dtype", "torch_dtype"):
        if config.get(key) is not None and config[key] not in _FLOAT_TYPES:
            raise Refusal(
                f"{where} has {key}={reprlib.repr(config[key])}, but only {', '.join(_FLOAT_TYPES)} makes sense there: fetch the "
                "file again."
            )
