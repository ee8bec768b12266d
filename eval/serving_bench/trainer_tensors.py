"""The tensors of a checkpoint as a trainer sends them: on its GPU, in buckets, as handles that the server's ranks open."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hopper_moe.quantization.checkpoint_names import EXPERT_TENSOR
from hopper_moe.quantization.errors import Refusal

Named = tuple[str, torch.Tensor]
Tensors = Mapping[str, torch.Tensor]

_LAYER = re.compile(r"((?:layers|mtp)\.\d+)\.")


def read(folder: Path, device: torch.device | str) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files in `folder`, by its name there. Raises `Refusal` where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise Refusal(f"{folder} holds no .safetensors files: give the folder of a checkpoint.")
    return {name: tensor for file in files for name, tensor in load_file(file, device=str(device)).items()}


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def experts_of(tensors: Tensors, layer: int, expert: int | None = None) -> dict[str, torch.Tensor]:
    """The routed experts' tensors of one layer, or of one of its experts. Raises `Refusal` where there are none."""
    matches = ((name, EXPERT_TENSOR.match(name)) for name in tensors)
    of_layer = [(name, match[2]) for name, match in matches if match and match[1] == f"layers.{layer}"]
    found = {name: tensors[name] for name, number in of_layer if expert is None or number == str(expert)}
    if not found:
        raise Refusal(f"the checkpoint has no experts.{'*' if expert is None else expert} in layers.{layer}: give another layer.")
    return found


def experts_of_all(tensors: Tensors, num_layers: int, shift: int) -> dict[str, torch.Tensor]:
    """Routed experts for `num_layers` layers from a checkpoint of fewer: its layers in turn, layer 0 gets those of layer `shift`.

    No memory beside the checkpoint's. Raises `Refusal` where it has no experts.
    """
    matches = [match[1] for match in map(EXPERT_TENSOR.match, tensors) if match]
    present = sorted({int(part.removeprefix("layers.")) for part in matches if part.startswith("layers.")})
    if not present:
        raise Refusal("the checkpoint has no routed experts in layers.*: give one that has.")
    given = [experts_of(tensors, layer) for layer in present]
    return {
        _LAYER.sub(f"layers.{layer}.", name, count=1): tensor
        for layer in range(num_layers)
        for name, tensor in given[(layer + shift) % len(given)].items()
    }


def without(tensors: Tensors, other: Iterable[str]) -> dict[str, torch.Tensor]:
    dropped = set(other)
    return {name: tensor for name, tensor in tensors.items() if name not in dropped}


def buckets(tensors: Tensors, max_bytes: int) -> list[list[Named]]:
    """Parts of at most `max_bytes` (or one group), in order.

    The tensors of a layer beside its experts are one group: SGLang fuses some of them while it loads and needs both in one call.
    Each expert tensor is a group of its own, so a bucket may end inside an expert.
    """
    parts: list[list[Named]] = []
    filled = 0
    for group in _groups(tensors):
        size = num_bytes(tensor for _, tensor in group)
        if not parts or filled + size > max_bytes:
            parts.append([])
            filled = 0
        parts[-1] += group
        filled += size
    return parts


def layers(tensors: Tensors) -> list[list[Named]]:
    """The tensors of each layer, in the checkpoint's order of layers, and those of no layer last."""
    found: dict[str, list[Named]] = {}
    for name, tensor in tensors.items():
        layer = _LAYER.match(name)
        found.setdefault(layer[1] if layer else "", []).append((name, tensor))
    rest = found.pop("", [])
    return [*found.values(), *([rest] if rest else [])]


def _groups(tensors: Tensors) -> list[list[Named]]:
    found: dict[str, list[Named]] = {}
    for name, tensor in tensors.items():
        layer = _LAYER.match(name)
        key = name if EXPERT_TENSOR.match(name) or not layer else layer[1]
        found.setdefault(key, []).append((name, tensor))
    return list(found.values())


def aligned(named: Sequence[Named]) -> list[Named]:
    """Widest types first: in a flattened bucket every tensor must begin at a multiple of its type's size."""
    return sorted(named, key=lambda pair: -pair[1].element_size())


def serialized(named: Sequence[Named], flat: bool, ranks: int) -> list[str]:
    """The entries of `serialized_named_tensors`, one for each rank: base64 of handles of CUDA memory in this process.

    Rank r gets tensors on GPU r, as from a trainer whose ranks sit on the server's GPUs: SGLang copies a flattened bucket from
    where it lies, which from another GPU ended a server with --enable-memory-saver ("Unable to access operand in the specified
    context"). The tensors must live until the call is answered. From then on this process cannot pickle CPU tensors: SGLang's
    patch, without which ranks with other visible GPUs would open the wrong one, takes every tensor's arguments for a CUDA one's.
    """
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    torch.cuda.ipc_collect()  # memory of earlier calls, which the server has let go
    monkey_patch_torch_reductions()
    given = flattened(named) if flat else list(named)
    return [MultiprocessingSerializer.serialize(on_gpu(rank, given), output_str=True) for rank in range(ranks)]


def on_gpu(rank: int, given: dict[str, Any] | list[Named]) -> dict[str, Any] | list[Named]:
    """The same with tensors on GPU `rank`; where this process sees only one, as they are."""
    if torch.cuda.device_count() < 2:
        return given
    device = torch.device("cuda", rank)
    if isinstance(given, dict):
        return {**given, "flattened_tensor": given["flattened_tensor"].to(device)}
    return [(name, tensor.to(device)) for name, tensor in given]


def flattened(named: Sequence[Named]) -> dict[str, Any]:
    """What `load_format="flattened_bucket"` takes."""
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    bucket = FlattenedTensorBucket(named_tensors=aligned(named))
    return {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
