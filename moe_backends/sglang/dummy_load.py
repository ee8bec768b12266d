"""`--load-format dummy`: random experts and routers in place of what SGLang makes up.

SGLang's `initialize_dummy_weights` leaves integer parameters as they are, so packed FP4 weights are whatever lay in memory, and
fills every float parameter with small uniform numbers of one seed, scales with 1. Its correction biases of 1e-3 then outweigh
the logits (norm weights and gate are 1e-3 too): with the sizes of V4-Flash 11 of 256 experts get tokens, the same ones in every
layer, and four of them get all. Its hash tables give a token neighbouring experts, which one rank holds.

Experts go through SGLang's weight loader like those of a checkpoint, so that it cuts the slices and copies the redundant ones,
and are checked and counted on arrival. Everything else keeps what SGLang made up.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from hopper_moe.moe_backends.env import settings
from hopper_moe.moe_backends.env_table import DUMMY_ROUTING
from hopper_moe.quantization.random_experts import generator, random_matrix
from hopper_moe.quantization.random_routing import gate_weight, hash_table
from hopper_moe.quantization.sglang_checks import CHECKPOINT_PARAMETERS

if TYPE_CHECKING:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

logger = logging.getLogger("hopper_moe")

SEED = 1234  # also that of SGLang's own fill
_STOCK_BOUND = 1e-3
_INPUT_RMS = _STOCK_BOUND / 3**0.5  # of a gate's input: the norm weights in front of it are uniform up to the bound


def fill(original: Callable[..., None], model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """Around `initialize_dummy_weights`: SGLang's fill, then experts and routers of every MoE block of `model`."""
    original(model, *args, **kwargs)
    blocks = list(moe_blocks(model))
    with torch.no_grad():
        for name, block in blocks:
            fill_router(block, name)
            fill_experts(block.experts, f"{name}.experts", block.gate.weight.shape[0])
    if blocks and blocks[0][1].experts.moe_ep_rank == 0 and blocks[0][1].experts.moe_tp_rank == 0:
        _announce(str(settings().dummy_routing))


@functools.cache
def _announce(routing: str) -> None:
    """Once per process, which may load a target and a draft."""
    logger.warning("--load-format dummy: random experts of seed %d, routing %s: answers mean nothing", SEED, routing)


def moe_blocks(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, block) of the blocks with a gate whose experts wait for a checkpoint's FP4 or FP8 tensors: those of our layers, and
    stock ones if the user set the routing."""
    from hopper_moe.quantization.sglang_method import HopperMoEMethod

    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        waits = all(hasattr(experts, parameter) for parameter in CHECKPOINT_PARAMETERS)
        if experts is None or not waits or not hasattr(module, "gate"):
            continue
        if isinstance(experts.quant_method, HopperMoEMethod) or DUMMY_ROUTING in os.environ:
            yield name, module


def fill_router(block: Any, name: str) -> None:
    """Gate, correction biases and hash table of one block, alike on every rank."""
    gate, routing = block.gate, settings().dummy_routing
    num_experts, hidden_size = gate.weight.shape
    source = generator(gate.weight.device, SEED, name, "gate")
    table = getattr(block.topk, "tid2eid", None)
    top_k = block.config.num_experts_per_tok
    gate.weight.copy_(gate_weight(routing, num_experts, hidden_size, top_k, _INPUT_RMS, source))
    for bias in (gate.e_score_correction_bias, gate.e_score_correction_bias_vl):
        if bias is not None:
            bias.zero_()
    if table is not None:
        table.copy_(hash_table(routing, table.shape[0], num_experts, table.shape[1], source))


def fill_experts(layer: FusedMoE, name: str, num_logical: int) -> None:
    """The experts that this rank holds, through the parameters' own loader."""
    is_fp4 = layer.w13_weight.dtype is torch.int8
    device, sizes = layer.w13_weight.device, (layer.hidden_size, layer.intermediate_size_per_partition * layer.moe_tp_size)
    for expert in held_here(layer, num_logical):
        for shard in ("w1", "w2", "w3"):
            tensors = random_matrix(shard, *sizes, is_fp4, generator(device, SEED, name, expert, shard))
            kind = "w2" if shard == "w2" else "w13"
            for part, tensor in zip(("weight", "weight_scale_inv"), tensors, strict=True):
                parameter = getattr(layer, f"{kind}_{part}")
                parameter.weight_loader(parameter, tensor, f"{name}.{kind}_{part}", shard_id=shard, expert_id=expert)


def held_here(layer: FusedMoE, num_logical: int) -> list[int]:
    """Logical experts of which this rank holds a copy, as SGLang's loader maps them: expert parallelism, EPLB."""
    found: list[int] = []
    own = layer.__dict__.get("_weight_loader_impl")
    for expert in range(num_logical):
        reached: list[Any] = []
        layer._weight_loader_impl = lambda reached=reached, **call: reached.append(call)
        layer.weight_loader(layer.w13_weight, layer.w13_weight, "", shard_id="w1", expert_id=expert)
        if reached:
            found.append(expert)
    if own is None:
        del layer._weight_loader_impl
    else:
        layer._weight_loader_impl = own
    return found
