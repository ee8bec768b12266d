"""Write a reduced DeepSeek-V4.1-Flash with random weights: nested config, names, types and layer shapes as released.

\b
    python -m hopper_moe.eval.serving_bench.random_v41 TOKENIZER_DIR OUT_DIR [--experts N] [--seed N]

Seven layers stand for the forty: without compression, with an Engram table (a small one), with pooled and unpooled compressed
KV, owned and shared, with an index of candidates; a DSpark draft of three stages with experts of its own; one vision layer. The
vocabulary is the tokenizer's, because Engram hashes its tokens. Needs SGLang, whose hash layout must be met.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch

from hopper_moe.eval.serving_bench.random_tensors import RandomTensors, checkpoint_arguments, device, folder_size, free_token
from hopper_moe.quantization.checkpoint import write_stored

STAGES = 3
_LAYERS = 7
_SHARE = 0.35  # of the last hidden state's length that is still the token's embedding; guessed
_HC = 4
# What SGLang's renderer of V4.1's conversations looks up in a tokenizer (deepseek_recipe), beside those that V4's has.
_CHAT_TOKENS = (
    "<｜System｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜latest_reminder｜>",
    "<｜deepseek_image｜>", "<｜image｜>", "<｜ref｜>", "<｜/ref｜>", "<｜box｜>", "<｜/box｜>", "<｜point｜>", "<｜/point｜>",
    "<｜polygon｜>", "<｜/polygon｜>", "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>",
    "<｜read_url｜>", "<think>", "</think>", "｜DSML｜",
)  # fmt: skip


def nested_config(vocab_size: int, compressed_vocab_size: int, experts: int = 48, **text_changes: Any) -> dict[str, Any]:
    """config.json; `text_changes` replace keys of `text_config`. Engram's row counts follow from its other keys."""
    text: dict[str, Any] = {
        "model_type": "deepseek_v41_text", "vocab_size": vocab_size, "hidden_size": 5120, "moe_intermediate_size": 2304,
        "num_hidden_layers": _LAYERS, "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512,
        "qk_rope_head_dim": 64, "q_lora_rank": 1280, "o_lora_rank": 1024, "o_groups": 8, "hidden_act": "silu",
        "swiglu_limit": 10.0, "rms_norm_eps": 1e-20, "attention_bias": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True, "max_position_embeddings": 65536,
        "rope_theta": 10000, "rope_scaling": {"rope_type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                                              "original_max_position_embeddings": 4096},
        "n_routed_experts": experts, "n_shared_experts": 1, "num_experts_per_tok": 6, "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 1.5, "sliding_window": 128,
        "compress_ratios": [0, 0, 2, 2, 1, 1, 1] + [0] * STAGES, "compress_rope_theta": 160000, "kv_source_layer_ids": [2, 4],
        "index_source_layer_ids": [2, 4, 6], "index_n_heads": 32, "index_head_dim": 128, "index_topk": 512,
        "candidate_source_layer_id": 4, "candidate_topk_blocks": 2048, "candidate_block_size": 8, "hc_mult": _HC,
        "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "engram_layer_ids": [1], "engram_max_ngram_size": 4, "engram_vocab_size": 7812,
        "engram_n_heads": 8, "engram_head_dim": 256, "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": compressed_vocab_size, "num_nextn_predict_layers": STAGES, "dspark_block_size": 5,
        "dspark_noise_token_id": free_token(vocab_size), "dspark_target_layer_ids": [4, 5, 6], "dspark_markov_rank": 256,
        "dspark_n_routed_experts": max(4, experts // 3), "dspark_num_experts_per_tok": 3,
    }  # fmt: skip
    text |= text_changes
    text["engram_num_embeddings"] = [sum(_table_sizes(text))]
    vision = {
        "model_type": "deepseek_v41_vision", "num_hidden_layers": 1, "hidden_size": 1024, "num_attention_heads": 16,
        "intermediate_size": 2816, "patch_size": 14, "rope_theta": 10000, "downsample_ratio": 3, "max_image_tokens": 1024,
        "min_pixels": 295936, "max_wh_ratio": None,
    }  # fmt: skip
    quantization = {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], "scale_fmt": "ue8m0",
        "expert_dtype": "fp4",
    }  # fmt: skip
    return {
        "architectures": ["DeepseekV41ForCausalLM"], "model_type": "deepseek_v41", "dtype": "bfloat16", "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": 2, "image_token_id": vocab_size - 16, "quantization_config": quantization,
        "text_config": text, "vision_config": vision,
    }  # fmt: skip


def _table_sizes(text: dict[str, Any]) -> list[int]:
    """Rows of the hash tables of one Engram layer, by SGLang's own layout."""
    from sglang.srt.layers.engram import EngramLayout

    layout = EngramLayout.from_config(SimpleNamespace(**text, engram_num_embeddings=[0]))
    return [rows for ngram in layout.primes[0] for rows in ngram]


def vocabulary_of(tokenizer_dir: Path) -> tuple[int, int]:
    """(tokens, distinct tokens after Engram's normalisation), by SGLang's own rule."""
    from sglang.srt.layers.engram import build_compressed_token_map
    from sglang.srt.utils.hf_transformers.tokenizer import get_tokenizer

    tokenizer = get_tokenizer(str(tokenizer_dir), tokenizer_backend="huggingface")
    return len(tokenizer), build_compressed_token_map(tokenizer)[1]


def with_chat_tokens(tokenizer_dir: Path, folder: Path) -> Path:
    """A copy of the tokenizer in `folder` that holds what SGLang's encoding of V4.1's conversations needs, the vocabulary padded
    to a multiple of 64."""
    shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    added = {token["content"] for token in tokenizer["added_tokens"]}
    size = max([*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]) + 1
    new = [token for token in _CHAT_TOKENS if token not in added]
    new += [f"<｜reserved {number}｜>" for number in range(-(size + len(new)) % 64)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": size + n, "content": token, **flags} for n, token in enumerate(new)]
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))
    return folder


