"""Shape of the tiny model: the whole DeepSeek-V4 architecture, smallest sizes the expert kernels accept (H, I % 128)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hopper_moe.eval.tiny_model.tokenizer import VOCAB_SIZE

if TYPE_CHECKING:
    from transformers import DeepseekV4ForCausalLM

# hidden and intermediate sizes are multiples of 128, so the demo runs through the packed layout of the CUDA kernels.
# Eight narrow heads instead of few of 512: an addition has to look up four digits at once. Stock SGLang on a GPU asserts
# head_dim 512, so this model is for the CPU host.
# swiglu_limit is low and routed_scaling_factor high on purpose: leaving either out must change the answers.
CONFIG = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=128,
    moe_intermediate_size=128,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    num_hidden_layers=3,
    num_hash_layers=1,
    compress_ratios=[0, 4, 128],
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=32,
    qk_rope_head_dim=16,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=128,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=512,
    sliding_window=128,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    scoring_func="sqrtsoftplus",
    routed_scaling_factor=2.5,
    swiglu_limit=1.5,
    max_position_embeddings=16384,  # factor * original_max_position_embeddings of the rope scaling below
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_scaling=dict(type="yarn", factor=16, beta_fast=32, beta_slow=1, original_max_position_embeddings=1024),
    num_nextn_predict_layers=0,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)


def build_model(seed: int = 0, **overrides: object) -> DeepseekV4ForCausalLM:
    """A freshly initialised FP32 model. `overrides` replace entries of `CONFIG`."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.manual_seed(seed)
    config = DeepseekV4Config(**{**CONFIG, **overrides})
    model = DeepseekV4ForCausalLM(config)
    for layer in model.model.layers:
        table = getattr(layer.mlp.gate, "tid2eid", None)
        if table is not None:  # transformers leaves the hash routing table at zero: every token would use expert 0 twice
            rows = [torch.randperm(config.n_routed_experts)[: config.num_experts_per_tok] for _ in range(config.vocab_size)]
            table.copy_(torch.stack(rows))
    return model
