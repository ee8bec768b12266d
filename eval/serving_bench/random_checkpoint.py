"""Write a checkpoint of real DeepSeek-V4 layer shapes with random weights: for measuring and comparing, it says nothing sensible.

\b
    python -m hopper_moe.eval.serving_bench.random_checkpoint CONFIG_DIR OUT_DIR [--mtp] [--seed N]

CONFIG_DIR holds config.json (and a tokenizer, which is copied). Weights are scaled so that activations keep their size from layer
to layer, routers spread tokens evenly, and logits differ clearly; of these `--load-format dummy` gives experts and routers only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from hopper_moe.quantization.checkpoint import write_checkpoint
from hopper_moe.quantization.checkpoint_names import EXPERT_TENSOR, storage, to_original_names
from hopper_moe.quantization.codecs import quantize_fp8_blocks

_LOGIT_STD = 3.0  # about that of a trained language model
_SCALE_BYTES = {4096: (119, 121), 2048: (119, 122)}  # UE8M0: [low, high) for E2M1 rows of that many values, giving std k**-0.5
_NOT_A_LINEAR = ("norm.weight", "hc_", "attn_sink", ".ape", "gate.bias", "tid2eid")


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every unquantised tensor of the model in the original naming, from transformers' model built without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    parsed = type(AutoConfig.for_model("deepseek_v4")).from_dict(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(parsed)
    return {name: tuple(tensor.shape) for name, tensor in to_original_names(model.state_dict()).items()}


def mtp_shapes(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same for the multi-token-prediction layer: attention of a layer without compression, a routed block without hashing."""
    plain, routed = f"layers.{config['compress_ratios'].index(0)}.", f"layers.{config['num_hidden_layers'] - 1}."
    parts = {name: shape for name, shape in shapes.items() if name.startswith(plain) and ".ffn." not in name}
    parts |= {name: shape for name, shape in shapes.items() if name.startswith(routed) and ".ffn." in name}
    hidden_size = config["hidden_size"]
    found = {"mtp.0." + name.split(".", 2)[2]: shape for name, shape in parts.items()}
    found |= {f"mtp.0.{name}.weight": (hidden_size,) for name in ("enorm", "hnorm", "norm")}
    found |= {f"mtp.0.{name}.weight": (hidden_size, hidden_size) for name in ("e_proj", "h_proj")}
    return found | {f"mtp.0.{name}": shape for name, shape in shapes.items() if name.startswith("hc_head_")}


def random_state(
    shapes: dict[str, tuple[int, ...]], num_experts: int, generator: torch.Generator, device: torch.device
) -> dict[str, torch.Tensor]:
    """Random tensors as `write_checkpoint` takes them; experts come as FP4 bytes with scales already."""
    state: dict[str, torch.Tensor] = {}

    def normal(shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device) * std  # stays there: quantising is faster on a GPU

    for name, shape in shapes.items():
        if EXPERT_TENSOR.match(name):
            rows, values = shape
            low, high = _SCALE_BYTES.get(values, (118, 121))
            weight = torch.randint(256, (rows, values // 2), generator=generator, device=device, dtype=torch.uint8)
            scale = torch.randint(low, high, (rows, values // 32), generator=generator, device=device, dtype=torch.uint8)
            state[name] = weight.cpu().view(torch.int8)
            state[name.removesuffix("weight") + "scale"] = scale.cpu().view(torch.float8_e8m0fnu)
        elif name.endswith("tid2eid"):
            scores = torch.rand(shape[0], num_experts, generator=generator, device=device)
            state[name] = scores.topk(shape[1]).indices.cpu()
        elif name.endswith(("norm.weight", "_scale")):
            state[name] = torch.ones(shape)
        elif any(part in name for part in _NOT_A_LINEAR):
            state[name] = normal(shape, 0.02)
        else:
            std = {"embed.weight": 1.0, "head.weight": _LOGIT_STD * shape[1] ** -0.5}.get(name, shape[-1] ** -0.5)
            state[name] = normal(shape, std)
            if name.startswith(("mtp.0.e_proj", "mtp.0.h_proj")) and storage(name) != "fp8":
                weight, scale = quantize_fp8_blocks(state[name])
                state[name], state[name.removesuffix("weight") + "scale"] = weight, scale.view(torch.float8_e8m0fnu)
    return state


@click.command(help=__doc__)
@click.argument("config_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--mtp", is_flag=True, help="With a multi-token-prediction layer, for --speculative-algorithm EAGLE.")
@click.option("--seed", default=0, show_default=True)
def main(config_dir: Path, out_dir: Path, mtp: bool, seed: int) -> None:
    config = json.loads((config_dir / "config.json").read_text()) | {"num_nextn_predict_layers": int(mtp)}
    shapes = tensor_shapes(config)
    if mtp:
        shapes |= mtp_shapes(config, shapes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(seed)
    state = random_state(shapes, config["n_routed_experts"], generator, device)
    write_checkpoint(out_dir, state, config, tokenizer_dir=config_dir)
    size = sum(file.stat().st_size for file in out_dir.iterdir())
    click.echo(f"{len(state)} tensors, {size / 2**30:.2f} GiB in {out_dir}, seed {seed}")


if __name__ == "__main__":
    main()
