"""Tensor names of DeepSeek-V4 checkpoints: original naming, storage type of each tensor, mapping from transformers' names.

Original naming, one layer: `layers.N.attn.*`, `layers.N.ffn.gate.*`, `layers.N.ffn.shared_experts.w1|w2|w3.*`,
`layers.N.ffn.experts.E.w1|w2|w3.weight` with `.scale` beside it; global: `embed`, `head`, `norm` (.weight), `hc_head_*`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

PROJECTIONS = ("w1", "w2", "w3")  # gate, down, up

# layers.3.ffn.experts.17.w1.weight; `mtp.0` is a layer of the draft. SGLang matches numbers as it writes them: no leading zeros.
_NUMBER = "0|[1-9][0-9]{0,8}"
EXPERT_TENSOR = re.compile(rf"^((?:layers|mtp)\.(?:{_NUMBER}))\.ffn\.experts\.({_NUMBER})\.(w[123])\.(weight|scale)$")
EXPERT_WEIGHT = re.compile(r"\.experts\.\d+\.(?:w[123]|gate_proj|up_proj|down_proj)\.weight$")
"""A routed expert's weight in either naming, by the pattern with which SGLang looks for the experts' type."""

_FP8 = re.compile(r"\.(?:attn\.(?:wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123])\.weight$")
_FP32 = re.compile(r"(?:\bhc_|attn_sink$|\.ape$|gate\.bias$|norm\.weight$)")
_INTEGER = re.compile(r"\.tid2eid$")

_LAYER_TYPE_RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}

# transformers -> original, applied in this order to every name. Longer paths come before those that they contain.
_RENAMES = (
    ("model.", ""),
    ("lm_head.", "head."),
    ("embed_tokens.", "embed."),
    ("hc_head.hc_", "hc_head_"),
    (".self_attn.compressor.indexer.scorer.weights_proj.", ".attn.indexer.weights_proj."),
    (".self_attn.compressor.indexer.q_b_proj.", ".attn.indexer.wq_b."),
    (".self_attn.compressor.indexer.", ".attn.indexer.compressor."),
    (".compressor.kv_norm.", ".compressor.norm."),
    (".compressor.kv_proj.", ".compressor.wkv."),
    (".compressor.gate_proj.", ".compressor.wgate."),
    (".compressor.position_bias", ".compressor.ape"),
    (".self_attn.sinks", ".attn.attn_sink"),
    (".self_attn.", ".attn."),
    (".attn.q_a_proj.", ".attn.wq_a."),
    (".attn.q_b_proj.", ".attn.wq_b."),
    (".attn.q_a_norm.", ".attn.q_norm."),
    (".attn.kv_proj.", ".attn.wkv."),
    (".attn.o_a_proj.", ".attn.wo_a."),
    (".attn.o_b_proj.", ".attn.wo_b."),
    (".mlp.", ".ffn."),
    (".shared_experts.gate_proj.", ".shared_experts.w1."),
    (".shared_experts.up_proj.", ".shared_experts.w3."),
    (".shared_experts.down_proj.", ".shared_experts.w2."),
    (".gate.e_score_correction_bias", ".gate.bias"),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".attn_hc.", ".hc_attn_"),
    (".ffn_hc.", ".hc_ffn_"),
)


# Hugging Face's names of a layer's parts -> original names, as in SGLang's loader.
_LAYER_WORDS = (
    (".self_attn.", ".attn."),
    (".mlp.", ".ffn."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".gate.e_score_correction_bias", ".gate.bias"),
    (".gate_proj.", ".w1."),
    (".down_proj.", ".w2."),
    (".up_proj.", ".w3."),
)
_GLOBAL_NAMES = {"model.embed_tokens.weight": "embed.weight", "lm_head.weight": "head.weight", "model.norm.weight": "norm.weight"}
_LAYER = re.compile(rf"^(?:(?:model\.)?layers|mtp)\.(?:{_NUMBER})\.")


def original_name(name: str, num_layers: int) -> str:
    """The original name of a tensor that is stored under that or a Hugging Face name; other names stay as they are.

    `num_layers` are the target's: in Hugging Face naming the draft's layers follow them, in the original they are `mtp.N`.
    """
    follows = name.startswith("model.")
    if not _LAYER.match(name):
        return _GLOBAL_NAMES.get(name, name)
    name = name.removeprefix("model.")
    for theirs, original in _LAYER_WORDS:
        name = name.replace(theirs, original)
    if name.endswith(".weight_scale_inv"):
        name = name.removesuffix(".weight_scale_inv") + ".scale"
    kind, number, rest = name.split(".", 2)
    if follows and int(number) >= num_layers:
        return f"mtp.{int(number) - num_layers}.{rest}"
    return name


def expert_tensor(layer: str, expert: int, projection: str, part: str) -> str:
    """`layer` is "layers.3" or "mtp.0"; part is "weight" or "scale"."""
    return f"{layer}.ffn.experts.{expert}.{projection}.{part}"


def storage(name: str) -> str:
    """How the original checkpoints store this weight: "mxfp4", "fp8" (both with a `.scale`), "fp32", "integer" or "bf16"."""
    if EXPERT_TENSOR.match(name):
        return "mxfp4"
    for pattern, kind in ((_FP8, "fp8"), (_INTEGER, "integer"), (_FP32, "fp32")):
        if pattern.search(name):
            return kind
    return "bf16"


def to_original_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict of transformers' `DeepseekV4ForCausalLM` under the original names, stacked experts split into views."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in _RENAMES:
            name = name.replace(old, new)
        stacked = re.match(r"(.*\.experts)\.(gate_up_proj|down_proj)$", name)
        if not stacked:
            renamed[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            prefix = f"{stacked[1]}.{expert}"
            if stacked[2] == "down_proj":
                renamed[f"{prefix}.w2.weight"] = matrix
            else:
                renamed[f"{prefix}.w1.weight"], renamed[f"{prefix}.w3.weight"] = matrix.chunk(2)
    return renamed


def original_config(config: PretrainedConfig) -> dict[str, Any]:
    """config.json of the original checkpoints for transformers' `DeepseekV4Config`; both SGLang and transformers read it."""
    compress = config.rope_parameters["compress"]
    same = (
        "bos_token_id eos_token_id pad_token_id hc_eps hc_mult hc_sinkhorn_iters head_dim hidden_size index_head_dim "
        "index_n_heads index_topk max_position_embeddings moe_intermediate_size n_routed_experts n_shared_experts "
        "num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads o_groups o_lora_rank q_lora_rank "
        "qk_rope_head_dim rms_norm_eps compress_rope_theta routed_scaling_factor scoring_func sliding_window swiglu_limit "
        "vocab_size"
    )
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        **{key: getattr(config, key) for key in same.split()},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "compress_ratios": [_LAYER_TYPE_RATIOS[kind] for kind in config.layer_types],
        "expert_dtype": "fp4",
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "norm_topk_prob": True,
        "num_hash_layers": sum(kind == "hash_moe" for kind in config.mlp_layer_types),
        "num_nextn_predict_layers": 0,
        "quantization_config": dict(QUANTIZATION_CONFIG),
        "rope_scaling": {
            "type": "yarn",
            **{key: compress[key] for key in ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings")},
        },
        "rope_theta": config.rope_parameters["main"]["rope_theta"],
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
