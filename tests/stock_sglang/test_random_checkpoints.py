"""The random DeepSeek-V4.1 and V3 checkpoints are whole: stock SGLang's models take every tensor and miss none, our commands
accept them. Small sizes of the same config that the writers give."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import stock
import torch
from click.testing import CliRunner

from hopper_moe.eval.serving_bench import random_v3, random_v41
from hopper_moe.eval.serving_bench.random_tensors import RandomTensors, free_token
from hopper_moe.kernels.device import SM90
from hopper_moe.launch import machine as machines
from hopper_moe.launch.cli import main
from hopper_moe.launch.machine import GIB, Gpu, Machine
from hopper_moe.launch.ports import free_port
from hopper_moe.quantization.checkpoint import write_stored
from hopper_moe.quantization.codecs import decode_ue8m0, dequantize_mxfp4

TOKENIZER = Path(__file__).resolve().parents[2] / "eval/data/gpu_dsv4"
SMALL_V41 = {
    "hidden_size": 128, "moe_intermediate_size": 128, "num_attention_heads": 8, "o_groups": 1, "o_lora_rank": 128,
    "q_lora_rank": 128, "index_n_heads": 4, "engram_vocab_size": 16, "max_position_embeddings": 4096,
}  # fmt: skip
SMALL_V3 = {
    "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 4, "q_lora_rank": 128,
    "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture(scope="module")
def v41(tmp_path_factory) -> Path:
    config = random_v41.nested_config(*random_v41.vocabulary_of(TOKENIZER), 8, **SMALL_V41)
    tensors = random_v41.tensors_v41(config, RandomTensors(1, torch.device("cpu")))
    return write_stored(tmp_path_factory.mktemp("v41") / "model", tensors, config, tokenizer_dir=TOKENIZER)


@pytest.fixture(scope="module")
def v3(tmp_path_factory) -> Path:
    config = random_v3.config_v3(random_v3.vocabulary_of(TOKENIZER), 16, **SMALL_V3)
    tensors = random_v3.tensors_v3(config, RandomTensors(1, torch.device("cpu")))
    return write_stored(tmp_path_factory.mktemp("v3") / "model", tensors, config, tokenizer_dir=TOKENIZER)


@pytest.fixture
def no_prewarm(monkeypatch, no_gpu) -> None:
    """Stock compiles kernels of the hyper-connections at the end of a load."""
    monkeypatch.setenv("SGLANG_OPT_USE_TILELANG_MHC_PRE", "0")


def loaded(folder: Path, argv: list[str], draft: bool, tmp_path: Path) -> tuple[str, list[str], list[str]]:
    """(class of the model, parameters that no tensor reached, what its loader complained of) after stock's own load."""
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import loader

    args = stock.resolve(folder, *argv)

    def work(_rank: int) -> tuple[str, list[str], list[str]]:
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("sglang").addHandler(handler)
        config = ModelConfig.from_server_args(args, is_draft_model=draft)
        load_config = LoadConfig()
        with stock._bf16():
            quant = loader._get_quantization_config(config, load_config)
            model = loader._initialize_model(config, load_config, quant)
        for parameter in model.parameters():
            parameter.data.reshape(-1).view(torch.uint8).fill_(0xFF)  # NaN in every float type
        model.load_weights(loader.DefaultModelLoader(load_config)._get_all_weights(config, model))
        missed = [name for name, p in model.named_parameters() if bool((p.data.reshape(-1).view(torch.uint8) == 0xFF).all())]
        missed = [name for name in missed if not name.endswith((".k_scale", ".v_scale"))]  # of the KV cache, in no checkpoint
        return type(model).__name__, missed, [line for line in said if re.search(r"not found|not initialized|unexpected", line)]

    (found,) = stock.in_ranks(work, args, 1, tmp_path)
    return found


