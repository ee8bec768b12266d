"""Shape of the GPU model: about the smallest DeepSeek-V4 that stock SGLang serves; eval/data/gpu_dsv4/README.md says why."""

from __future__ import annotations

from typing import Any

from hopper_moe.eval.tiny_model.config import CONFIG as TINY_CONFIG

# Attention is FlashMLA's, so 64 heads of 512 (448 + 64 rope) and an indexer of 64 x 128 are not ours to choose; they are nine
# tenths of the file. A quarter of the heads is trained, the others hold zeros and add nothing.
# swiglu_limit is low and routed_scaling_factor high on purpose: leaving either out must change the answers.
CONFIG: dict[str, Any] = TINY_CONFIG | dict(
    hidden_size=128,
    moe_intermediate_size=128,
    n_routed_experts=16,
    num_experts_per_tok=4,
    num_hidden_layers=2,
    num_hash_layers=1,
    compress_ratios=[4, 128],
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=128,
    o_groups=4,
    o_lora_rank=128,
    index_n_heads=64,
    index_head_dim=128,
    max_position_embeddings=4096,
    rope_scaling=dict(type="yarn", factor=1.0, beta_fast=32, beta_slow=1, original_max_position_embeddings=4096),
)

ACTIVE_HEADS_PER_GROUP = 4  # the first of every output group of num_attention_heads / o_groups
MIX = "hard"  # of word_problems.MIXES
