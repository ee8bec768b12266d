"""Writes the GPU model with a larger hidden size that computes the same function: for what takes real models' sizes only.

\b
    python -m hopper_moe.eval.gpu_model.widen eval/data/gpu_dsv4 /tmp/wide --copies 16

DeepEP's low-latency mode, for one, moves rows of 2048 values and more. Every hidden vector h becomes its copies side by side:
what writes one writes the copies, what reads one multiplies each by 1 / copies. That is a change of exponents, so nothing is
rounded, and means of squares, clamps and the largest value of a row stay what they were.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import click
import torch

from hopper_moe.kernels.benchmarks.options import RefusingCommand
from hopper_moe.quantization.checkpoint import Checkpoint, write_stored
from hopper_moe.quantization.errors import Refusal

_READS = re.compile(
    r"^(head|.*\.(w1|w3|gate|wq_a|wkv|wgate|weights_proj))\.(weight|scale)$|^(.*\.)?hc_(head|attn|ffn)_fn$"
)  # [.., hidden]; hyper-connections read all streams, one after the other
_WRITES = re.compile(r"\.(w2|wo_b)\.(weight|scale)$")  # [hidden, ..]
_HOLDS = re.compile(r"^(embed|norm|.*\.(attn_norm|ffn_norm))\.weight$")  # [.., hidden]


def widened(name: str, tensor: torch.Tensor, copies: int, streams: int) -> torch.Tensor:
    """The tensor of the wide model. `streams`: of the hyper-connections. Raises `Refusal` where an exponent is too small."""
    if "hc_" in name and _READS.match(name):
        return torch.cat([tensor.unflatten(-1, (streams, -1)) / copies] * copies, -1).flatten(-2)
    values = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # codes and exponents
    if _WRITES.search(name):
        return torch.cat([values] * copies, 0).view(tensor.dtype)
    if _HOLDS.match(name):
        return torch.cat([values] * copies, -1)
    if not _READS.match(name):
        return tensor
    if name.endswith(".scale"):
        values = _divided(name, values, copies)
    elif tensor.element_size() > 1:
        values = values / copies
    return torch.cat([values] * copies, -1).view(tensor.dtype)


def _divided(name: str, exponents: torch.Tensor, copies: int) -> torch.Tensor:
    """Of UE8M0 scales."""
    octaves, least = int(math.log2(copies)), int(exponents.min())
    if least < octaves:
        raise Refusal(f"{name} holds the scale 2^{least - 127}, which {copies} copies would make too small: give fewer.")
    return exponents - octaves


@click.command(cls=RefusingCommand, help=__doc__)
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--copies", default=16, show_default=True, type=click.IntRange(2, 1024), help="A power of two.")
def main(model: Path, out: Path, copies: int) -> None:
    if copies & (copies - 1):
        raise Refusal(f"--copies {copies} is no power of two, so that weights would have to be rounded: give 2, 4, 8, 16, ...")
    config = json.loads((model / "config.json").read_text())
    checkpoint = Checkpoint.open(model)
    tensors = {name: widened(name, checkpoint.load(name), copies, config["hc_mult"]) for name in checkpoint.tensors}
    write_stored(out, tensors, {**config, "hidden_size": copies * config["hidden_size"]}, tokenizer_dir=model)
    click.echo(f"{out}: hidden_size {copies * config['hidden_size']}")


if __name__ == "__main__":
    main()
