"""Random damages of checkpoint folders: the check accepts what stock SGLang would serve and refuses the rest in one sentence."""

import dataclasses
import json
import os
import random
import re
import shutil
import struct
import tempfile
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import stock
import torch
from safetensors.torch import save
from stock_checkpoint import problem

from hopper_moe.moe_backends.sglang.config_reader import reader_refusal
from hopper_moe.quantization.checkpoint_check import validate_checkpoint
from hopper_moe.quantization.checkpoint_files import INDEX, TensorInfo
from hopper_moe.quantization.checkpoint_location import ModelSource
from hopper_moe.quantization.config_types import V3_TYPES, V4_TYPES
from hopper_moe.quantization.errors import Refusal

NUM_DAMAGES = 600  # `--cases 2000`: as many as the bar asks for
HIDDEN, INTERMEDIATE, EXPERTS, LAYERS, VOCABULARY = 64, 32, 2, 2, 8
Files = dict[str, bytes]

# What SGLang would serve and we refuse all the same, because the folder contradicts itself. Nothing else may be on this list.
STRICTER = (
    r"holds .* twice",  # one header names a tensor twice: the last one wins in silence
    r"says expert_dtype=",  # config.json against the header
    r"says that .* is in .*, but it is not",  # the index against the files
    r"names files outside of its folder",
    r"holds a name that cannot be printed",
    r"has no weight_map",
    r"belongs to layer \d+, but config.json has num_hidden_layers",  # SGLang would skip the layers that config.json forgets
    r"has (hidden_size|moe_intermediate_size|num_experts_per_tok|num_hidden_layers)=None",  # SGLang takes DeepSeek-V3's
    r"has no (n_routed_experts|vocab_size)",
    r"has \w+=.*, but .* makes sense there",  # a value without meaning in a key that SGLang does not read here
    r"two sizes are needed",  # weight_block_size: SGLang fails when it builds the layers
    r"has scales beside it but is stored as",  # it would be rounded to E4M3 without its scales' meaning
    r"is above dspark_n_routed_experts",
)


