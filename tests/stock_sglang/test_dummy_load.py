"""`--load-format dummy` through SGLang's own fill: random experts and routers, the same ones on any number of ranks."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

import pytest
import stock
import torch
from click.testing import CliRunner
from stock import EXPERTS, FACTOR, HIDDEN, INTERMEDIATE, TOP_K

from hopper_moe.kernels.device import SM90
from hopper_moe.launch import doctor
from hopper_moe.launch import machine as machines
from hopper_moe.launch.cli import main
from hopper_moe.launch.machine import GIB, Gpu, Machine
from hopper_moe.launch.ports import free_port
from hopper_moe.moe_backends.env import settings
from hopper_moe.moe_backends.sglang import dummy_load
from hopper_moe.quantization.codecs import dequantize_fp8_blocks, dequantize_mxfp4
from hopper_moe.quantization.random_experts import generator, random_matrix
from hopper_moe.quantization.routing_law import Routing, shares
from hopper_moe.quantization.sglang_checks import CHECKPOINT_PARAMETERS

NAME = "model.layers.0.mlp"


@pytest.fixture(autouse=True)
def first_launch():
    dummy_load._announce.cache_clear()


def build(**changes: Any) -> tuple[torch.nn.Module, Any]:
    """(model, its MoE block) after SGLang's fill with our takeover: one stock block under the name that it has in a model."""
    from sglang.srt.model_loader import loader
    from sglang.srt.models.deepseek_v2 import DeepseekV2MoE
    from transformers import PretrainedConfig

    config = PretrainedConfig.from_dict(stock.config_dict(n_group=1, topk_group=1, swiglu_limit=10.0, **changes))
    is_fp4 = changes.get("expert_dtype") != "fp8"
    with stock._bf16():
        block = DeepseekV2MoE(
            config=config,
            layer_id=0, quant_config=stock.quant_config(is_fp4, ignored_layers=stock.SHARED), prefix=NAME, is_deepseek_v4=True,
        )  # fmt: skip
    model = torch.nn.ModuleDict(
        {"model": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"mlp": block})])})}
    )
    loader.initialize_dummy_weights(model)
    return model, block


def experts_of(layer: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(layer, name).data.float() if "scale" in name else getattr(layer, name).data.view(torch.uint8).clone()
            for name in CHECKPOINT_PARAMETERS}  # fmt: skip


