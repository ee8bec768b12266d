"""Checkpoints written here: types, values, what transformers makes of them, and `hopper-moe checkpoint inspect`."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from small_checkpoint import CONFIG, edit_tensors, make_state

from hopper_moe.eval.tiny_model.config import build_model
from hopper_moe.launch.checkpoint_inspect import KIND_MEANINGS, inspect_checkpoint
from hopper_moe.launch.cli import main
from hopper_moe.quantization import codecs
from hopper_moe.quantization.checkpoint import Checkpoint, write_checkpoint
from hopper_moe.quantization.checkpoint_names import original_config, to_original_names
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import pack_experts, unpack_experts
from hopper_moe.quantization.row_scales import RowKind


def test_what_is_written_is_what_was_quantised(tmp_path, seed):
    state = make_state(seed)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        (tokenizer / name).write_text(name)
    folder = write_checkpoint(tmp_path / "ck", state, CONFIG, tokenizer_dir=tokenizer, max_shard_bytes=50_000)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert (folder / "tokenizer.json").read_text() == "tokenizer.json" and (folder / "chat_template.jinja").exists()
    assert not (folder / "model.safetensors").exists() and json.loads((folder / "config.json").read_text()) == CONFIG
    read = Checkpoint.open(folder)
    assert {info.dtype for name, info in read.tensors.items() if ".experts." in name} == {"I8", "F8_E8M0"}
    assert read.tensors["layers.0.attn.wq_a.weight"].dtype == "F8_E4M3" and read.tensors["layers.0.attn.wq_a.scale"].shape == (
        2,
        1,
    )
    assert (read.tensors["norm.weight"].dtype, read.tensors["embed.weight"].dtype) == ("F32", "BF16")
    for name, given in state.items():
        stored = read.load(name)
        if ".experts." in name:
            packed, scale = codecs.quantize_mxfp4(given)
            assert torch.equal(codecs.as_bytes(stored), packed), name
            assert torch.equal(codecs.as_bytes(read.load(name.replace(".weight", ".scale"))), scale), name
        elif "wq_a" in name:
            assert (
                codecs.dequantize_fp8_blocks(stored, read.load(name.replace(".weight", ".scale"))).sub(given).abs().max() < 0.04
            )
        else:
            assert torch.equal(stored, given.to(stored.dtype)), name
    with pytest.raises(Refusal, match="has no tensor layers.7.attn.wq_a.weight"):
        read.load("layers.7.attn.wq_a.weight")


def test_layer_experts_are_gate_then_up_and_pack(tmp_path, seed):
    sizes = {"moe_intermediate_size": 128, "hidden_size": 256}
    folder = write_checkpoint(tmp_path / "ck", make_state(seed, **sizes), {**CONFIG, **sizes})
    read = Checkpoint.open(folder)
    w13, w13_scale, w2, w2_scale = read.layer_experts("layers.1")
    w3 = codecs.as_bytes(read.load("layers.1.ffn.experts.2.w3.weight"))
    assert torch.equal(w13[2, 128:], w3) and w13_scale.shape == (4, 256, 8) and w2.shape == (4, 256, 64)
    for given, back in zip(
        (w13, w13_scale, w2, w2_scale), unpack_experts(pack_experts(w13, w13_scale, w2, w2_scale)), strict=True
    ):
        assert torch.equal(given, back)
    scale = w13_scale.clone()
    edit_tensors(folder, lambda t: t.update({n: codecs.decode_ue8m0(s) for n, s in t.items() if n.endswith("w1.scale")}))
    assert torch.equal(Checkpoint.open(folder).layer_experts("layers.1")[1], scale), "FP32 scales read as the same bytes"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [({"expert_dtype": "fp8"}, "expert_dtype='fp8'"), ({"quantization_config": {}}, r"quantization_config=\{\}")],
    ids=["expert_dtype", "quantization_config"],
)
def test_a_config_that_says_other_types_is_not_written(config, sentence, tmp_path):
    with pytest.raises(Refusal, match=sentence):
        write_checkpoint(tmp_path / "ck", make_state(0), {**CONFIG, **config})
    assert not (tmp_path / "ck").exists()


def test_an_existing_checkpoint_is_not_overwritten(tmp_path):
    write_checkpoint(tmp_path / "ck", make_state(0), CONFIG)
    with pytest.raises(Refusal, match="already holds .safetensors files"):
        write_checkpoint(tmp_path / "ck", make_state(0), CONFIG)


def test_the_writer_checks_what_it_wrote(tmp_path):
    state = make_state(0)
    del state["layers.1.ffn.experts.3.w2.weight"]
    with pytest.raises(Refusal, match="layers.1.ffn.experts.3.w2.weight is missing"):
        write_checkpoint(tmp_path / "ck", state, CONFIG)


def test_transformers_reads_every_tensor_and_the_values_we_decode(tmp_path, seed):
    from transformers import AutoModelForCausalLM

    yarn = {"type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 256}
    sizes = {"vocab_size": 64, "moe_intermediate_size": 64, "n_routed_experts": 4, "q_lora_rank": 64, "o_lora_rank": 64}
    heads = {"num_attention_heads": 2, "head_dim": 64, "qk_rope_head_dim": 32, "index_n_heads": 2, "index_head_dim": 64}
    model = build_model(seed, **sizes, **heads, routed_scaling_factor=1.5, max_position_embeddings=1024, rope_scaling=yarn)
    config = model.config
    state = to_original_names(model.state_dict())
    folder = write_checkpoint(tmp_path / "ck", state, original_config(config))
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    differences = [
        key
        for key in ("routed_scaling_factor", "swiglu_limit", "layer_types", "mlp_layer_types", "num_experts_per_tok", "head_dim")
        if getattr(loaded.config, key) != getattr(config, key)
    ]
    assert not differences
    read, theirs = Checkpoint.open(folder), to_original_names(loaded.state_dict())
    assert theirs.keys() == state.keys() == {name for name in read.tensors if not name.endswith(".scale")}
    for name, tensor in theirs.items():
        stored = read.load(name)
        scale_name = name.removesuffix("weight") + "scale"
        scale = read.load(scale_name) if scale_name in read.tensors else None
        if ".experts." in name and ".shared_" not in name:
            stored = codecs.dequantize_mxfp4(stored, scale)
        elif scale is not None:
            stored = codecs.dequantize_fp8_blocks(stored, scale)
        assert torch.equal(tensor.double(), stored.double()), name


def test_inspect_prints_what_is_there(tmp_path, seed):
    folder = write_checkpoint(tmp_path / "ck", make_state(seed), CONFIG)
    found = inspect_checkpoint(folder)
    assert found.scales.num_rows == 2 * 4 * (64 + 64 + 128) and found.scales.num_inexact_rows == 0
    assert found.rank_bytes(3) is None
    assert found.rank_bytes(4).device < found.rank_bytes(2).device < found.rank_bytes(1).device
    files = sum(info.num_bytes for info in Checkpoint.open(folder).tensors.values())
    assert found.num_bytes == files
    done = CliRunner().invoke(main, ["checkpoint", "inspect", str(folder)])
    assert done.exit_code == 0, done.output
    for part in (
        "DeepseekV4ForCausalLM",
        "fp4: weights I8, scales F8_E8M0",
        "4 experts, top_k 2",
        "2048 of 2048 rows fit",
        "EP 8",
    ):
        assert part in done.output, part
    assert "cannot serve it: intermediate_size 64 is not a positive multiple of 128" in done.output


def test_inspect_counts_rows_by_what_they_need(tmp_path, seed):
    folder = write_checkpoint(tmp_path / "ck", make_state(seed), CONFIG)
    assert len(KIND_MEANINGS) == len(RowKind)

    def widen(t: dict) -> None:
        scale = t["layers.0.ffn.experts.1.w1.scale"].view(torch.uint8)
        weight = t["layers.0.ffn.experts.1.w1.weight"].view(torch.uint8)
        scale[3:8] = 100
        weight[3:8] = 0x71  # .5 and 6: no other scale will do
        scale[3, 1] = 140
        scale[4] = 250
        scale[5, 1] = 140
        weight[5, 16:32] = 0x80
        scale[6, 1] = 113
        weight[6, 16:32] = 0x22  # 1, which is a 4 at 111
        scale[7, 1] = 128

    edit_tensors(folder, widen)
    found = inspect_checkpoint(folder)
    assert found.scales.rows_by_kind == (2044, 1, 1, 1, 1)
    assert (found.scales.num_inexact_rows, found.scales.worst_span, found.scales.largest) == (1, 40, 250)
    assert (found.scales.num_wide_layers, found.scales.num_inexact_layers) == (1, 1)
    output = CliRunner().invoke(main, ["checkpoint", "inspect", str(folder)]).output
    for part in ("2047 of 2048 rows fit", "1 without their all-zero groups", "1 re-encoded", "1 in the wide format"):
        assert part in output, part
    assert "1 rows in 1 of 2 layers span more than 28 octaves: HOPPER_MOE_INEXACT_ROWS" in output
    assert inspect_checkpoint(folder, read_scales=False).scales is None


def test_inspect_refuses_in_one_line_with_exit_code_2(tmp_path, seed):
    folder = write_checkpoint(tmp_path / "ck", make_state(seed), CONFIG)
    shutil.rmtree(folder)
    done = CliRunner().invoke(main, ["checkpoint", "inspect", str(folder)])
    assert done.exit_code == 2 and "is no folder" in done.output and done.output.count("\n") == 1
