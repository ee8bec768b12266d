"""FP8 MoE blocks of DeepSeek-V3 and GLM-5 in stock SGLang against float64: sigmoid scores, groups of experts, no clamp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from stock import EXPERTS, HIDDEN, INTERMEDIATE, ROUNDING, TOP_K

from hopper_moe.eval.serving_bench.random_v3 import config_v3
from hopper_moe.quantization.codecs import dequantize_fp8_blocks

FACTOR = 2.5
SMALL = {
    "hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "intermediate_size": 512, "num_experts_per_tok": TOP_K,
    "n_group": 4, "topk_group": 2, "num_hidden_layers": 2,
}  # fmt: skip
FAMILY = {
    "V3": {},
    "GLM-5": {
        "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "n_group": 1, "topk_group": 1,
        "index_head_dim": 128, "index_n_heads": 32, "index_topk": 2048,
    },
}  # fmt: skip
SIZES = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
LAUNCHES = {"one GPU": (1, ()), "TP 2": (2, ("--tp-size", "2")), "EP 2": (2, ("--tp-size", "2", "--ep-size", "2"))}


@pytest.fixture(autouse=True)
def _reference(reference_in_place_of_fp8_mega):
    """In every test here."""


@pytest.fixture(params=FAMILY)
def config(request) -> dict[str, Any]:
    return config_v3(1280, EXPERTS, **(SMALL | FAMILY[request.param]))


@pytest.fixture
def folder(config, tmp_path) -> Path:
    """As far as argument resolution reads it."""
    made = stock.write_model(tmp_path / "model", "F8_E4M3")
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def tensors(seed) -> dict[str, torch.Tensor]:
    """Routed experts by their released names, E4M3 with one FP32 scale per 128 x 128."""
    rng, found = torch.Generator().manual_seed(seed), {}
    for expert in range(EXPERTS):
        for shard, (rows, columns) in SIZES.items():
            name = f"model.layers.1.mlp.experts.{expert}.{shard}.weight"
            found[name] = torch.randn(rows, columns, generator=rng).to(torch.float8_e4m3fn)
            found[f"{name}_scale_inv"] = (torch.rand(rows // 128, columns // 128, generator=rng) + 0.5) / columns**0.5
    return found


def moe_block(config: dict[str, Any], tensors: dict[str, torch.Tensor], seed: int) -> Any:
    """Stock's block of layer 1. Its shared expert is BF16 (FP8 linears need a GPU) and zero: only routed experts are asked."""
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
    from sglang.srt.models.deepseek_v2 import DeepseekV2MoE
    from transformers import PretrainedConfig

    shared = [f"model.layers.1.mlp.shared_experts.{name}" for name in SIZES]
    with stock._bf16():
        block = DeepseekV2MoE(
            config=PretrainedConfig.from_dict(config),
            layer_id=1,
            quant_config=stock.quant_config(is_fp4=False, ignored_layers=shared),
            prefix="model.layers.1.mlp",
        )
    for parameter in block.shared_experts.parameters():
        parameter.data.zero_()
    rng = torch.Generator().manual_seed(seed + 1)
    block.gate.weight.data = torch.randn(EXPERTS, HIDDEN, generator=rng).to(block.gate.weight.dtype) / 8
    block.gate.e_score_correction_bias.data = torch.randn(EXPERTS, generator=rng) / 16
    mapping = FusedMoE.make_expert_params_mapping("gate_proj", "down_proj", "up_proj", num_experts=EXPERTS)
    params = {f"model.layers.1.mlp.experts.{name}": parameter for name, parameter in block.experts.named_parameters()}
    for name, tensor in tensors.items():
        part, weight, expert, shard = next(entry for entry in mapping if entry[1] in name)
        target = name.replace(weight, part)
        params[target].weight_loader(params[target], tensor, target, shard_id=shard, expert_id=expert)
    block.experts.quant_method.process_weights_after_loading(block.experts)
    return block


def route(config: dict[str, Any], logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V3's routing in float64: the groups with the best two biased scores, in them the best experts."""
    scores = logits.double().sigmoid()
    biased = (scores + bias.double()).unflatten(1, (config["n_group"], -1))
    kept = biased.topk(2, -1).values.sum(-1).topk(config["topk_group"]).indices
    outside = torch.ones(len(logits), config["n_group"], dtype=torch.bool).scatter(1, kept, False)
    ids = biased.masked_fill(outside[..., None], -torch.inf).flatten(1).topk(TOP_K).indices
    weights = scores.gather(1, ids)
    return ids, weights / weights.sum(-1, keepdim=True) * FACTOR


def expected(tensors: dict[str, torch.Tensor], x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The routed experts in float64, nothing rounded and nothing clamped."""

    def matrix(expert: int, shard: str) -> torch.Tensor:
        name = f"model.layers.1.mlp.experts.{expert}.{shard}.weight"
        return dequantize_fp8_blocks(tensors[name], tensors[f"{name}_scale_inv"], dtype=torch.float64)

    y = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(EXPERTS):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[token].double() @ matrix(expert, shard).T for shard in ("gate_proj", "up_proj"))
        y.index_add_(0, token, weights[token, slot, None] * ((gate * gate.sigmoid() * up) @ matrix(expert, "down_proj").T))
    return y


@pytest.mark.cases_per_seed(1)
@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_block_agrees_with_float64(launch, config, folder, tensors, seed, tmp_path, no_gpu):
    ranks, argv = LAUNCHES[launch]
    x = 3 * torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(seed + 2)).bfloat16()

    def work(rank: int) -> tuple[torch.Tensor, ...]:
        block = moe_block(config, tensors, seed)
        assert not block.num_fused_shared_experts, "stock fuses it by default where experts are not spread"
        return block(x.clone()), block(x[:0]), block.gate(x), block.gate.e_score_correction_bias.data

    for y, nothing, logits, bias in stock.in_ranks(work, stock.resolve(folder, *argv), ranks, tmp_path):
        want = expected(tensors, x, *route(config, logits, bias))
        assert y.shape == x.shape and nothing.shape == (0, HIDDEN)
        assert stock.relative_error(y, want) < ROUNDING
        if config["n_group"] > 1:
            ungrouped = expected(tensors, x, *route({**config, "n_group": 1, "topk_group": 1}, logits, bias))
            assert stock.relative_error(y, ungrouped) > 2 * ROUNDING, "the groups show"
        assert (want / FACTOR).abs().max() > 10, "a clamp of 10, as V4 has, would show"
