"""`hopper-moe bench accuracy`: how far every kernel is from exact arithmetic, beside the definitions of what it computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click
import torch

from hopper_moe.eval.layer_bench import contenders
from hopper_moe.kernels import reference
from hopper_moe.kernels.benchmarks.options import ListCommand
from hopper_moe.kernels.benchmarks.workload import (
    SHAPES,
    Checkpoint,
    ModelShape,
    gaussian_checkpoint,
    random_routing,
    random_tokens,
)
from hopper_moe.kernels.reference_weights import Fp8BlockExperts, Mxfp4Experts
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.quantization.fp8_blocks import expand_mxfp4

SMALL = "small"
_SHAPES = {**SHAPES, SMALL: ModelShape(1024, 512, 16, 4, 16)}

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def expanded(checkpoint: Checkpoint) -> Fp8BlockExperts:
    """The layer's experts as block-scaled FP8."""
    tensors = []
    for weight, scale in (checkpoint[:2], checkpoint[2:]):
        pairs = [expand_mxfp4(weight[expert], scale[expert]) for expert in range(weight.shape[0])]
        tensors += [torch.stack([pair[0].view(torch.uint8) for pair in pairs]).view(torch.float8_e4m3fn)]
        tensors += [torch.stack([pair[1] for pair in pairs])]
    return Fp8BlockExperts(*tensors)


def references(checkpoint: Checkpoint, shape: ModelShape) -> dict[str, Call]:
    """What each kind of kernel is defined to compute, in plain torch on any device."""
    fp4, fp8, limit = Mxfp4Experts(*checkpoint), expanded(checkpoint), shape.swiglu_limit
    of_fp4, of_fp8 = (partial(reference.moe_layer, experts=experts, swiglu_limit=limit) for experts in (fp4, fp8))
    return {
        "definition of mxfp4_mega": of_fp4,
        "  with FP8 combine": partial(of_fp4, fp8_combine=True),
        "  with FP4 dispatch": partial(of_fp4, fp4=True),
        "definition of fp8_mega": of_fp8,
        "definition of w4a16": partial(reference.w4a16, experts=fp4, swiglu_limit=limit),
    }


@click.command(cls=ListCommand)
@click.option("--shape", "shape_name", type=click.Choice(list(_SHAPES)), help="[default: flash on a GPU, small without]")
@click.option("--tokens", type=int, default=64, show_default=True, help="Rows of the batch.")
@click.option("--kernels", type=click.Choice(contenders.KERNELS), multiple=True, default=contenders.KERNELS, help="Default: all.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights, tokens and routing.")
def main(shape_name: str | None, tokens: int, kernels: tuple[str, ...], seed: int) -> None:
    """Print relative L2, 1 - cosine and the worst token's relative L2 of every kernel against FP64 on the same FP4 weights.

    Weights are normal values rounded to MXFP4 as a checkpoint's are. Without a GPU only the definitions are computed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape_name = shape_name or ("flash" if device == "cuda" else SMALL)
    shape = _SHAPES[shape_name]
    generator = torch.Generator(device).manual_seed(seed)
    checkpoint = gaussian_checkpoint(shape, shape.local_experts, generator, device)
    x = random_tokens(shape, tokens, generator, device)
    given = (x, *random_routing(tokens, shape.local_experts, shape.top_k, "uniform", generator, device))
    want = contenders.exact_result(checkpoint, shape, *given)
    calls = references(checkpoint, shape)
    left_out: dict[str, str] = {}
    if device == "cuda":
        made, left_out = contenders.make_all(
            kernels, checkpoint, ExpertShard.of(shape, tokens, num_experts=shape.local_experts), copies=1
        )
        calls |= {contender.name: contender.runners[0].run for contender in made}
    click.echo(f"{shape_name}: {shape.local_experts} experts, {tokens} tokens, seed {seed}, on {device}, against FP64 arithmetic")
    click.echo(f"{'':28}{'relative L2':>14}{'1 - cosine':>14}{'worst token':>14}")
    for name, call in calls.items():
        relative, cosine, worst = contenders.errors(call(*given), want)
        click.echo(f"{name:28}{relative:14.3e}{1 - cosine:14.3e}{worst:14.3e}")
    for name, reason in left_out.items():
        click.echo(f"{name}: left out, {reason}")