def tensors_v41(config: dict[str, Any], draw: RandomTensors) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint by its released name."""
    text, vision = config["text_config"], config["vision_config"]
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    successor = draw.linked_vocabulary("embed.weight", "head.weight", vocab, hidden, _SHARE)
    draw.ones("norm.weight", hidden)
    for layer in range(text["num_hidden_layers"]):
        _block(draw, f"layers.{layer}", text, text["n_routed_experts"])
        draw.spread(f"layers.{layer}.ffn.gate.bias_vl", text["n_routed_experts"], std=0.3)  # images go to other experts
        _compressed_kv(draw, f"layers.{layer}.attn", layer, text)
        if layer in text["engram_layer_ids"]:
            _engram(draw, f"layers.{layer}.engram", text)
    for stage in range(text["num_nextn_predict_layers"]):
        _block(draw, f"mtp.{stage}", text, text["dspark_n_routed_experts"])
    _draft_ends(draw, text, successor)
    _vision(draw, vision, hidden)
    return draw.found


def _block(draw: RandomTensors, layer: str, text: dict[str, Any], num_experts: int) -> None:
    """Attention, experts, norms and hyper-connections, which target layers and draft stages share."""
    hidden, heads, rank = text["hidden_size"], text["num_attention_heads"] * text["head_dim"], text["q_lora_rank"]
    groups, out_rank, size = text["o_groups"], text["o_lora_rank"], text["moe_intermediate_size"]
    linears = {
        "wq_a": (rank, hidden), "wkv": (text["head_dim"], hidden), "wq_b": (heads, rank),
        "wo_a": (groups * out_rank, heads // groups), "wo_b": (hidden, groups * out_rank),
    }  # fmt: skip
    for name, (rows, k) in linears.items():
        draw.fp8_ue8m0(f"{layer}.attn.{name}", rows, k)
    draw.spread(f"{layer}.attn.attn_sink", text["num_attention_heads"], std=0.02)
    norms = {"attn.q_norm": rank, "attn.kv_norm": text["head_dim"], "attn_norm": hidden, "ffn_norm": hidden}
    for name, features in norms.items():
        draw.ones(f"{layer}.{name}.weight", features)
    mixes = _HC * (2 + _HC)
    for part in ("attn", "ffn"):
        draw.spread(f"{layer}.hc_{part}_fn", mixes, _HC * hidden, std=(_HC * hidden) ** -0.5)
        draw.spread(f"{layer}.hc_{part}_base", mixes, std=0.02)
        draw.keep(f"{layer}.hc_{part}_scale", torch.ones(3), torch.float32)
    draw.bf16(f"{layer}.ffn.gate.weight", num_experts, hidden)
    draw.spread(f"{layer}.ffn.gate.bias", num_experts, std=0.02)
    for word, rows, k in (("w1", size, hidden), ("w3", size, hidden), ("w2", hidden, size)):
        draw.fp8_ue8m0(f"{layer}.ffn.shared_experts.{word}", rows, k)
        for expert in range(num_experts):
            draw.fp4(f"{layer}.ffn.experts.{expert}.{word}", rows, k)


def _compressed_kv(draw: RandomTensors, attn: str, layer: int, text: dict[str, Any]) -> None:
    """What only owners of compressed KV and of an index have."""
    hidden, head_dim, index_dim = text["hidden_size"], text["head_dim"], text["index_head_dim"]
    owner = layer in text["kv_source_layer_ids"]
    if owner:
        draw.bf16(f"{attn}.compressor.wkv.weight", head_dim, hidden)
        if text["compress_ratios"][layer] > 1:
            draw.bf16(f"{attn}.compressor.wgate.weight", head_dim, hidden)
        draw.ones(f"{attn}.compressor.norm.weight", head_dim)
    if layer in text["index_source_layer_ids"]:
        draw.fp8_ue8m0(f"{attn}.indexer.wq_b", text["index_n_heads"] * index_dim, text["q_lora_rank"])
        draw.bf16(f"{attn}.indexer.weights_proj.weight", text["index_n_heads"], hidden)
        if owner:
            draw.bf16(f"{attn}.indexer.wk.weight", index_dim, head_dim)
            draw.ones(f"{attn}.indexer.k_norm.weight", index_dim)


def _engram(draw: RandomTensors, engram: str, text: dict[str, Any]) -> None:
    hidden, columns = text["hidden_size"], (text["engram_max_ngram_size"] - 1) * text["engram_n_heads"]
    draw.fp8_ue8m0(f"{engram}.embed", text["engram_num_embeddings"][0], text["engram_head_dim"], block=(1, 32), rms=1.0)
    draw.fp8_ue8m0(f"{engram}.wkv", hidden * (_HC + 1), columns * text["engram_head_dim"])
    for name in ("q_weight", "k_weight"):
        draw.ones(f"{engram}.{name}", _HC, hidden)


def _draft_ends(draw: RandomTensors, text: dict[str, Any], successor: torch.Tensor) -> None:
    """The draft's first projection, and the heads of its last stage: the Markov head knows three successors in four."""
    hidden, vocab, rank = text["hidden_size"], text["vocab_size"], text["dspark_markov_rank"]
    last = f"mtp.{text['num_nextn_predict_layers'] - 1}"
    draw.fp8_ue8m0("mtp.0.main_proj", hidden, hidden * len(text["dspark_target_layer_ids"]))
    draw.ones("mtp.0.main_norm.weight", hidden)
    draw.ones(f"{last}.norm.weight", hidden)
    before, other = draw.normal(vocab, rank), draw.normal(vocab, rank)
    known = (torch.arange(vocab, device=before.device) % 4 != 0)[:, None]
    after = torch.empty_like(before).index_copy_(0, successor, torch.where(known, before, other))
    draw.keep(f"{last}.markov_head.embed.weight", before)
    draw.keep(f"{last}.markov_head.head.weight", after * rank**-0.5)
    draw.spread(f"{last}.confidence_head.proj.weight", 1, hidden + rank, std=(hidden + rank) ** -0.5)


