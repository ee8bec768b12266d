"""The GiB per rank that preflight and `checkpoint inspect` tell against the parameters that stock SGLang makes of V4.1."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import stock
import torch

from hopper_moe.launch.model_facts import LaunchedModel, read_model
from hopper_moe.quantization.checkpoint_memory import RankLayout, weights_per_rank
from hopper_moe.quantization.checkpoint_names import QUANTIZATION_CONFIG
from hopper_moe.quantization.config_values import flatten
from hopper_moe.quantization.model_facts import facts_of

HIDDEN, LAYERS = 640, 4
TEXT = {
    "model_type": "deepseek_v41_text", "vocab_size": 1280, "hidden_size": HIDDEN, "moe_intermediate_size": 384,
    "num_hidden_layers": LAYERS, "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64,
    "q_lora_rank": 1280, "o_lora_rank": 1024, "o_groups": 8, "hidden_act": "silu", "swiglu_limit": 10.0, "rms_norm_eps": 1e-20,
    "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "tie_word_embeddings": False,
    "max_position_embeddings": 65536, "rope_theta": 10000, "n_routed_experts": 24, "n_shared_experts": 1,
    "num_experts_per_tok": 6, "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096,
    },
    "routed_scaling_factor": 1.5, "sliding_window": 128, "compress_ratios": [0, 0, 2, 1], "compress_rope_theta": 160000,
    "kv_source_layer_ids": [2, 3], "index_source_layer_ids": [2, 3], "index_n_heads": 32, "index_head_dim": 128,
    "index_topk": 512, "candidate_source_layer_id": 3, "candidate_topk_blocks": 2048, "candidate_block_size": 8, "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "engram_layer_ids": [1], "engram_num_embeddings": [189998],
    "engram_max_ngram_size": 4, "engram_vocab_size": 7812, "engram_n_heads": 8, "engram_head_dim": 256,
    "engram_pad_token_id": 2, "engram_compressed_vocab_size": 1000, "num_nextn_predict_layers": 0,
}  # fmt: skip
CONFIG = {
    "architectures": ["DeepseekV41ForCausalLM"], "model_type": "deepseek_v41", "dtype": "bfloat16", "bos_token_id": 0,
    "eos_token_id": 1, "quantization_config": {**QUANTIZATION_CONFIG, "weight_block_size": [32, 32], "expert_dtype": "fp4"},
    "text_config": TEXT,
}  # fmt: skip
# SGLang's parameters under the names of the checkpoint; one that is several tensors there takes the first's name.
WORDS = (
    ("model.", ""), (".self_attn.", ".attn."), (".mlp.", ".ffn."), ("embed_tokens.", "embed."), ("lm_head.", "head."),
    (".wqkv_a.", ".wq_a."), (".gate_up_proj.", ".w1."), (".down_proj.", ".w2."), (".weight_scale_inv", ".scale"),
    ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"), ("e_score_correction_bias", "bias"),
)  # fmt: skip
STORED = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """config.json and, for argument resolution, the header of one expert."""
    folder = tmp_path_factory.mktemp("v41")
    stock.write_model(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def parameters(args: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of this rank's parameters, from stock's own model on no device."""
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.models.deepseek_v4 import DeepseekV4ForCausalLM

    quantization = stock.quant_config(True)
    quantization.weight_block_size = [32, 32]
    with stock._bf16(), torch.device("meta"):
        model = DeepseekV4ForCausalLM(model_config_of(args).hf_config, quant_config=quantization)
    return {name: (tuple(parameter.shape), parameter.dtype) for name, parameter in model.named_parameters()}


def num_bytes(found: dict[str, tuple[tuple[int, ...], torch.dtype]], *, engram: bool) -> int:
    """Of hash tables, or of everything that is neither one of them nor a routed expert."""
    return sum(
        math.prod(shape) * dtype.itemsize
        for name, (shape, dtype) in found.items()
        if ".mlp.experts." not in name and (".engram.embed." in name) == engram
    )


def headers(found: dict[str, tuple[tuple[int, ...], torch.dtype]], folder: Path) -> LaunchedModel:
    """The checkpoint of which a single rank would make these parameters, as far as headers tell it."""
    entries, end = {}, 0
    for name, (shape, dtype) in found.items():
        if ".mlp.experts." in name or name.endswith((".k_scale", ".v_scale")):
            continue
        for old, new in WORDS:
            name = name.replace(old, new)
        kinds = {name: (shape, STORED[dtype])}
        if name.endswith(".scale"):
            kinds = {name: (shape, "F8_E8M0")}
        if ".attn.wo_a." in name:  # published as E4M3, loaded as BF16
            scale = tuple(-(-size // 32) for size in shape)
            kinds = {name: (shape, "F8_E4M3"), name.replace(".weight", ".scale"): (scale, "F8_E8M0")}
        for stored, (size, kind) in kinds.items():
            length = math.prod(size) * {"BF16": 2, "F32": 4}.get(kind, 1)
            entries[stored] = {"dtype": kind, "shape": list(size), "data_offsets": [end, end + length]}
            end += length
    text = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # a hole: nothing reads the weights
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return read_model(str(folder))


def test_bytes_per_rank_are_those_of_sglangs_parameters(folder, no_gpu, tmp_path):
    """Within 2 %: tensors that are divided over the ranks, scales that grow when they are loaded, hash tables."""
    (alone,) = stock.in_ranks(lambda _rank: parameters(stock.resolve(folder)), stock.resolve(folder), 1, tmp_path)
    (tmp_path / "whole").mkdir()
    model = headers(alone, tmp_path / "whole")
    for size in (1, 2):
        args = stock.resolve(folder, "--tp-size", str(size), "--ep-size", str(size))
        ranks = stock.in_ranks(lambda _rank, args=args: parameters(args), args, size, tmp_path)
        told = weights_per_rank(model.facts, model.tensors, RankLayout(tp_size=size, ep_size=size))
        for found in ranks:
            assert told.other == pytest.approx(num_bytes(found, engram=False), rel=0.02), size
            assert told.engram == pytest.approx(num_bytes(found, engram=True), rel=0.02), size


def test_experts_per_rank_are_those_of_the_packed_layer(model):
    """Exactly what a layer holds once it is packed, on a rank of two."""
    stock.publish(stock.resolve(model, "--tp-size", "2", "--ep-size", "2"), 1)
    layer = stock.fused_moe()
    checkpoint = stock.random_checkpoint(1)
    stock.load(layer, checkpoint.tensors)
    layer.quant_method.process_weights_after_loading(layer)
    held = sum(parameter.numel() * parameter.element_size() for parameter in layer.parameters())
    facts = facts_of(flatten(json.loads((model / "config.json").read_text()), model), "config.json")
    told = weights_per_rank(facts, None, RankLayout(tp_size=2, ep_size=2)).experts
    assert told / facts.num_moe_layers == pytest.approx(held, rel=0.02)
