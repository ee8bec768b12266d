"""DeepSeek-V4.1-Flash checkpoints, nested as released and flat, checkpoints in other names and types, and their memory."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import CONFIG, cached, edit_config, edit_tensors, make_state
from small_v41 import FLASH_V41, flat, nested, tensors_v41, write_v41

from hopper_moe.launch.checkpoint_inspect import inspect_checkpoint, report_lines
from hopper_moe.launch.model_facts import read_model
from hopper_moe.quantization.checkpoint import Checkpoint, write_checkpoint
from hopper_moe.quantization.checkpoint_check import read_checkpoint, validate_checkpoint
from hopper_moe.quantization.checkpoint_memory import RankLayout, weights_per_rank
from hopper_moe.quantization.config_values import flatten
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.layout import packed_expert_bytes
from hopper_moe.quantization.model_facts import DraftFacts, ModelFacts, facts_of

GIB = 1 << 30


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    return write_v41(tmp_path_factory.mktemp("v41") / "nested", nested(), tensors_v41(1))


@pytest.fixture
def copy(released, tmp_path) -> Path:
    return shutil.copytree(released, tmp_path / "copy")


def put_config(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "config",
    [nested(), flat("DeepseekV41ForCausalLM"), flat("DeepseekV4ForCausalLM")],
    ids=["nested", "flat", "flat under V4's name"],
)
def test_every_layout_is_the_same_model(config, copy):
    put_config(copy, config)  # A1, A2, A3
    loaded = read_model(str(copy))
    facts = loaded.facts
    assert (facts.architecture, facts.expert_dtype, facts.quantization) == ("DeepseekV4ForCausalLM", "fp4", "fp8")
    assert (facts.num_experts, facts.top_k, facts.num_moe_layers, facts.dense_layers) == (8, 3, 3, ())
    assert facts.draft == DraftFacts(2, 4, 2) and facts.weight_block_size == (32, 32)
    loaded.require_complete()
    found = inspect_checkpoint(copy)
    assert found.facts == facts and set(found.expert_layers) == {"layers.0", "layers.1", "layers.2", "mtp.0", "mtp.1"}
    lines = "\n".join(report_lines(found))
    assert "draft              2 layers, 4 experts, top_k 2" in lines and "GiB of hash tables in device memory" in lines


@pytest.mark.parametrize("where", ["nowhere", "nested", "null"])
def test_expert_dtype_may_be_anywhere_or_absent(where, copy):  # A4, H15
    config = nested()
    config["quantization_config"].pop("expert_dtype")
    if where == "nested":
        config["quantization_config"]["expert_dtype"] = "fp4"
    if where == "null":
        config["expert_dtype"] = None
    put_config(copy, config)
    validate_checkpoint(copy)
    assert facts_of(flatten(config, copy), "config.json").expert_dtype == "fp4", "the default without weights at hand"


def test_only_the_keys_that_stop_sglang_must_have_a_type(copy):
    """V4.1's configuration class types routed_scaling_factor, V4's also swiglu_limit and num_nextn_predict_layers."""
    config = nested()
    config["text_config"] |= {"swiglu_limit": 10, "first_k_dense_replace": None}
    put_config(copy, config)
    assert read_model(str(copy)).facts.swiglu_limit == 10.0
    for key, value in (("swiglu_limit", None), ("num_nextn_predict_layers", None)):
        put_config(copy, nested() | {key: value})
        read_model(str(copy))
        put_config(copy, flat("DeepseekV4ForCausalLM") | {"model_type": "deepseek_v4", key: value})
        with pytest.raises(Refusal, match=f"has {key}=null, which stops SGLang's reader"):
            read_model(str(copy))
    for key, value in (("swiglu_limit", 10), ("routed_scaling_factor", 10**400)):
        put_config(copy, flat("DeepseekV4ForCausalLM") | {"model_type": "deepseek_v4", key: value})
        with pytest.raises(Refusal, match=f"has {key}=1.* only a (number with a decimal point|positive number) makes sense"):
            read_model(str(copy))
    config["text_config"] |= {"swiglu_limit": 10**400}
    put_config(copy, config)
    with pytest.raises(Refusal, match="has swiglu_limit=1.*, but only a positive number makes sense"):
        read_model(str(copy))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda t: t.pop("mtp.1.ffn.experts.3.w2.weight"), r"mtp.1.ffn.experts.3.w2.weight is missing"),  # A5
        (lambda t: t.update({"mtp.0.ffn.experts.4.w1.weight": t["mtp.0.ffn.experts.3.w1.weight"].clone()}), "there are 4"),
        (lambda t: t.update({"layers.0.attn.wq_a.scale": t["layers.0.attn.wq_a.scale"][:1, :1]}), r"needs \[2, 4\]"),  # A6
        (lambda t: t.update({"layers.1.engram.embed.scale": t["layers.1.engram.embed.scale"][:2]}), r"needs \[64, 8\]"),  # A7
    ],
    ids=["draft expert missing", "draft expert too many", "linear blocks", "engram table"],
)
def test_what_is_wrong_is_named(damage, sentence, copy):
    edit_tensors(copy, damage)
    with pytest.raises(Refusal, match=sentence):
        validate_checkpoint(copy)


def test_fp8_experts_in_other_blocks_are_named_before_weights_load(copy):
    def to_fp8(t: dict) -> None:
        for name in [n for n in t if ".experts." in n and n.endswith(".weight")]:
            rows, half = t[name].shape
            t[name] = torch.zeros(rows, 2 * half, dtype=torch.float8_e4m3fn)

    edit_tensors(copy, to_fp8)
    config = nested()
    config["quantization_config"]["expert_dtype"] = "fp8"
    put_config(copy, config)
    with pytest.raises(Refusal, match=r"FP8 in blocks of \[32, 32\].*\[128, 128\] only"):
        read_model(str(copy)).require_complete()


def real_size_facts() -> ModelFacts:
    return facts_of(flatten(FLASH_V41, Path("config.json")), "config.json")


def test_numbers_of_the_released_model():  # models.md 2b
    facts, ep8 = real_size_facts(), RankLayout(tp_size=8, ep_size=8)
    without, with_draft = (weights_per_rank(facts, None, ranks) for ranks in (ep8, RankLayout(8, 8, has_draft=True)))
    assert without.experts / GIB == pytest.approx(33.64, abs=0.02) and without.draft_experts == 0
    assert (with_draft.experts + with_draft.draft_experts) / GIB == pytest.approx(34.48, abs=0.02)
    assert without.engram / GIB == pytest.approx(23.6, abs=0.05)
    assert weights_per_rank(facts, None, RankLayout(4, 4)).engram / GIB == pytest.approx(47.2, abs=0.05)
    on_host = weights_per_rank(facts, None, RankLayout(8, 8, engram_on_host=True))
    assert on_host.engram == 0 and on_host.engram_host / GIB == pytest.approx(188.8, abs=0.1)


def test_inspect_counts_what_every_rank_holds(released):
    """Tables and shared experts are divided, the rest is not; EP 8 would have been said to hold the tables whole."""
    facts, tensors = read_checkpoint(released)
    ranks = [weights_per_rank(facts, tensors, RankLayout(size, size, has_draft=True)) for size in (1, 2, 4)]
    expert = packed_expert_bytes(facts.hidden_size, facts.intermediate_size)
    for size, of_rank in zip((1, 2, 4), ranks, strict=True):
        assert of_rank.experts == 3 * 8 // size * expert and of_rank.draft_experts == 2 * 4 // size * expert
        assert of_rank.engram == facts.engram.table_bytes() // size
    assert ranks[0].other > ranks[1].other > ranks[2].other > 0
    assert weights_per_rank(facts, tensors, RankLayout()).other < ranks[0].other, "without speculation no draft is held"


def hugging_face(t: dict) -> None:
    words = ((".ffn.", ".mlp."), (".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."))
    words += ((".attn.", ".self_attn."), ("embed.weight", "model.embed_tokens.weight"), ("head.weight", "lm_head.weight"))
    for name in list(t):
        new = {"norm.weight": "model.norm.weight"}.get(name, name)
        for old, other in words:
            new = new.replace(old, other)
        new = "model." + new if new.startswith("layers.") else new
        t[new.removesuffix(".scale") + ".weight_scale_inv" if new.endswith(".scale") else new] = t.pop(name)


def bf16_scales(t: dict) -> None:
    for name in [n for n in t if ".experts." in n and n.endswith(".scale")]:
        t[name] = t[name].float().bfloat16()


def as_f4(t: dict) -> None:
    for name in [n for n in t if ".experts." in n and n.endswith(".weight")]:
        t[name] = t[name].view(torch.float4_e2m1fn_x2)


@pytest.mark.parametrize("change", [hugging_face, bf16_scales, as_f4], ids=["H13 names", "H14 scales", "H14 F4"])
def test_what_the_loader_takes_is_taken(change, tmp_path, seed):
    folder = write_checkpoint(tmp_path / "ck", make_state(seed), CONFIG)
    before = Checkpoint.open(folder).layer_experts("layers.1")
    edit_tensors(folder, change)
    edit_config(folder, expert_dtype=...)
    validate_checkpoint(folder)
    read_model(str(folder)).require_complete()
    for given, read in zip(before, Checkpoint.open(folder).layer_experts("layers.1"), strict=True):
        assert torch.equal(given, read)
    assert inspect_checkpoint(folder).scales.num_rows == 2 * 4 * (64 + 64 + 128)


def test_a_git_lfs_pointer_is_named(tmp_path):
    folder = write_checkpoint(tmp_path / "ck", make_state(0), CONFIG)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    next(folder.glob("*.safetensors")).write_text(pointer)
    with pytest.raises(Refusal, match="safetensors is a Git LFS pointer"):
        validate_checkpoint(folder)
    (folder / "config.json").write_text(pointer)
    with pytest.raises(Refusal, match="config.json is a Git LFS pointer"):
        read_model(str(folder))


def test_the_cached_revision_is_the_one_checked_offline(offline):  # H16
    cached(offline, "main", "a")
    snapshot = cached(offline, "exp", "b", n_routed_experts=8)
    loaded = read_model("org/name", revision="exp")
    assert loaded.facts.num_experts == 8 and loaded.folder == snapshot
    assert read_model("org/name").facts.num_experts == 4
    assert read_model("org/name", revision="b" * 40).facts.num_experts == 8
    loaded.require_complete()
    shard = next(snapshot.glob("*.safetensors"))
    shard.resolve().unlink()  # a link whose blob is gone
    with pytest.raises(Refusal, match="does not exist: fetch the missing file"):
        read_model("org/name", revision="exp")
    with pytest.raises(Refusal, match="org/name at revision other: its config.json cannot be fetched"):
        read_model("org/name", revision="other")


def test_weights_come_from_the_download_folder_and_config_json_from_the_usual_cache(offline, tmp_path, monkeypatch):
    """As SGLang reads them: two caches."""
    weights = cached(tmp_path / "weights", "main", "a")
    with pytest.raises(Refusal, match=f"SGLang takes only weights from --download-dir .*set HF_HUB_CACHE={tmp_path}/weights"):
        read_model("org/name", download_dir=str(tmp_path / "weights"))
    config = cached(offline, "main", "a")
    for file in config.glob("*.safetensors"):
        file.unlink()
    assert read_model("org/name", download_dir=str(tmp_path / "weights")).folder == weights
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert read_model("org/name", download_dir=str(tmp_path / "nowhere")).folder is None, "SGLang would fetch them"


def test_modelscope_s_cache_is_where_sglang_looks(tmp_path, monkeypatch):
    pytest.importorskip("modelscope")
    monkeypatch.setenv("SGLANG_USE_MODELSCOPE", "true")
    folder = write_checkpoint(tmp_path / "org" / "name", make_state(0), CONFIG)
    loaded = read_model("org/name", download_dir=str(tmp_path))
    assert loaded.facts.num_experts == 4 and loaded.folder == folder
    loaded.require_complete()
    edit_tensors(folder, lambda t: t.pop("norm.weight"))
    with pytest.raises(Refusal, match="norm.weight is missing"):
        read_model("org/name", download_dir=str(tmp_path)).require_complete()


V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 256, "moe_intermediate_size": 128,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4, "first_k_dense_replace": 3, "vocab_size": 16,
    "num_nextn_predict_layers": 1, "routed_scaling_factor": 2.5,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def test_v3_in_fp8_is_read(tmp_path):
    state = {"model.embed_tokens.weight": torch.zeros(16, 256), "lm_head.weight": torch.zeros(16, 256)}
    state["model.norm.weight"] = torch.zeros(256)
    for layer in (3, 4):
        state[f"model.layers.{layer}.mlp.gate.weight"] = torch.zeros(4, 256)
        for expert in range(4):
            for word, rows, cols in (("gate", 128, 256), ("up", 128, 256), ("down", 256, 128)):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{word}_proj.weight"
                state[name] = torch.zeros(rows, cols, dtype=torch.float8_e4m3fn)
                state[name + "_scale_inv"] = torch.ones(rows // 128, cols // 128)
    save_file(state, tmp_path / "model.safetensors")
    put_config(tmp_path, V3)
    found = inspect_checkpoint(tmp_path)
    assert found.facts.expert_dtype == "fp8" and found.facts.dense_layers == (0, 1, 2) and found.scales is None
    assert found.expert_layers == ("layers.3", "mtp.0") and found.facts.swiglu_limit is None
    assert "kernel fp8_mega    can serve it" in report_lines(found)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 10**30}, "num_hidden_layers=1000"),
        ({"num_experts_per_tok": -1}, "num_experts_per_tok=-1"),
        ({"quantization_config": []}, r"quantization_config=\[\]"),
        ({"quantization_config": {"quant_method": 8}}, "quant_method=8"),
        ({"quantization_config": {"weight_block_size": [128]}}, r"weight_block_size=\[128\]"),
        ({"architectures": None}, "no architectures"),
        ({"swiglu_limit": float("nan")}, "swiglu_limit=nan"),
        ({"hidden_size": "x" * 10_000}, "hidden_size="),
        ({"text_config": 3}, "text_config=3"),
        ({"dspark_n_routed_experts": 1, "num_nextn_predict_layers": 1}, "num_experts_per_tok 2 is above dspark_n_routed"),
        ({"engram_layer_ids": [1], "engram_num_embeddings": []}, "1 engram_layer_ids but 0 engram_num_embeddings"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_values_that_make_no_sense(changes, sentence):
    with pytest.raises(Refusal, match=sentence) as caught:
        facts_of(flatten({**CONFIG, **changes}, Path("config.json")), "config.json")
    assert len(str(caught.value)) < 300


def test_f4_headers_count_values(tmp_path):
    """The library writes torch's packed type with doubled columns; both spellings of the header are what the check expects."""
    folder = write_checkpoint(tmp_path / "ck", make_state(0), CONFIG)
    edit_tensors(folder, as_f4)
    raw = (folder / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["layers.0.ffn.experts.0.w1.weight"] | {"data_offsets": 0} == {
        "dtype": "F4",
        "shape": [64, 128],
        "data_offsets": 0,
    }
    assert load_file(folder / "model.safetensors")["layers.0.ffn.experts.0.w1.weight"].shape == (64, 64)