def _vision(draw: RandomTensors, vision: dict[str, Any], hidden: int) -> None:
    size, inner = vision["hidden_size"], vision["intermediate_size"]

    def linear(name: str, rows: int, k: int) -> None:
        draw.bf16(f"{name}.weight", rows, k)
        draw.spread(f"{name}.bias", rows, std=0.02, dtype=torch.bfloat16)

    linear("vision.patch_embed.proj", size, 3 * vision["patch_size"] ** 2)
    for block in (f"vision.blocks.{number}" for number in range(vision["num_hidden_layers"])):
        for norm in ("norm1", "norm2"):
            draw.ones(f"{block}.{norm}.weight", size)
        linear(f"{block}.attn.wqkv", 3 * size, size)
        linear(f"{block}.attn.wo", size, size)
        draw.bf16(f"{block}.mlp.w1.weight", 2 * inner, size)
        draw.bf16(f"{block}.mlp.w2.weight", size, inner)
    draw.ones("vision.norm.weight", size)
    linear("aligner.w1", hidden, size * vision["downsample_ratio"] ** 2)
    linear("aligner.w2", hidden, hidden)
    for name in ("image_start", "image_end", "image_newline"):
        draw.spread(name, hidden, std=1.0, dtype=torch.bfloat16)


@click.command(help=__doc__)
@checkpoint_arguments(48, "Of the target's layers; the draft has a third of them.")
def main(tokenizer_dir: Path, out_dir: Path, experts: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = with_chat_tokens(tokenizer_dir, Path(folder))
        config = nested_config(*vocabulary_of(tokenizer), experts)
        tensors = tensors_v41(config, RandomTensors(seed, device()))
        write_stored(out_dir, tensors, config, tokenizer_dir=tokenizer)
    click.echo(f"{folder_size(tensors)} in {out_dir}, seed {seed}")


if __name__ == "__main__":
    main()