@pytest.mark.parametrize("draft", [False, True], ids=["target", "draft"])
def test_stock_takes_every_tensor_of_v41(draft, v41, tmp_path, no_prewarm):
    name, missed, complaints = loaded(v41, ["--speculative-algorithm", "DSPARK"], draft, tmp_path)
    assert name == ("DeepseekV4ForCausalLMDSpark" if draft else "DeepseekV4ForCausalLM")
    assert not missed and not complaints


def test_stock_takes_every_tensor_of_v3(v3, tmp_path, no_gpu, monkeypatch):
    monkeypatch.setenv("HOPPER_MOE_KERNEL", "fp8_mega")
    name, missed, complaints = loaded(v3, [], False, tmp_path)
    assert name == "DeepseekV3ForCausalLM" and not missed and not complaints


def test_engram_hashes_the_tokens_of_the_vocabulary(v41):
    """What stock asserts at start, which the other tests leave out."""
    from sglang.srt.layers.engram import EngramHasher, EngramLayout
    from sglang.srt.utils.hf_transformers.tokenizer import get_tokenizer
    from sglang.srt.utils.hf_transformers_utils import get_config

    config = get_config(str(v41), trust_remote_code=False)
    layout = EngramLayout.from_config(config)
    hasher = EngramHasher(
        layout,
        get_tokenizer(str(v41), tokenizer_backend="huggingface"),
        config.engram_pad_token_id,
        config.engram_compressed_vocab_size,
    )
    assert len(hasher.token_map) == config.vocab_size and layout.column_bounds(0)[-1] == config.engram_num_embeddings[0]


@pytest.mark.parametrize("folder", ["v41", "v3"])
def test_our_commands_accept_it(folder, request, monkeypatch):
    path = str(request.getfixturevalue(folder))
    gpus = Machine((Gpu(0, "NVIDIA H200", SM90, 140 * GIB, 139 * GIB, 132, 18),), driver="580.65")
    monkeypatch.setattr(machines, "detect", lambda: gpus)
    monkeypatch.delenv("HOPPER_MOE_KERNEL")
    stock.forget_settings()
    draft = ["--speculative-algorithm", "DSPARK"] if folder == "v41" else []
    for command in (["checkpoint", "inspect", path], ["serve", path, "--dry-run", "--port", str(free_port()), *draft]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    assert ("mxfp4_mega" if folder == "v41" else "fp8_mega") in result.output, result.output


def test_weights_keep_the_size_of_their_input(seed):
    draw = RandomTensors(seed, torch.device("cpu"))
    for k in (128, 2304, 5120):
        rows = (1 << 15) // k * 32  # about a thousand blocks, whose two scales then average out
        draw.fp4("a", rows, k)
        draw.fp8_ue8m0("b", rows, k)
        draw.fp8_fp32("c", 128, 2560)
        blocks = decode_ue8m0(draw.found["b.scale"]).repeat_interleave(32, 0).repeat_interleave(32, 1)
        fp4 = dequantize_mxfp4(draw.found["a.weight"], draw.found["a.scale"])
        fp8 = draw.found["b.weight"].float() * blocks
        assert 0.65 < float(fp4.std()) * k**0.5 < 1.5 and float(fp8.std()) * k**0.5 == pytest.approx(1, rel=0.1)
    assert bool(draw.found["c.weight"].float().isfinite().all())


def test_most_tokens_have_a_likely_successor(seed):
    draw = RandomTensors(seed, torch.device("cpu"))
    successor = draw.linked_vocabulary("embed", "head", 512, 1024, 0.5)
    embed, head = draw.found["embed"].float(), draw.found["head"].float()
    hidden = 0.5 * embed + 0.75**0.5 * draw.normal(512, 1024)
    right = (hidden @ head.T).argmax(-1) == successor
    linked = torch.arange(512) % 16 != 15
    assert float(right[linked].float().mean()) > 0.95 and float(right[~linked].float().mean()) < 0.1
    assert free_token(512) == 511 and free_token(457) == 447 and free_token(129280) == 129279