def good(rng: random.Random) -> Files:
    """A whole checkpoint in two files with an index."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    state = {"embed.weight": torch.ones(VOCABULARY, HIDDEN), "head.weight": torch.ones(VOCABULARY, HIDDEN)}
    state["norm.weight"] = torch.ones(HIDDEN)
    for layer in range(LAYERS):
        state[f"layers.{layer}.ffn.gate.weight"] = torch.ones(EXPERTS, HIDDEN)
        state[f"layers.{layer}.attn_norm.weight"] = torch.ones(HIDDEN)
        state[f"layers.{layer}.attn.wo_b.weight"] = torch.ones(HIDDEN, 160).to(torch.float8_e4m3fn)
        state[f"layers.{layer}.attn.wo_b.scale"] = torch.ones(1, 2).to(torch.float8_e8m0fnu)
        for expert in range(EXPERTS):
            for word, rows, cols in (("w1", INTERMEDIATE, HIDDEN), ("w3", INTERMEDIATE, HIDDEN), ("w2", HIDDEN, INTERMEDIATE)):
                name = f"layers.{layer}.ffn.experts.{expert}.{word}"
                state[f"{name}.weight"] = torch.randint(-128, 128, (rows, cols // 2), generator=generator, dtype=torch.int8)
                scale = torch.randint(110, 130, (rows, cols // 32), generator=generator, dtype=torch.uint8)
                state[f"{name}.scale"] = scale.view(torch.float8_e8m0fnu)
    changes = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 1,
    }
    config = stock.config_dict(
        **changes, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, num_nextn_predict_layers=0, compress_ratios=[0, 0]
    )
    halves = [dict(list(state.items())[::2]), dict(list(state.items())[1::2])]
    names = [f"model-{number}.safetensors" for number in (1, 2)]
    weight_map = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    files = {name: save(half) for name, half in zip(names, halves, strict=True)}
    return files | {"config.json": json.dumps(config).encode(), INDEX: json.dumps({"weight_map": weight_map}).encode()}


def weights(files: Files) -> list[str]:
    return [name for name in files if name.endswith(".safetensors")]


def flip(rng: random.Random, files: Files) -> None:
    name = rng.choice(list(files))
    data = bytearray(files[name])
    if data:
        last = len(data) if rng.random() < 0.5 else min(len(data), 600)
        data[rng.randrange(last)] = rng.randrange(256)
    files[name] = bytes(data)


def resize(rng: random.Random, files: Files) -> None:
    name = rng.choice(list(files))
    cut = rng.choice((0, 4, 8, rng.randrange(len(files[name]) + 1)))
    files[name] = rng.choice((files[name][:cut], files[name] + b"\0" * rng.randrange(1, 9), b"<html>404</html>", b""))


def remove(rng: random.Random, files: Files) -> None:
    del files[rng.choice(list(files))]


def stray(rng: random.Random, files: Files) -> None:
    name = rng.choice(weights(files) or ["x.safetensors"])
    files[rng.choice(("stray.safetensors", "model-0.safetensors", "consolidated.safetensors"))] = files.get(name, b"")
    if rng.random() < 0.5:
        files.pop(INDEX, None)


JUNK = (
    None,
    0,
    -1,
    1,
    2,
    3,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "64",
    "fp4",
    "fp8",
    [],
    [128, 128],
    [1],
    {},
    {"a": 1},
    True,
)


def edit_config(rng: random.Random, files: Files) -> None:
    config = json.loads(files["config.json"])
    keys = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "num_hidden_layers", "vocab_size")
    keys += ("expert_dtype", "swiglu_limit", "quantization_config", "architectures", "num_nextn_predict_layers", "text_config")
    keys += ("dspark_n_routed_experts", "routed_scaling_factor", "first_k_dense_replace", "moe_layer_freq", "model_type")
    key = rng.choice(keys)
    if rng.random() < 0.2:
        config.pop(key, None)
    elif key == "quantization_config" and rng.random() < 0.7:
        config[key] = dict(config[key]) | {rng.choice(("quant_method", "weight_block_size", "expert_dtype")): rng.choice(JUNK)}
    else:
        config[key] = rng.choice(JUNK)
    files["config.json"] = json.dumps(config).encode()


def nest(rng: random.Random, files: Files) -> None:
    """As DeepSeek-V4.1 publishes it; sometimes under a model_type that SGLang does not flatten."""
    config = json.loads(files["config.json"])
    top = ("architectures", "quantization_config", "torch_dtype", "model_type")
    text = {key: config.pop(key) for key in list(config) if key not in top}
    config |= {"text_config": text, "model_type": rng.choice(("deepseek_v41", "deepseek_v41", "deepseek_v4"))}
    config["architectures"] = rng.choice((["DeepseekV41ForCausalLM"], ["DeepseekV4ForCausalLM"]))
    files["config.json"] = json.dumps(config).encode()


def edit_index(rng: random.Random, files: Files) -> None:
    index = json.loads(files[INDEX])
    name = rng.choice(list(index["weight_map"]))
    change = rng.choice(("drop", "other", "junk", "map", "path", "new"))
    if change == "drop":
        del index["weight_map"][name]
    elif change == "map":
        index = rng.choice(([], {}, {"weight_map": []}, {"weight_map": {}}, None, 3))
    else:
        values = {
            "other": "model-1.safetensors",
            "junk": rng.choice(JUNK),
            "path": "../x.safetensors",
            "new": "model-3.safetensors",
        }
        index["weight_map"][name] = values[change]
    files[INDEX] = json.dumps(index).encode()


def edit_header(rng: random.Random, files: Files) -> None:
    """One entry's type, shape, offsets or name."""
    file = rng.choice(weights(files))
    length = struct.unpack("<Q", files[file][:8])[0]
    header, data = json.loads(files[file][8 : 8 + length]), files[file][8 + length :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry, change = header[name], rng.choice(("dtype", "shape", "offsets", "name", "drop", "junk", "meta", "twice"))
    if change == "dtype":
        entry["dtype"] = rng.choice(("I8", "U8", "F8_E4M3", "F8_E8M0", "I4", "F4", "BF16", 3, None))
    elif change == "shape":
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [-1, 5], [], [10**12, 10**12], "x", [1.0], [True], [*entry["shape"], 1])
        )
    elif change == "offsets":
        entry["data_offsets"] = rng.choice(([0, 1], [5, 1], [-1, 2], [0], None, [0, 10**15], ["a", "b"]))
    elif change == "name":
        header[rename(rng, name)] = header.pop(name)
    elif change == "drop":
        del header[name]
    elif change == "meta":
        header["__metadata__"] = rng.choice((None, {"format": "pt"}, {"a": 1}, "x", []))
    else:
        header[name] = rng.choice(JUNK)
    text = json.dumps(header)
    if change == "twice":
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    files[file] = struct.pack("<Q", len(text.encode())) + text.encode() + data


def rename(rng: random.Random, name: str) -> str:
    return rng.choice(
        (
            "model." + name,
            name.replace(".ffn.", ".mlp.").replace(".w1.", ".gate_proj.").replace(".w2.", ".down_proj."),
            name.replace(".scale", ".weight_scale_inv"),
            name.replace(".scale", ".weight_scale"),
            re.sub(r"experts\.\d+", f"experts.{rng.choice(('9', '01', '-1', 'x', '٣', '1' * 30))}", name),
            re.sub(r"layers\.\d+", f"layers.{rng.choice(('1', '2', '7', '00', 'x'))}", name),
            name.replace("w1", "w4"),
            name.upper(),
            "",
        )
    )


def rename_all(rng: random.Random, files: Files) -> None:
    """Hugging Face names throughout; the index is dropped or follows."""
    words = (
        (".ffn.", ".mlp."),
        (".w1.", ".gate_proj."),
        (".w2.", ".down_proj."),
        (".w3.", ".up_proj."),
        (".attn.", ".self_attn."),
    )
    words += (("attn_norm.", "input_layernorm."), (".scale", ".weight_scale_inv"))
    globals_ = {"embed.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight", "norm.weight": "model.norm.weight"}
    for file in weights(files):
        length = struct.unpack("<Q", files[file][:8])[0]
        header, renamed = json.loads(files[file][8 : 8 + length]), {}
        for name, entry in header.items():
            new = globals_.get(name, name)
            for old, other in words:
                new = new.replace(old, other)
            renamed["model." + new if new.startswith("layers.") else new] = entry
        text = json.dumps(renamed).encode()
        files[file] = struct.pack("<Q", len(text)) + text + files[file][8 + length :]
    files.pop(INDEX, None)


DAMAGES: tuple[Callable[[random.Random, Files], None], ...] = (
    flip, flip, resize, remove, stray, edit_config, edit_config, edit_config, nest, edit_index, edit_header, edit_header,
    rename_all,
)  # fmt: skip


def damaged(rng: random.Random, files: Files) -> tuple[list[str], Files]:
    """The files after one to three damages; one that no longer finds what it changes is left out."""
    files, names = dict(files), []
    for damage in rng.choices(DAMAGES, k=rng.choice((1, 1, 1, 2, 3))):
        try:
            damage(rng, files)
            names.append(damage.__name__)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError, struct.error):
            continue
    return names, files


def verdict(folder: Path) -> str | None:
    """The sentence with which a launch is refused; None: the folder is accepted. Anything but a Refusal fails the test."""
    try:
        validate_checkpoint(folder)
    except Refusal as refusal:
        return str(refusal)
    return reader_refusal(ModelSource(str(folder)))


def difference(said: str | None, stock_s: str | None) -> bool:
    """Whether our sentence is none, or is at odds with what SGLang does."""
    if said is None:
        return stock_s is not None
    is_sentence = "\n" not in said and said[-1] in ".?" and len(said) < 1200
    return not is_sentence or (stock_s is None and not any(re.search(rule, said) for rule in STRICTER))


def test_types_are_those_of_transformers():
    """The tables of `config_types` against the classes with which SGLang reads config.json; strict types only."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

    simple = {int, float, bool, str, list, type(None)}

    def types(config: type) -> dict[str, set[type]]:
        hints = typing.get_type_hints(config, localns={"torch": torch})
        found = {}
        for field in dataclasses.fields(config):
            parts = typing.get_args(hints[field.name]) or (hints[field.name],)
            parts = {typing.get_origin(part) or part for part in parts}
            if parts <= simple and field.name != "architectures":
                found[field.name] = parts
        return found

    v3, v4 = types(DeepseekV3Config), types(DeepseekV4Config)
    assert {key: set(kinds) for key, kinds in V3_TYPES.items()} == v3
    assert {key: set(kinds) for key, kinds in V4_TYPES.items()} == {**v3, **{k: t & v3.get(k, t) for k, t in v4.items()}}


def test_random_damages_are_judged_as_sglang_would(seed, cases, monkeypatch):
    read: list[str] = []
    original = TensorInfo.read_bytes
    monkeypatch.setattr(TensorInfo, "read_bytes", lambda info: read.append(info.name) or original(info))
    counts: Counter[str] = Counter()
    base = good(random.Random(seed))
    num_damages = cases(NUM_DAMAGES)
    differences = []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        for number in range(num_damages):
            rng = random.Random(f"{seed}/{number}")
            names, files = damaged(rng, base) if number else ([], base)
            folder = Path(root, str(number))  # a new one each time: SGLang remembers a config.json by its path
            folder.mkdir()
            for name, data in files.items():
                (folder / name).write_bytes(data)
            said, stock_s = verdict(folder), problem(folder)
            if difference(said, stock_s):
                differences.append(f"damage {number} {names}: we say {said!r}, SGLang {stock_s!r}")
            counts["accepted" if said is None else "refused"] += 1
            shutil.rmtree(folder)
    assert not differences, f"seed {seed}, {len(differences)} differences: " + "\n".join(differences[:10])
    assert counts["accepted"] > num_damages // 20 and counts["refused"] > num_damages // 4, counts
    assert all(name.endswith((".scale", ".weight_scale_inv")) for name in read), "weights were read"
