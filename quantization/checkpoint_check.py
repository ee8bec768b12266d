"""Is a folder a whole checkpoint whose experts SGLang would load? Headers and expert scales are read, no weights, no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hopper_moe.quantization import layout
from hopper_moe.quantization.checkpoint_files import TensorInfo, read_headers
from hopper_moe.quantization.checkpoint_names import EXPERT_TENSOR, PROJECTIONS, expert_tensor, original_name
from hopper_moe.quantization.config_values import V4_MODEL_TYPES, read_config
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.model_facts import ModelFacts, block_size_refusal, facts_of, stored_dtype

_FP4_WEIGHTS, _FP4_SCALES = ("I8", "U8", "F4"), ("F8_E8M0", "U8", "F32", "BF16")
_FP8_WEIGHTS, _FP8_SCALES = ("F8_E4M3",), ("F32", "F8_E8M0")
# Copied by value into float parameters, so bytes without a type would become wrong numbers.
_FLOATS = ("F32", "BF16", "F16", "F64", "F8_E8M0", "F8_E4M3", "F8_E5M2")
_HIDDEN_NORMS = (".attn_norm.weight", ".ffn_norm.weight")
_ENGRAM_TABLE = ".engram.embed."
# In every layer of DeepSeek-V4 and V4.1: where one layer has it, all have it.
_IN_EVERY_LAYER = (
    *("attn_norm.weight", "ffn_norm.weight", "attn.wq_a.weight", "attn.wq_b.weight"),
    *("attn.wo_a.weight", "attn.wo_b.weight", "attn.q_norm.weight", "attn.attn_sink"),
    *(f"ffn.shared_experts.{projection}.weight" for projection in PROJECTIONS),
)


def validate_checkpoint(path: str | Path, *, for_cuda_kernel: bool = False, progress: bool = False) -> None:
    """Raises Refusal, one sentence naming tensor, expert and value, for the first thing that is wrong; returns if nothing is.

    Args:
        path: the checkpoint folder.
        for_cuda_kernel: also refuse sizes that the packed FP4 kernels cannot run (multiples of 128, top_k up to 16).
        progress: show a bar while scales are read (a large checkpoint has gigabytes of them).
    """
    facts, tensors = read_checkpoint(Path(path))
    layers = check_tensors(facts, tensors)
    if for_cuda_kernel:
        layout.check_shape(facts.hidden_size, facts.intermediate_size, facts.num_experts, facts.top_k)
    if facts.expert_dtype != "fp4":
        return
    scales = [info for layer in layers.values() for name, info in layer.items() if name.endswith(".scale")]
    for scale in tqdm(scales, desc="check scales", unit="tensor", disable=not progress):
        check_scale(scale)


def read_checkpoint(folder: Path) -> tuple[ModelFacts, dict[str, TensorInfo]]:
    """(facts, tensors by original name) of a folder. Raises Refusal for damaged files and for a tensor under two names."""
    config = read_config(folder)
    headers = read_headers(folder)
    facts = facts_of(config, str(folder / "config.json"), stored_dtype(headers))
    return facts, by_original_name(headers, facts.num_layers)


def by_original_name(headers: Mapping[str, TensorInfo], num_layers: int) -> dict[str, TensorInfo]:
    """The tensors under their original names; `TensorInfo.name` keeps the stored one."""
    tensors: dict[str, TensorInfo] = {}
    for name, info in headers.items():
        original = original_name(name, num_layers)
        if original in tensors:
            raise Refusal(f"{name} and {tensors[original].name} are the same tensor stored twice: delete one of them.")
        tensors[original] = info
    return tensors


def check_tensors(facts: ModelFacts, tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The expert tensors, layer by layer; raises Refusal for the first tensor of the model that is not as it must be."""
    check_model_class(facts)
    check_expert_type(facts)
    for info in tensors.values():
        if not info.is_loadable:
            raise Refusal(f"{info.name} is stored as {info.dtype}, which the safetensors library cannot load: convert the file.")
    layers = check_experts(facts, tensors)
    check_other_tensors(facts, tensors)
    return layers


