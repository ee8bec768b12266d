"""Which operations of a decoder layer give a token other bits when other tokens run beside it.

A hook for SGLang's `--forward-hooks`: it runs once, in the server, where the layer's weights and kernels are what requests meet.

\b
    sglang serve MODEL --disable-cuda-graph --forward-hooks '[{"name": "rows", "target_modules": ["model.layers.2"],
        "hook_factory": "hopper_moe.eval.serving_bench.stock_rows:probe", "config": {"out": "/tmp/rows.json"}}]'

The first request makes it write `out`: for each operation the batch sizes at which the first row has other bits than alone, and
how far off it is. Attention is not among them, since it needs a KV cache: `batches` shows it with everything else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

BATCHES = (2, 4, 7, 8, 16, 32, 33, 64, 65, 128, 129, 256)
_Operation = Callable[[torch.Tensor], torch.Tensor]


def probe(config: dict[str, Any]) -> Callable[..., None]:
    """SGLang's hook factory. `config`: `out`, the file."""
    asked: list[torch.nn.Module] = []

    def hook(layer: torch.nn.Module, _args: object, _output: object) -> None:
        if asked or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return
        asked.append(layer)  # before the operations, which may call the layer's modules
        found = {name: measured(operation, shape, device_of(layer)) for name, operation, shape in operations(layer)}
        Path(config["out"]).write_text(json.dumps(found, indent=1) + "\n")

    return hook


def device_of(layer: torch.nn.Module) -> torch.device:
    return next(layer.parameters()).device


def measured(operation: _Operation, shape: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """`other_bits`: batch size -> relative L2 distance of the first row from the one alone, where a bit differs.

    `shape`: of a row, in BF16.
    An operation that cannot be called alone says why under `not_measured`.
    """
    rng = torch.Generator(device).manual_seed(1)
    rows = torch.randn(max(BATCHES), *shape, generator=rng, device=device).bfloat16()
    try:
        with torch.no_grad():
            alone = operation(rows[:1].contiguous())[0].double()
            batches = {size: operation(rows[:size].contiguous())[0].double() for size in BATCHES}
    except Exception as error:  # whatever a stock module raises where it is called outside of its place
        return {"not_measured": f"{type(error).__name__}: {str(error)[:200]}"}
    far = {size: ((row - alone).norm() / alone.norm()).item() for size, row in batches.items() if not torch.equal(row, alone)}
    return {"row": list(shape), "other_bits": far}


def operations(layer: torch.nn.Module) -> Iterator[tuple[str, _Operation, tuple[int, ...]]]:
    """(name, function of rows, shape of a row) of a layer's linears, norms, gate, shared experts and hyper-connections."""
    for name, module in layer.named_modules():
        width = _width(module)
        if width and ".experts." not in f".{name}.":  # routed experts are no linears
            yield name, _calling(module), (width,)
    if hasattr(layer, "hc_pre") and hasattr(layer, "hc_attn_fn"):
        yield from _hyper_connections(layer)


def _width(module: torch.nn.Module) -> int | None:
    """Values of a row that the module takes; None for what is no linear, norm or gate."""
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    for attribute in ("input_size_per_partition", "input_size"):
        if "Linear" in kind and isinstance(width := getattr(module, attribute, None), int):
            return width
    if kind.endswith(("Norm", "Gate", "Linear")) and isinstance(weight, torch.Tensor):
        return weight.shape[-1]
    return None


def _calling(module: torch.nn.Module) -> _Operation:
    def call(rows: torch.Tensor) -> torch.Tensor:
        found = module(rows)
        return found[0] if isinstance(found, tuple) else found

    return call


def _hyper_connections(layer: Any) -> Iterator[tuple[str, _Operation, tuple[int, ...]]]:
    """Before a sublayer, and fused behind the one before: the input that the sublayer gets."""
    shape = (layer.hc_mult, layer.hidden_size)
    parameters = (layer.hc_attn_fn, layer.hc_attn_scale, layer.hc_attn_base)
    yield "hyper-connections", lambda rows: layer.hc_pre(rows, *parameters)[0], shape

    def fused(rows: torch.Tensor) -> torch.Tensor:
        from sglang.kernels.ops.layernorm import mhc

        count, device = len(rows), rows.device
        post = torch.full((count, layer.hc_mult), 0.5, device=device)
        comb = torch.full((count, layer.hc_mult, layer.hc_mult), 0.25, device=device)
        epsilons = (layer.rms_norm_eps, layer.hc_eps, layer.hc_eps)
        return mhc.mhc_fused_post_pre(
            rows[:, 0].contiguous(), rows, post, comb, *parameters, *epsilons, 2.0, layer.hc_sinkhorn_iters
        )[3]

    yield "hyper-connections, fused with the sublayer before", fused, shape
