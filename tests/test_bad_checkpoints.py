"""Damaged and unsuitable checkpoints: each is refused with one sentence, from headers and scales alone."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_checkpoint import CONFIG, edit_config, edit_tensors, make_state

from hopper_moe.quantization.checkpoint import write_checkpoint
from hopper_moe.quantization.checkpoint_check import validate_checkpoint
from hopper_moe.quantization.checkpoint_files import INDEX, TensorInfo
from hopper_moe.quantization.errors import Refusal

W1 = "layers.1.ffn.experts.2.w1"
W2 = "layers.0.ffn.experts.3.w2"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "checkpoint"
    return write_checkpoint(folder, make_state(1), CONFIG, max_shard_bytes=60_000)


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def float_scales(value: float) -> Callable[[dict], None]:
    """Stores the scale of one expert as FP32, one of them `value`."""

    def change(t: dict) -> None:
        wide = torch.full(t[f"{W1}.scale"].shape, 0.25)
        wide[5, 2] = value
        t[f"{W1}.scale"] = wide

    return change


def nan_scale(t: dict) -> None:
    t[f"{W2}.scale"].view(torch.uint8)[7, 1] = 255


def rename(old: str, new: str) -> Callable[[dict], None]:
    return lambda t: t.update({new: t.pop(old)})


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate(folder: Path) -> None:
    file = shards(folder)[1]
    file.write_bytes(file.read_bytes()[:-100])


def second_copy_in_another_file(folder: Path) -> None:
    (folder / INDEX).unlink()
    safetensors.torch.save_file({f"{W1}.scale": torch.zeros(64, 4, dtype=torch.uint8)}, folder / "stray.safetensors")


def rewrite_header(change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = shards(folder)[0]
        raw = file.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = change(raw[8 : 8 + length].decode()).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])

    return apply


def same_name_twice(header: str) -> str:
    entries = json.loads(header)
    name, entry = next((n, e) for n, e in entries.items() if n != "__metadata__")
    return header.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"


def contradict(header: str) -> str:
    return header.replace('"dtype":"BF16"', '"dtype":"F32"', 1)


def index_points_elsewhere(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][f"{W1}.weight"] = shards(folder)[0].name
    (folder / INDEX).write_text(json.dumps(index))


BAD = {
    # the folder and its files
    "no folder": (shutil.rmtree, "is no folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json does not exist"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "a JSON list, not an object"),
    "no weights": (lambda f: [p.unlink() for p in [*shards(f), f / INDEX]], "holds no .safetensors files"),
    "shard missing": (lambda f: shards(f)[1].unlink(), r"model-00002-of-\d+.safetensors is named in .* but does not exist"),
    "shard truncated": (truncate, r"model-00002-of-\d+.safetensors is truncated: .* ends at byte \d+"),
    "shard empty": (lambda f: shards(f)[0].write_bytes(b""), r"no whole safetensors file \(header of 0 bytes in 0\)"),
    "shard is text": (lambda f: shards(f)[0].write_text("<html>404 not found</html>"), "no whole safetensors file"),
    "header damaged": (rewrite_header(lambda h: h[:-5]), "damaged safetensors header"),
    "header names a tensor twice": (rewrite_header(same_name_twice), r"holds \S+ twice"),
    "header contradicts itself": (rewrite_header(contradict), "the header entry of .* contradicts itself"),
    "index without map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "index points elsewhere": (index_points_elsewhere, f"says that {W1}.weight is in model-00001"),
    "name with a line break": (rewrite_header(lambda h: h.replace("layers.0.attn", "layers.0.\\nattn")), "cannot be printed"),
    "half a surrogate pair": (rewrite_header(lambda h: h.replace("layers.0.attn", "\\ud83d")), r"printed \('\\ud83d"),
    "architecture with a line break": (config(architectures=["a\nb"]), "has no architectures, a list that names"),
    "expert_dtype with a line break": (config(expert_dtype="fp\n4"), r"expert_dtype='fp\\n4', but a text"),
    "dtype that torch has not": (config(torch_dtype="bfloat1m"), "has torch_dtype='bfloat1m', but only bfloat16"),
    "float where a whole number belongs": (config(num_attention_heads=6.4), "num_attention_heads=6.4, which stops SGLang's"),
    "tensor in two files": (second_copy_in_another_file, rf"{W1}.scale is stored twice, in \S+ and \S+"),
    # config.json
    "no hidden_size": (config(hidden_size=...), "has hidden_size=None, but a whole number"),
    "hidden_size is text": (config(hidden_size="128"), "has hidden_size='128', but a whole number"),
    "odd hidden_size": (config(hidden_size=100), "hidden_size 100 is not a multiple of 32"),
    "no experts": (config(n_routed_experts=0), "has no n_routed_experts"),
    "top_k above experts": (config(num_experts_per_tok=5), "num_experts_per_tok 5 is above n_routed_experts 4"),
    "experts are not FP4": (config(expert_dtype="fp8"), "says expert_dtype=fp8, but the expert weights are fp4"),
    "negative swiglu_limit": (config(swiglu_limit=-1.0), "has swiglu_limit=-1.0, but only a positive number"),
    "zero routed_scaling_factor": (config(routed_scaling_factor=0), "has routed_scaling_factor=0, but only a positive number"),
    "vocab_size disagrees": (
        config(vocab_size=17),
        r"(embed|head).weight has shape \[16, 128\], but config.json needs \[17, 128\]",
    ),
    "fewer layers in config": (
        config(num_hidden_layers=1),
        "belongs to layer 1, but config.json has num_hidden_layers 1",
    ),
    "more layers in config": (config(num_hidden_layers=3), r"layers.2 has no tensors for expert 0 of 0\.\.3"),
    "fewer experts in config": (config(n_routed_experts=3), "belongs to expert 3, but by config.json there are 3"),
    "more experts in config": (config(n_routed_experts=5), r"layers.0 has no tensors for expert 4 of 0\.\.4"),
    "other intermediate size in config": (config(moe_intermediate_size=32), "moe_intermediate_size 32 need"),
    # experts
    "expert missing": (
        tensors(lambda t: [t.pop(n) for n in list(t) if n.startswith("layers.1.ffn.experts.2.")]),
        "for expert 2 of",
    ),
    "weight missing": (tensors(lambda t: t.pop(f"{W2}.weight")), f"{W2}.weight is missing, expert 3 has 5 of its 6 tensors"),
    "scale missing": (tensors(lambda t: t.pop(f"{W1}.scale")), f"{W1}.scale is missing, expert 2 has 5 of its 6 tensors"),
    "same expert under two names": (
        tensors(lambda t: t.update({f"model.{W1}.weight": t[f"{W1}.weight"].clone()})),
        f"{W1}.weight and .*{W1}.weight are the same tensor stored twice",
    ),
    "unknown expert": (tensors(rename(f"{W1}.weight", W1.replace("experts.2", "experts.9") + ".weight")), "belongs to expert 9"),
    "unknown projection": (
        tensors(rename(f"{W1}.weight", W1.replace("w1", "w4") + ".weight")),
        "w4.weight is no tensor",
    ),
    "weight is BF16": (
        tensors(lambda t: t.update({f"{W1}.weight": torch.zeros(64, 128, dtype=torch.bfloat16)})),
        f"{W1}.weight of expert 2 is stored as BF16, not as I8 or U8 or F4",
    ),
    "scale is FP16": (
        tensors(lambda t: t.update({f"{W1}.scale": torch.ones(64, 4, dtype=torch.float16)})),
        f"{W1}.scale of expert 2 is stored as F16",
    ),
    "weight transposed": (
        tensors(lambda t: t.update({f"{W2}.weight": t[f"{W2}.weight"].T})),
        rf"{W2}.weight of expert 3 has shape \[32, 128\].* need \[128, 32\]",
    ),
    "scale of another group size": (
        tensors(lambda t: t.update({f"{W2}.scale": t[f"{W2}.scale"].view(torch.uint8).repeat(1, 2)})),
        rf"{W2}.scale of expert 3 has shape \[128, 4\].* need \[128, 2\]",
    ),
    "NaN scale": (tensors(nan_scale), rf"{W2}.scale of expert 3 is byte 255 \(NaN\) at row 7, group 1"),
    "scale no power of two": (tensors(float_scales(0.3)), f"{W1}.scale of expert 2 is 0.3[0-9]* at row 5, group 2"),
    "scale zero": (tensors(float_scales(0.0)), f"{W1}.scale of expert 2 is 0.0 at row 5"),
    "scale negative": (tensors(float_scales(-0.5)), f"{W1}.scale of expert 2 is -0.5 at row 5"),
    "scale infinite": (tensors(float_scales(float("inf"))), f"{W1}.scale of expert 2 is inf at row 5"),
    "scale below UE8M0": (tensors(float_scales(2.0**-130)), f"{W1}.scale of expert 2 is .*e-40 at row 5"),
    # the rest of the model
    "router missing": (tensors(lambda t: t.pop("layers.1.ffn.gate.weight")), "layers.1.ffn.gate.weight is missing"),
    "router of another size": (
        tensors(lambda t: t.update({"layers.0.ffn.gate.weight": torch.zeros(8, 128)})),
        r"layers.0.ffn.gate.weight has shape \[8, 128\], but config.json needs \[4, 128\]",
    ),
    "FP8 weight without scale": (tensors(lambda t: t.pop("layers.0.attn.wq_a.scale")), "wq_a.weight is E4M3 but has no .scale"),
    "FP8 scale without weight": (tensors(lambda t: t.pop("layers.0.attn.wq_a.weight")), "wq_a.scale has no .weight beside it"),
    "FP8 scale grid": (
        tensors(lambda t: t.update({"layers.0.attn.wq_a.scale": torch.zeros(1, 1, dtype=torch.uint8)})),
        r"wq_a.scale is U8 \[1, 1\], but layers.0.attn.wq_a.weight \[200, 128\] needs \[2, 1\]",
    ),
    "norm of another size": (
        tensors(lambda t: t.update({"layers.0.attn_norm.weight": torch.ones(128, 1)})),
        r"layers.0.attn_norm.weight has shape \[128, 1\], but config.json's hidden_size needs \[128\]",
    ),
    "norm stored as integers": (
        tensors(lambda t: t.update({"layers.0.attn_norm.weight": torch.ones(128, dtype=torch.uint8)})),
        "layers.0.attn_norm.weight is stored as U8",
    ),
    "a layer's linear of another size": (
        tensors(
            lambda t: t.update(
                {
                    "layers.1.attn.wq_a.weight": t["layers.1.attn.wq_a.weight"][:100],
                    "layers.1.attn.wq_a.scale": t["layers.1.attn.wq_a.scale"][:1],
                }
            )
        ),
        r"layers.1.attn.wq_a.weight has shape \[100, 128\], but layers.0.attn.wq_a.weight has \[200, 128\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_with_one_sentence_and_nothing_loaded(name, good, tmp_path, monkeypatch):
    damage, sentence = BAD[name]
    folder = tmp_path / "checkpoint"
    shutil.copytree(good, folder)
    damage(folder)
    read: list[str] = []
    original = TensorInfo.read_bytes
    monkeypatch.setattr(TensorInfo, "read_bytes", lambda info: read.append(info.name) or original(info))
    with pytest.raises(Refusal, match=sentence) as caught:
        validate_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?")) and len(message) < 400, message
    assert all(tensor.endswith(".scale") for tensor in read), f"weights were read: {read}"


def test_the_undamaged_checkpoint_passes(good):
    validate_checkpoint(good)


def test_float_scales_that_are_powers_of_two_pass(good, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(good, folder)
    edit_tensors(folder, float_scales(2.0**-127))
    validate_checkpoint(folder)


def test_sizes_only_matter_to_the_cuda_kernel_when_asked(good, tmp_path):
    with pytest.raises(Refusal, match="intermediate_size 64 is not a positive multiple of 128"):
        validate_checkpoint(good, for_cuda_kernel=True)
    sizes = {"moe_intermediate_size": 128}
    folder = write_checkpoint(tmp_path / "large", make_state(1, **sizes), {**CONFIG, **sizes})
    validate_checkpoint(folder, for_cuda_kernel=True)