def check_model_class(facts: ModelFacts) -> None:
    """Raises Refusal unless config.json names the classes with which SGLang builds the model and its FP8 layers."""
    if facts.is_v4 and facts.model_type not in V4_MODEL_TYPES:
        raise Refusal(
            f"config.json has model_type={facts.model_type!r} beside {facts.architecture}, but SGLang reads it as one of "
            f"{', '.join(V4_MODEL_TYPES)} only: fetch config.json again."
        )
    if facts.quantization != "fp8":
        raise Refusal(
            f"quantization_config in config.json has quant_method={facts.quantization!r}, but SGLang builds these experts for "
            "quant_method='fp8' only: fetch config.json again, or use `sglang serve`."
        )


def check_expert_type(facts: ModelFacts) -> None:
    """Raises Refusal unless the experts are of a type and of sizes that are served."""
    if facts.expert_dtype not in ("fp4", "fp8"):
        raise Refusal(f"the experts are {facts.expert_dtype}, but only MXFP4 and FP8 experts are served: use `sglang serve`.")
    if (sentence := block_size_refusal(facts)) is not None:
        raise Refusal(sentence)
    for key, value in (("hidden_size", facts.hidden_size), ("moe_intermediate_size", facts.intermediate_size)):
        if facts.expert_dtype == "fp4" and value % layout.MXFP4_GROUP:
            raise Refusal(f"{key} {value} is not a multiple of {layout.MXFP4_GROUP}, the group of an FP4 scale.")