def on(model, *argv: str, rank: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """The experts of one rank of a launch."""
    stock.publish(stock.resolve(model, "--load-format", "dummy", *argv), rank)
    return experts_of(build(**changes)[1].experts)


def test_every_rank_holds_its_part_of_the_same_experts(model):
    whole = on(model)
    for rank in range(4):
        part = on(model, "--tp-size", "4", "--ep-size", "4", rank=rank)
        for name, tensor in part.items():
            assert torch.equal(tensor, whole[name][rank * EXPERTS // 4 : (rank + 1) * EXPERTS // 4]), (rank, name)
    for rank in range(2):
        part = on(model, "--tp-size", "2", rank=rank)
        for name, tensor in part.items():
            dim = 2 if name.startswith("w2") else 1
            halves = [half.chunk(2, dim)[rank] for half in (whole[name].chunk(2, 1) if dim == 1 else [whole[name]])]
            assert torch.equal(tensor, torch.cat(halves, 1)), (rank, name)


def test_layers_and_experts_differ(model):
    stock.publish(stock.resolve(model, "--load-format", "dummy", backend="marlin"))
    os.environ["HOPPER_MOE_DUMMY_ROUTING"] = "uniform"
    _, block = build(hidden_size=512)  # a stock layer, whose parameters may be loaded twice
    weight = block.experts.w13_weight
    assert not torch.equal(weight[0], weight[1]) and not torch.equal(weight[0, :INTERMEDIATE], weight[0, INTERMEDIATE:])
    before, gate = weight.clone(), block.gate.weight.clone()
    with torch.no_grad():
        dummy_load.fill_router(block, "model.layers.1.mlp")
        dummy_load.fill_experts(block.experts, "model.layers.1.mlp.experts", 1)
    assert not torch.equal(gate, block.gate.weight) and not torch.equal(before[0], weight[0])


def test_redundant_copies_of_an_expert_are_the_same(model, monkeypatch):
    """EPLB: SGLang's loader puts a logical expert into several slots."""
    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.eplb import expert_location

    whole = on(model)
    args = stock.resolve(model, "--load-format", "dummy", "--tp-size", "8", "--ep-size", "8", "--ep-num-redundant-experts", "8")
    stock.publish(args, 6)
    monkeypatch.setattr(expert_location, "get_device", lambda: torch.zeros(0))  # whose `device` is the CPU
    metadata = expert_location.ExpertLocationMetadata.init_trivial(model_config_of(args), 6)
    expert_location.set_global_expert_location_metadata(metadata)
    try:
        part = experts_of(build()[1].experts)
    finally:
        expert_location._global_expert_location_metadata = None
    logical = metadata.physical_to_logical_map[0, 18:21].tolist()  # three slots a rank
    for name, tensor in part.items():
        assert torch.equal(tensor, whole[name][logical]), name


def test_a_stock_backend_gets_the_same_experts_only_if_asked(model):
    ours = on(model, hidden_size=512)
    for asked in (True, False):
        os.environ.pop("HOPPER_MOE_DUMMY_ROUTING", None)
        if asked:
            os.environ["HOPPER_MOE_DUMMY_ROUTING"] = "uniform"
        stock.publish(stock.resolve(model, "--load-format", "dummy", backend="marlin"))
        _, block = build(hidden_size=512)  # Marlin pads to multiples of 256
        assert type(block.experts.quant_method).__name__ == "Mxfp4MarlinMoEMethod"
        found = experts_of(block.experts)
        assert [torch.equal(found[name], ours[name]) for name in ours] == [asked] * len(ours)
        assert (block.gate.weight.abs().max() > 1e-3) == asked


def test_fp8_experts_are_normal_in_blocks(tmp_path):
    os.environ["HOPPER_MOE_KERNEL"] = "fp8_mega"
    stock.publish(stock.resolve(stock.write_model(tmp_path, "F8_E4M3"), "--load-format", "dummy"))
    _, block = build(expert_dtype="fp8")
    layer = block.experts
    dense = dequantize_fp8_blocks(layer.w2_weight[3], layer.w2_weight_scale_inv[3])
    # E4M3 keeps three mantissa bits, so a rounded value is off by 1/16 at most; the mean of 98,304 squares is within 2 %.
    assert float(dense.square().mean().sqrt()) * INTERMEDIATE**0.5 * 0.5965 == pytest.approx(1, rel=0.02)
    assert float(layer.w2_weight.float().abs().max()) == 448
    assert layer.w2_weight_scale_inv[3].shape == (HIDDEN // 128, INTERMEDIATE // 128)


def dense(expert: int, shard: str) -> torch.Tensor:
    source = generator(torch.device("cpu"), dummy_load.SEED, f"{NAME}.experts", expert, shard)
    return dequantize_mxfp4(*random_matrix(shard, HIDDEN, INTERMEDIATE, True, source))


def test_a_layer_keeps_the_size_of_its_tokens(model, seed):
    stock.publish(stock.resolve(model, "--load-format", "dummy"))
    layer = build()[1].experts
    layer.quant_method.process_weights_after_loading(layer)  # the ledger is complete, the self-check passes
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(48, HIDDEN, generator=rng).bfloat16()
    ids = torch.rand(48, EXPERTS, generator=rng).topk(TOP_K).indices.to(torch.int32)
    y = layer.quant_method._backend.run(x, ids, torch.full((48, TOP_K), FACTOR / TOP_K))
    wanted = torch.zeros(48, HIDDEN, dtype=torch.float64)
    for expert in range(EXPERTS):
        rows = (ids == expert).any(1)
        gate, up = x[rows].double() @ dense(expert, "w1").T, x[rows].double() @ dense(expert, "w3").T
        wanted[rows] += FACTOR / TOP_K * (gate * gate.sigmoid() * up) @ dense(expert, "w2").T
    assert stock.relative_error(y, wanted) < stock.ROUNDING
    # Outputs of different experts are independent, so TOP_K of them of RMS 1 add up to sqrt(TOP_K).
    assert float(y.double().square().mean().sqrt()) * TOP_K**0.5 / FACTOR == pytest.approx(1, rel=0.1)


# ---- routing

TOKENS = 4096


def load_of(block: Any, seed: int) -> torch.Tensor:
    """Share of the tokens that each expert of a block gets; rows as they come out of a norm with SGLang's made-up weights."""
    rng = torch.Generator().manual_seed(seed)
    norm = torch.empty(HIDDEN).uniform_(-1e-3, 1e-3, generator=rng)
    x = (torch.randn(TOKENS, HIDDEN, generator=rng) * norm).bfloat16()
    ids = block.topk(x, block.gate(x)).topk_ids
    return torch.bincount(ids.flatten().long(), minlength=block.gate.weight.shape[0]) / TOKENS


def chance(share: torch.Tensor) -> torch.Tensor:
    """Five standard deviations of the counted share."""
    return 5 * (share * (1 - share) / TOKENS).sqrt()


@pytest.mark.parametrize(("text", "slack"), [("uniform", 0.1), ("zipf:0.7", 0.2), ("zipf:1", 0.25)])
def test_the_gate_spreads_tokens_as_asked(model, seed, text, slack):
    """`slack`: rows of signs are not quite orthogonal, and the k-th largest logit is not quite 1."""
    os.environ["HOPPER_MOE_DUMMY_ROUTING"] = text
    stock.publish(stock.resolve(model, "--load-format", "dummy"))
    _, block = build(n_routed_experts=64)
    found = load_of(block, seed)
    assert not block.gate.e_score_correction_bias.any()
    exponent = float(text.removeprefix("zipf:")) if text != "uniform" else 0.0
    wanted = torch.tensor(shares(Routing(exponent), 64, TOP_K))
    assert ((found.sort(descending=True).values if exponent else found) - wanted).abs().le(chance(wanted) + slack * wanted).all()


def test_stocks_own_routers_use_a_few_experts_only(model, seed):
    """Why ours replace them."""
    from sglang.srt.model_loader import loader

    stock.publish(stock.resolve(model, "--load-format", "dummy"))
    model_, block = build(n_routed_experts=64)
    loader.initialize_dummy_weights.__wrapped__(model_)
    assert int((load_of(block, seed) > 0).sum()) <= 2 * TOP_K


# ---- SGLang's whole dummy loader


def test_sglangs_dummy_loader_makes_a_whole_model(tmp_path, no_gpu, caplog):
    """A folder with config.json only; a layer with hash routing and one with a gate, then the draft's layer."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.loader import DummyModelLoader

    folder = stock.write_model(tmp_path / "model", num_hidden_layers=2, num_hash_layers=1, n_group=1, topk_group=1)
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    args = stock.resolve(folder, "--load-format", "dummy")

    def work(_rank: int) -> tuple[list[str], list[int], list[list[int]], list[str]]:
        caplog.set_level(logging.INFO, "hopper_moe")
        logging.getLogger("hopper_moe").addHandler(caplog.handler)  # resolution has replaced the root's handlers
        models = []
        for is_draft in (False, True):
            config = ModelConfig.from_server_args(args, is_draft_model=is_draft)
            loader = DummyModelLoader(LoadConfig(load_format="dummy"))
            models.append(loader.load_model(model_config=config, device_config=DeviceConfig("cpu")))
        layers = [module for model in models for module in model.modules() if getattr(module, "_hopper_moe_layer", False)]
        sums = [int(layer.w13_packed.sum()) for layer in layers]
        said = [record.message for record in caplog.records if "random experts" in record.message]
        return [type(model).__name__ for model in models], sums, models[0].model.layers[0].mlp.topk.tid2eid.tolist(), said

    ((names, sums, table, said),) = stock.in_ranks(work, args, 1, tmp_path)
    assert names == ["DeepseekV4ForCausalLM", "DeepseekV4ForCausalLMNextN"] and len(set(sums)) == len(sums) == 3
    assert all(len(set(row)) == TOP_K and 0 <= min(row) and max(row) < EXPERTS for row in table)
    assert said == ["--load-format dummy: random experts of seed 1234, routing uniform: answers mean nothing"]


# ---- our commands


def test_serve_and_doctor_take_a_folder_without_weights(tmp_path, monkeypatch):
    folder = stock.write_model(tmp_path / "model")
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    gpus = Machine((Gpu(0, "NVIDIA H200", SM90, 140 * GIB, 139 * GIB, 132, 18),), driver="580.65")
    monkeypatch.setattr(machines, "detect", lambda: gpus)
    given = ["--load-format", "dummy", "--port", str(free_port())]
    stock.forget_settings()
    served = CliRunner().invoke(main, ["serve", str(folder), "--dry-run", *given])
    assert served.exit_code == 0, served.output
    assert re.search(r"GiB of weights per rank: packed experts 0.01, other 0.28\n", served.output), served.output
    assert "--load-format dummy" in served.output.splitlines()[-1]
    assert {finding.verdict for finding in doctor._model(str(folder), given, settings(), gpus)} == {"ok"}
    refused = CliRunner().invoke(main, ["serve", str(folder), "--dry-run"])
    assert refused.exit_code and "holds no .safetensors files" in refused.output
    assert [file.name for file in folder.iterdir()] == ["config.json"]
