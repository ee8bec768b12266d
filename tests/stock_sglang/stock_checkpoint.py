"""Would stock SGLang serve this folder? Answered by its own config reader, file filter, type probe, name table and safetensors,
and by the ledger through which our workers load; every parameter must be loaded and every tensor must belong to one."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hopper_moe.quantization.sglang_checks import CheckpointShape, _scale_bytes, _weight_bytes

SIZES = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "num_hidden_layers", "vocab_size")


def problem(folder: Path) -> str | None:
    """Why SGLang would not serve the folder with FP4 experts; None: it would."""
    try:
        _refuse_endless(folder)
        config = _config(folder)
        shapes, experts = _parameters(config)
        for name, tensor in _tensors(folder):
            _load(name, tensor, config, shapes, experts)
        missing = [*shapes, *experts]
        return f"not loaded: {missing[0]}" if missing else None
    except Exception as error:  # whatever SGLang, transformers or safetensors raise: the server would not start
        return f"{type(error).__name__}: {error}"


def _refuse_endless(folder: Path) -> None:
    """transformers makes a list of num_hidden_layers names before anything looks at the number."""
    with contextlib.suppress(ValueError, AttributeError, OSError, RecursionError):
        config = json.loads((folder / "config.json").read_text())
        for keys in (config, config.get("text_config") or {}):
            layers = keys.get("num_hidden_layers")
            assert type(layers) is not int or layers < 1 << 20, f"a list of {layers} layers"


def _config(folder: Path) -> Any:
    from sglang.srt.configs.deepseek_v4 import try_detect_fp4_experts
    from sglang.srt.configs.model_config import is_deepseek_v4
    from sglang.srt.utils.hf_transformers import get_config

    config = get_config(str(folder), trust_remote_code=False)
    assert is_deepseek_v4(config), config.architectures
    for key in SIZES:
        value = getattr(config, key)
        assert type(value) is int and 0 < value < 1 << 20, (key, value)
    assert config.num_experts_per_tok <= config.n_routed_experts
    limit = getattr(config, "swiglu_limit", None)
    assert limit is None or (type(limit) in (int, float) and 0 < limit < float("inf")), limit
    assert config.routed_scaling_factor > 0
    assert config.quantization_config["quant_method"] == "fp8"
    assert try_detect_fp4_experts(str(folder)) in (True, None)
    return config


def _parameters(config: Any) -> tuple[dict[str, tuple[int, ...]], dict[tuple[str, int, str, bool], None]]:
    """Shapes of the plain parameters, and (experts module, expert, shard, is scale) of every expert tensor to be loaded."""
    hidden, vocabulary, num_experts = config.hidden_size, config.vocab_size, config.n_routed_experts
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    experts: dict[tuple[str, int, str, bool], None] = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.mlp.gate.weight"] = (num_experts, hidden)
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.self_attn.wo_b.weight"] = (hidden, 160)
        shapes[f"{prefix}.self_attn.wo_b.weight_scale_inv"] = (-(-hidden // 128), 2)
        for expert in range(num_experts):
            for shard in ("w1", "w2", "w3"):
                experts |= dict.fromkeys((f"{prefix}.mlp.experts", expert, shard, is_scale) for is_scale in (False, True))
    return shapes, experts


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    from sglang.srt.model_loader.weight_utils import filter_duplicate_safetensors_files

    files = [str(path) for path in folder.glob("*.safetensors")]
    files = filter_duplicate_safetensors_files(files, str(folder), "model.safetensors.index.json")
    assert files, "no weights"
    for file in sorted(files):
        with safe_open(file, "pt") as reader:
            for name in reader.keys():
                yield name, reader.get_tensor(name)


@cache
def _mapping(num_experts: int) -> list[tuple[str, str, int, str]]:
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    return FusedMoE.make_expert_params_mapping("gate_proj", "down_proj", "up_proj", num_experts=num_experts)


def _load(name: str, tensor: Any, config: Any, shapes: dict, experts: dict) -> None:
    from sglang.srt.models.deepseek_v4 import DeepseekV4ForCausalLM

    name = DeepseekV4ForCausalLM.remap_weight_name_to_dpsk_hf_format(name)
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= config.num_hidden_layers and getattr(config, "num_nextn_predict_layers", 0):
        return  # SGLang leaves it to the draft
    if ".mlp.experts." not in name:
        assert tuple(tensor.shape) == shapes.pop(name), name
        assert tensor.dtype not in (torch.uint8, torch.int8), f"{name} would be copied as numbers"
        return
    parameter, weight_name, expert, shard = next(entry for entry in _mapping(config.n_routed_experts) if entry[1] in name)
    resolved = name.replace(weight_name, parameter)
    module = re.fullmatch(r"(model\.layers\.\d+\.mlp\.experts)\.w(?:13|2)_weight(_scale_inv)?", resolved)
    assert module, f"{name} is not found in the parameters"
    is_scale = module[2] is not None
    del experts[module[1], expert, shard, is_scale]
    wanted = CheckpointShape(config.hidden_size, config.moe_intermediate_size, True).of(shard, is_scale)
    assert tuple(tensor.shape) == wanted, name
    (_scale_bytes if is_scale else _weight_bytes)(name, tensor)