def check_experts(facts: ModelFacts, tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """The expert tensors, layer by layer; raises Refusal for a missing or unknown expert, a wrong shape or type.

    A draft that the folder holds must be whole, but it may be left out.
    """
    layers: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        match = EXPERT_TENSOR.match(name)
        if match is None:
            if ".ffn.experts." in name:
                raise Refusal(f"{info.name} is no tensor of an expert that SGLang loads (w1, w2, w3 with .weight and .scale).")
            continue
        layer, expert, projection, part = match[1], int(match[2]), match[3], match[4]
        number = int(layer.split(".")[1])
        if layer.startswith("layers.") and number >= facts.num_layers:
            raise Refusal(
                f"{info.name} belongs to layer {number}, but config.json has num_hidden_layers {facts.num_layers}: mend "
                "config.json."
            )
        if layer.startswith("layers.") and number in facts.dense_layers:
            raise Refusal(f"{info.name} belongs to layer {number}, which has no experts by config.json: mend config.json.")
        if layer.startswith("mtp.") and number >= (facts.draft.num_layers if facts.draft else 0):
            raise Refusal(
                f"{info.name} belongs to layer {number} of the draft, but config.json has num_hidden_layers {facts.num_layers} "
                f"and {facts.draft.num_layers if facts.draft else 0} draft layers: mend config.json."
            )
        if expert >= experts_of(facts, layer):
            held = experts_of(facts, layer)
            raise Refusal(f"{info.name} belongs to expert {expert}, but by config.json there are {held}: mend config.json.")
        layers[layer][name] = info
        _check_expert_tensor(facts, info, expert, projection, part)
    targets = [f"layers.{number}" for number in range(facts.num_layers) if number not in set(facts.dense_layers)]
    for layer in dict.fromkeys([*targets, *layers]):
        _check_complete(layer, layers.get(layer, {}), experts_of(facts, layer))
    return dict(layers)


def experts_of(facts: ModelFacts, layer: str) -> int:
    """Routed experts of `layer` ("layers.3", "mtp.0")."""
    return facts.draft.num_experts if layer.startswith("mtp.") and facts.draft else facts.num_experts


def _check_expert_tensor(facts: ModelFacts, info: TensorInfo, expert: int, projection: str, part: str) -> None:
    sizes = (facts.intermediate_size, facts.hidden_size)
    rows, cols = sizes[::-1] if projection == "w2" else sizes
    is_fp4, is_weight = facts.expert_dtype == "fp4", part == "weight"
    dtypes: tuple[str, ...]
    if is_fp4:
        dtypes = _FP4_WEIGHTS if is_weight else _FP4_SCALES
        # F4 headers count values, the other types bytes.
        shape = (rows, cols if info.dtype == "F4" else cols // 2) if is_weight else (rows, cols // layout.MXFP4_GROUP)
    else:
        dtypes = _FP8_WEIGHTS if is_weight else _FP8_SCALES
        shape = (rows, cols) if is_weight else (-(-rows // layout.FP8_BLOCK), -(-cols // layout.FP8_BLOCK))
    if info.dtype not in dtypes:
        raise Refusal(
            f"{info.name} of expert {expert} is stored as {info.dtype}, not as {' or '.join(dtypes)}: "
            f"is it an {facts.expert_dtype.upper()} checkpoint?"
        )
    if info.shape != shape:
        raise Refusal(
            f"{info.name} of expert {expert} has shape {list(info.shape)}, but config.json's hidden_size {facts.hidden_size} and "
            f"moe_intermediate_size {facts.intermediate_size} need {list(shape)}."
        )


def _check_complete(layer: str, found: Mapping[str, TensorInfo], num_experts: int) -> None:
    for expert in range(num_experts):
        names = [expert_tensor(layer, expert, projection, part) for projection in PROJECTIONS for part in ("weight", "scale")]
        missing = [name for name in names if name not in found]
        if len(missing) == len(names):
            raise Refusal(f"{layer} has no tensors for expert {expert} of 0..{num_experts - 1}: fetch the missing files.")
        if missing:
            raise Refusal(
                f"{missing[0]} is missing, expert {expert} has {len(names) - len(missing)} of its {len(names)} tensors."
            )


def check_other_tensors(facts: ModelFacts, tensors: Mapping[str, TensorInfo]) -> None:
    """Embedding, head and routers against config.json; what every layer has; every other FP8 weight against its scale grid."""
    for name, shape in _wanted(facts, tensors).items():
        if name not in tensors:
            raise Refusal(f"{name} is missing: fetch the missing files.")
        if tensors[name].shape != shape:
            raise Refusal(f"{tensors[name].name} has shape {list(tensors[name].shape)}, but config.json needs {list(shape)}.")
    for name, info in tensors.items():
        if EXPERT_TENSOR.match(name) or not name.endswith((".weight", ".scale")):
            continue
        weight_name = name.removesuffix("scale") + "weight" if name.endswith("scale") else name
        weight, scale = tensors.get(weight_name), tensors.get(weight_name.removesuffix("weight") + "scale")
        if weight is None:
            raise Refusal(f"{info.name} has no .weight beside it: fetch the missing files.")
        if weight is info and info.dtype not in _FLOATS:
            raise Refusal(
                f"{info.name} is stored as {info.dtype}, but SGLang loads it as numbers of a float type: convert it again."
            )
        if name.endswith(_HIDDEN_NORMS) and info.shape != (facts.hidden_size,):
            raise Refusal(f"{info.name} has shape {list(info.shape)}, but config.json's hidden_size needs {[facts.hidden_size]}.")
        if scale is not None and weight.dtype != "F8_E4M3":
            raise Refusal(
                f"{weight.name} has scales beside it but is stored as {weight.dtype}, not as F8_E4M3: convert it again."
            )
        if weight is info and info.dtype == "F8_E4M3":
            _check_grid(facts, name, info, scale)
    for part in _IN_EVERY_LAYER if facts.is_v4 else ():
        _check_alike([f"layers.{layer}.{part}" for layer in range(facts.num_layers)], tensors)


def _check_alike(names: Sequence[str], tensors: Mapping[str, TensorInfo]) -> None:
    """One part of every layer: all layers have it, or none has; it has one shape throughout."""
    found = [tensors[name] for name in names if name in tensors]
    if found and len(found) < len(names):
        absent = next(name for name in names if name not in tensors)
        raise Refusal(f"{absent} is missing, but other layers have theirs: fetch the missing files.")
    for info in found:
        if info.shape != found[0].shape:
            raise Refusal(
                f"{info.name} has shape {list(info.shape)}, but {found[0].name} has {list(found[0].shape)}: "
                "fetch both files again."
            )


def _wanted(facts: ModelFacts, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    hidden_size = facts.hidden_size
    if facts.vocab_size is None:
        raise Refusal("config.json has no vocab_size, so embedding and head cannot be checked: fetch the file again.")
    vocabulary = (facts.vocab_size, hidden_size)
    wanted: dict[str, tuple[int, ...]] = {"embed.weight": vocabulary, "head.weight": vocabulary, "norm.weight": (hidden_size,)}
    drafts = {name.rsplit(".ffn.", 1)[0] for name in tensors if name.startswith("mtp.") and ".ffn.experts." in name}
    targets = (f"layers.{layer}" for layer in range(facts.num_layers) if layer not in set(facts.dense_layers))
    for layer in (*targets, *sorted(drafts)):
        wanted[f"{layer}.ffn.gate.weight"] = (experts_of(facts, layer), hidden_size)
    return wanted


def _check_grid(facts: ModelFacts, name: str, weight: TensorInfo, scale: TensorInfo | None) -> None:
    if scale is None:
        raise Refusal(f"{weight.name} is E4M3 but has no .scale beside it: fetch the missing files.")
    blocks = (1, layout.MXFP4_GROUP) if _ENGRAM_TABLE in name else facts.weight_block_size or (layout.FP8_BLOCK,) * 2
    if len(weight.shape) != 2:
        raise Refusal(f"{weight.name} is E4M3 {list(weight.shape)}, but an FP8 weight has two dimensions: fetch the file again.")
    grid = tuple(-(-size // block) for size, block in zip(weight.shape, blocks, strict=True))
    if scale.shape != grid or scale.dtype not in _FLOATS:
        raise Refusal(
            f"{scale.name} is {scale.dtype} {list(scale.shape)}, but {weight.name} {list(weight.shape)} needs {list(grid)} "
            "as a float type."
        )


def check_scale(scale: TensorInfo) -> np.ndarray:
    """The scale bytes [rows, groups] of one FP4 expert matrix. Raises Refusal for NaN and, stored as floats, for no power of
    two."""
    data = scale.read_bytes()
    if scale.dtype in ("F32", "BF16"):
        bits = data.view("<u4") if scale.dtype == "F32" else data.view("<u2").astype(np.uint32) << 16
        # A normal power of two has no mantissa bits; 2**-127, the smallest scale, is subnormal: bit 22 alone.
        is_power = ((bits & 0x7FFFFF) == 0) & (bits != 0) & (bits < 0x7F800000) | (bits == 0x400000)
        if not is_power.all():
            position = int(np.argmin(is_power))
            row, group = divmod(position, scale.shape[1])
            raise Refusal(
                f"{_where(scale)} is {bits.view('<f4')[position]} at row {row}, group {group}: "
                "an FP4 scale is a power of two, 2**-127 to 2**127."
            )
        data = (bits >> 23).astype(np.uint8)
    if (data == layout.UE8M0_NAN).any():
        row, group = divmod(int(np.argmax(data == layout.UE8M0_NAN)), scale.shape[1])
        raise Refusal(
            f"{_where(scale)} is byte {layout.UE8M0_NAN} (NaN) at row {row}, group {group}: the file is damaged, fetch it again."
        )
    return data.reshape(scale.shape)


def _where(scale: TensorInfo) -> str:
    parts = scale.name.split(".experts.")
    return f"{scale.name} of expert {parts[1].split('.')[0]}" if len(parts) == 2 else scale.name
