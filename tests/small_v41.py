"""A DeepSeek-V4.1 checkpoint of a few hundred kilobytes with the released nesting and names, and the released model's sizes."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, EXPERTS, LAYERS, STAGES, DRAFT_EXPERTS, VOCABULARY, TABLE_ROWS = 128, 128, 8, 3, 2, 4, 32, 64

_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV41ForCausalLM"], "model_type": "deepseek_v41", "dtype": "bfloat16",
    "quantization_config": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32], "scale_fmt": "ue8m0",
        "expert_dtype": "fp4",
    },
    "text_config": {
        "model_type": "deepseek_v41_text", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS, "n_routed_experts": EXPERTS, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "num_nextn_predict_layers": STAGES,
        "dspark_target_layer_ids": [1, 2], "dspark_n_routed_experts": DRAFT_EXPERTS, "dspark_num_experts_per_tok": 2,
        "engram_layer_ids": [1], "engram_num_embeddings": [TABLE_ROWS], "engram_head_dim": 256,
    },
    "vision_config": {"model_type": "deepseek_v41_vision", "num_hidden_layers": 1, "hidden_size": 64},
}  # fmt: skip

FLASH_V41 = copy.deepcopy(_CONFIG)
FLASH_V41["text_config"] |= {
    "vocab_size": 129280, "hidden_size": 5120, "moe_intermediate_size": 2304, "num_hidden_layers": 40, "n_routed_experts": 384,
    "num_experts_per_tok": 6, "num_nextn_predict_layers": 3, "dspark_target_layer_ids": [37, 38, 39],
    "dspark_n_routed_experts": 128, "dspark_num_experts_per_tok": 3, "engram_layer_ids": [1, 14],
    "engram_num_embeddings": [384006168, 384016682],
}  # fmt: skip


def nested() -> dict[str, Any]:
    """config.json as released: the text model's keys under `text_config`."""
    return copy.deepcopy(_CONFIG)


def flat(architecture: str) -> dict[str, Any]:
    """The same keys at the top."""
    config = nested()
    text = config.pop("text_config")
    text.pop("model_type")
    return {**text, **config, "architectures": [architecture]}


def tensors_v41(seed: int) -> dict[str, torch.Tensor]:
    """Every kind of tensor: FP4 experts of target and draft, 32 x 32 linears, a hash table, `bias_vl`."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def scale(name: str, *shape: int) -> None:
        state[name] = torch.randint(118, 122, shape, generator=generator, dtype=torch.uint8).view(torch.float8_e8m0fnu)

    def fp8(name: str, rows: int, cols: int, block: tuple[int, int] = (32, 32)) -> None:
        state[f"{name}.weight"] = torch.randn(rows, cols, generator=generator).to(torch.float8_e4m3fn)
        scale(f"{name}.scale", -(-rows // block[0]), -(-cols // block[1]))

    state["embed.weight"] = torch.randn(VOCABULARY, HIDDEN, generator=generator).bfloat16()
    state["head.weight"], state["norm.weight"] = state["embed.weight"].clone(), torch.ones(HIDDEN)
    layers = [(f"layers.{number}", EXPERTS) for number in range(LAYERS)]
    for layer, num_experts in layers + [(f"mtp.{number}", DRAFT_EXPERTS) for number in range(STAGES)]:
        state[f"{layer}.ffn.gate.weight"] = torch.randn(num_experts, HIDDEN, generator=generator).bfloat16()
        state[f"{layer}.ffn.gate.bias"] = torch.randn(num_experts, generator=generator)
        if num_experts == EXPERTS:
            state[f"{layer}.ffn.gate.bias_vl"] = torch.randn(num_experts, generator=generator)
        state[f"{layer}.attn_norm.weight"] = torch.ones(HIDDEN)
        fp8(f"{layer}.attn.wq_a", 64, HIDDEN)
        fp8(f"{layer}.attn.wo_a", 64, HIDDEN)
        for word, rows, cols in (("w1", INTERMEDIATE, HIDDEN), ("w3", INTERMEDIATE, HIDDEN), ("w2", HIDDEN, INTERMEDIATE)):
            fp8(f"{layer}.ffn.shared_experts.{word}", rows, cols)
            for expert in range(num_experts):
                name = f"{layer}.ffn.experts.{expert}.{word}"
                packed = torch.randint(0, 256, (rows, cols // 2), generator=generator, dtype=torch.uint8)
                state[f"{name}.weight"] = packed.view(torch.int8)
                scale(f"{name}.scale", rows, cols // 32)
    fp8("layers.1.engram.wkv", 64, 96)
    fp8("layers.1.engram.embed", TABLE_ROWS, 256, (1, 32))
    return state


def write_v41(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(state, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder
