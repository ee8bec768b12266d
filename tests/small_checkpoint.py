"""A complete DeepSeek-V4 checkpoint of a few kilobytes, and a way to write damaged ones."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hopper_moe.quantization.checkpoint import write_checkpoint
from hopper_moe.quantization.checkpoint_names import QUANTIZATION_CONFIG

CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "hidden_size": 128,
    "moe_intermediate_size": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "expert_dtype": "fp4",
    "quantization_config": QUANTIZATION_CONFIG,
}


def make_state(seed: int, **config: int) -> dict[str, torch.Tensor]:
    """Float tensors by original name: experts, routers, one FP8 linear a layer, norms, embedding and head."""
    sizes = {**CONFIG, **config}
    hidden_size, intermediate_size = sizes["hidden_size"], sizes["moe_intermediate_size"]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    state = {"embed.weight": normal(sizes["vocab_size"], hidden_size), "head.weight": normal(sizes["vocab_size"], hidden_size)}
    state["norm.weight"] = normal(hidden_size) + 1
    for layer in range(sizes["num_hidden_layers"]):
        state[f"layers.{layer}.attn.wq_a.weight"] = normal(200, hidden_size)
        state[f"layers.{layer}.attn_norm.weight"] = normal(hidden_size)
        state[f"layers.{layer}.ffn.gate.weight"] = normal(sizes["n_routed_experts"], hidden_size)
        for expert in range(sizes["n_routed_experts"]):
            prefix = f"layers.{layer}.ffn.experts.{expert}"
            state[f"{prefix}.w1.weight"] = normal(intermediate_size, hidden_size)
            state[f"{prefix}.w3.weight"] = normal(intermediate_size, hidden_size)
            state[f"{prefix}.w2.weight"] = normal(hidden_size, intermediate_size)
    return state


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Lets `change` edit the dict of all stored tensors and writes them back as one file without an index."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    change(tensors)
    for file in [*files, folder / "model.safetensors.index.json"]:
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    """Changes entries of config.json; `...` removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def cached(cache: Path, revision: str, commit: str, **sizes: int) -> Path:
    """The snapshot of org/name at a revision, as Hugging Face's library stores it: files are links to blobs."""
    repository = cache / "models--org--name"
    snapshot = write_checkpoint(repository / "snapshots" / (commit * 40), make_state(1, **sizes), {**CONFIG, **sizes})
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit * 40)
    (repository / "blobs").mkdir(exist_ok=True)
    for file in list(snapshot.iterdir()):
        blob = repository / "blobs" / f"{commit}{file.name}"
        file.rename(blob)
        file.symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot
