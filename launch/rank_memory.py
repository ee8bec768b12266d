"""GiB of weights on each rank of a launch: for the log, and to refuse what does not fit before it is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator

from hopper_moe.launch.machine import GIB, Gpu
from hopper_moe.launch.model_facts import LaunchedModel
from hopper_moe.moe_backends.env import Settings
from hopper_moe.moe_backends.kernel_specs import KernelSpec
from hopper_moe.moe_backends.sglang.launch_view import LaunchView
from hopper_moe.moe_backends.sglang.plan import NO_EXCHANGE
from hopper_moe.moe_backends.sglang.stages import stage_layers
from hopper_moe.quantization.checkpoint_memory import RankBytes, RankLayout, engram_on_host, weights_per_rank

RESERVE_BYTES = 4 * GIB  # CUDA context, NCCL, graphs and the smallest useful KV cache: below this SGLang fails after loading


def rank_layout(view: LaunchView, spec: KernelSpec, settings: Settings, model: str, layers: range) -> RankLayout:
    """How this launch spreads the weights of the stage with these layers. A draft from another folder than `model` is not
    counted."""
    args = view.args
    own_draft = args.speculative_draft_model_path in (None, model)
    return RankLayout(
        tp_size=args.tp_size,
        ep_size=view.ep_size(spec),
        layers=layers,
        attn_dp_size=view.attn_dp_size,
        exchanges=view.exchange(spec) != NO_EXCHANGE,
        has_draft=bool(view.option("speculative_algorithm")) and own_draft,
        redundant_experts=args.ep_num_redundant_experts or 0,
        expand_fp4=settings.expand_fp4,
        engram_on_host=engram_on_host(os.environ),
    )


def of_stages(view: LaunchView, spec: KernelSpec, settings: Settings, loaded: LaunchedModel, model: str) -> dict[int, RankBytes]:
    """Bytes of a rank of each pipeline stage on this host, of a launch whose sizes divide."""
    layers = stage_layers(loaded.facts.num_layers, view.args.pp_size, os.environ)
    return {
        stage: weights_per_rank(loaded.facts, loaded.tensors, rank_layout(view, spec, settings, model, layers[stage]))
        for stage in view.local_stages
    }


def weights_line(found: RankBytes, stage: str = "") -> str:
    """What one rank holds, by kind. `stage`: " of stage 1" where there are several."""
    parts = [f"packed experts {found.experts / GIB:.2f}"]
    parts += [f"draft experts {found.draft_experts / GIB:.2f}"] if found.draft_experts else []
    parts += [f"hash tables {found.engram / GIB:.2f}"] if found.engram else []
    parts.append("other weights unknown (their files are not here)" if found.other is None else f"other {found.other / GIB:.2f}")
    host = f"; {found.engram_host / GIB:.2f} GiB of hash tables in host memory" if found.engram_host else ""
    return f"memory   {found.device / GIB:.2f} GiB of weights per rank{stage}: {', '.join(parts)}{host}"


def memory_refusals(used: list[Gpu], found: RankBytes) -> Iterator[str]:
    """One sentence for each GPU that does not hold its rank's weights."""
    what = "the weights need" if found.other is not None else "the experts and hash tables alone need"
    for gpu in used:
        if found.device + RESERVE_BYTES > gpu.free_bytes:
            yield (
                f"GPU {gpu.index} has {gpu.free_bytes / GIB:.1f} GiB free, but {what} {found.device / GIB:.1f} GiB and "
                f"{RESERVE_BYTES // GIB} GiB must stay free: use more GPUs (--tp-size, --pp-size) or end what runs there."
            )
