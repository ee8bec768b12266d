"""Write and read small checkpoints in the original DeepSeek-V4 naming and types. `checkpoint_check` validates them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from hopper_moe.quantization.checkpoint_check import experts_of, read_checkpoint, validate_checkpoint
from hopper_moe.quantization.checkpoint_files import INDEX, TensorInfo
from hopper_moe.quantization.checkpoint_names import QUANTIZATION_CONFIG, expert_tensor, storage
from hopper_moe.quantization.codecs import quantize_fp8_blocks, quantize_mxfp4
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.model_facts import ModelFacts

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template*",
    "merges.txt",
    "vocab.json",
)


def write_checkpoint(
    path: str | Path,
    state: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    **how: Any,
) -> Path:
    """Write a checkpoint folder and validate it with the same rules as any other checkpoint.

    Args:
        path: folder to create; it must not hold weights yet.
        state: tensors by original name (`checkpoint_names.to_original_names`). Float weights of experts become MXFP4 (bytes and
            UE8M0 scales), of attention and shared-expert linears E4M3 in 128 x 128 blocks with UE8M0 scales, the rest BF16, FP32
            (norms, hyper-connections, sinks, biases) or int64 (hash routing). A weight with its `.scale` is kept as it is.
        config: the content of config.json (`checkpoint_names.original_config`).
        how: see `write_stored`.

    Raises:
        Refusal: the folder holds weights, the config declares other types, or the checkpoint would not be valid.
    """
    if config.get("expert_dtype") != "fp4" or config.get("quantization_config") != QUANTIZATION_CONFIG:
        raise Refusal(
            f"config says expert_dtype={config.get('expert_dtype')!r}, quantization_config="
            f"{config.get('quantization_config')!r}: checkpoints written here have expert_dtype='fp4' and quantization_config="
            f"{QUANTIZATION_CONFIG}."
        )
    return write_stored(path, _stored(state), config, **how)


def write_stored(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    tokenizer_dir: str | Path | None = None,
    max_shard_bytes: int = 4 << 30,
) -> Path:
    """The same for tensors that already have the names and types of the checkpoint, of any supported model; on the CPU.

    `tokenizer_dir`: folder whose tokenizer files and chat template are copied in.
    """
    folder = Path(path)
    if any(folder.glob("*.safetensors")):
        raise Refusal(f"{folder} already holds .safetensors files: give a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
    _write_shards(folder, tensors, max_shard_bytes)
    if tokenizer_dir is not None:
        for pattern in _TOKENIZER_FILES:
            for file in Path(tokenizer_dir).glob(pattern):
                shutil.copy(file, folder / file.name)
    validate_checkpoint(folder)
    return folder


def _stored(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the types of the checkpoint, scales included."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tqdm(state.items(), desc="quantise", unit="tensor", leave=False):
        kind, scale_name = storage(name), name.removesuffix("weight") + "scale"
        tensor = tensor.detach()
        if name.endswith(".scale") or scale_name in state:
            stored[name] = tensor.contiguous().cpu()
        elif kind == "mxfp4":
            packed, scale = quantize_mxfp4(tensor)
            stored[name], stored[scale_name] = packed.view(torch.int8).cpu(), scale.view(torch.float8_e8m0fnu).cpu()
        elif kind == "fp8":
            q, scale = quantize_fp8_blocks(tensor)
            stored[name], stored[scale_name] = q.cpu(), scale.view(torch.float8_e8m0fnu).cpu()
        else:
            dtype = {"fp32": torch.float32, "integer": torch.int64, "bf16": torch.bfloat16}[kind]
            stored[name] = tensor.to(dtype).contiguous().cpu()
    return stored


def _write_shards(folder: Path, tensors: Mapping[str, torch.Tensor], max_shard_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = total = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor.clone() if tensor.untyped_storage().nbytes() != size else tensor
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder opened for reading: facts and headers by original name. Tensors are read on demand."""

    folder: Path
    facts: ModelFacts
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Reads config.json and the headers. Raises Refusal if the files are damaged (run `validate_checkpoint` for the rest)."""
        folder = Path(path)
        return cls(folder, *read_checkpoint(folder))

    def load(self, name: str) -> torch.Tensor:
        """One tensor as stored, on the CPU. Raises Refusal if there is none of that original name."""
        if name not in self.tensors:
            raise Refusal(f"{self.folder} has no tensor {name}: check the name against `hopper-moe checkpoint inspect`.")
        with safe_open(self.tensors[name].file, "pt") as reader:
            return reader.get_tensor(self.tensors[name].name)

    def layer_experts(self, layer: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(w13, w13_scale, w2, w2_scale) of `layer` ("layers.3"), every expert, as `pack_experts` takes it: uint8, `[w1; w3]`."""

        def stack(projection: str, part: str) -> torch.Tensor:
            names = [expert_tensor(layer, e, projection, part) for e in range(experts_of(self.facts, layer))]
            return torch.stack([_bytes(self.load(name)) for name in names])

        w13 = torch.cat((stack("w1", "weight"), stack("w3", "weight")), 1)
        w13_scale = torch.cat((stack("w1", "scale"), stack("w3", "scale")), 1)
        return w13, w13_scale, stack("w2", "weight"), stack("w2", "scale")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes unchanged; float scales, which `validate_checkpoint` has found to be powers of two, as UE8M0."""
    if tensor.dtype in (torch.float32, torch.bfloat16):
        return ((tensor.float().view(torch.int32) >> 23) & 255).to(torch.uint8)
    return tensor.view(torch.uint8)
