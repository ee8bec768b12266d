"""Write a reduced DeepSeek-V3 with random weights: FP8 in 128 x 128 blocks, names and layer shapes as released.

\b
    python -m hopper_moe.eval.serving_bench.random_v3 TOKENIZER_DIR OUT_DIR [--experts N] [--seed N]

One dense layer and two with experts (sigmoid scores, groups, a shared expert), no draft. The vocabulary is the tokenizer's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from hopper_moe.eval.serving_bench.random_tensors import RandomTensors, checkpoint_arguments, device, folder_size
from hopper_moe.quantization.checkpoint import write_stored

_SHARE = 0.5  # of the last hidden state's length that is still the token's embedding; guessed


def config_v3(vocab_size: int, experts: int = 32, **changes: Any) -> dict[str, Any]:
    """config.json."""
    config: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
        "vocab_size": vocab_size, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "moe_layer_freq": 1, "num_nextn_predict_layers": 0,
        "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "attention_bias": False, "attention_dropout": 0.0,
        "n_routed_experts": experts, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_cache": True,
        "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 163840, "rope_theta": 10000,
        "rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096},
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                "weight_block_size": [128, 128]},
    }  # fmt: skip
    return config | changes


def tensors_v3(config: dict[str, Any], draw: RandomTensors) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by its released name."""
    hidden, experts = config["hidden_size"], config["n_routed_experts"]
    draw.linked_vocabulary("model.embed_tokens.weight", "lm_head.weight", config["vocab_size"], hidden, _SHARE)
    draw.ones("model.norm.weight", hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        _attention(draw, layer, config)
        if number < config["first_k_dense_replace"]:
            _mlp(draw, f"{layer}.mlp", hidden, config["intermediate_size"])
            continue
        draw.bf16(f"{layer}.mlp.gate.weight", experts, hidden)
        draw.spread(f"{layer}.mlp.gate.e_score_correction_bias", experts, std=0.02)
        for part in ("shared_experts", *(f"experts.{expert}" for expert in range(experts))):
            _mlp(draw, f"{layer}.mlp.{part}", hidden, config["moe_intermediate_size"])
    return draw.found


def _attention(draw: RandomTensors, layer: str, config: dict[str, Any]) -> None:
    hidden, heads, q_rank, kv_rank = (
        config[key] for key in ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank")
    )
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    linears = {
        "q_a_proj": (q_rank, hidden), "q_b_proj": (heads * (nope + rope), q_rank), "kv_a_proj_with_mqa": (kv_rank + rope, hidden),
        "kv_b_proj": (heads * (nope + value), kv_rank), "o_proj": (hidden, heads * value),
    }  # fmt: skip
    for name, (rows, k) in linears.items():
        draw.fp8_fp32(f"{layer}.self_attn.{name}", rows, k)
    norms = {
        "self_attn.q_a_layernorm": q_rank, "self_attn.kv_a_layernorm": kv_rank, "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
    }  # fmt: skip
    for name, features in norms.items():
        draw.ones(f"{layer}.{name}.weight", features)


def _mlp(draw: RandomTensors, prefix: str, hidden: int, intermediate: int) -> None:
    for name, rows, k in (
        ("gate_proj", intermediate, hidden),
        ("up_proj", intermediate, hidden),
        ("down_proj", hidden, intermediate),
    ):
        draw.fp8_fp32(f"{prefix}.{name}", rows, k)


def vocabulary_of(tokenizer_dir: Path) -> int:
    """One more than the largest id of tokenizer.json."""
    tokenizer = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    added = [token["id"] for token in tokenizer["added_tokens"]]
    return max(*tokenizer["model"]["vocab"].values(), *added) + 1


@click.command(help=__doc__)
@checkpoint_arguments(32, "A multiple of 8, at least 16: eight groups.")
def main(tokenizer_dir: Path, out_dir: Path, experts: int, seed: int) -> None:
    config = config_v3(vocabulary_of(tokenizer_dir), experts)
    tensors = tensors_v3(config, RandomTensors(seed, device()))
    write_stored(out_dir, tensors, config, tokenizer_dir=tokenizer_dir)
    click.echo(f"{folder_size(tensors)} in {out_dir}, seed {seed}")


if __name__ == "__main__":
    main()
