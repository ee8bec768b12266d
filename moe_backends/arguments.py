"""Which SGLang arguments this backend serves and which it refuses: plain rules over a view of the arguments, without SGLang.

`sglang_hooks.py` calls `early` before SGLang resolves its arguments and `late` after. The result is a `ServingPlan`, which
travels to the worker processes in one environment variable because they inherit nothing else from the process that resolved.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

from hopper_moe.moe_backends.env import Settings
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.moe_backends.registry import KernelSpec, LayerShape, layer_refusals

logger = logging.getLogger("hopper_moe")

BACKEND = "hopper_moe"
"""The name behind `--moe-runner-backend`."""

ARCHITECTURES = ("DeepseekV4ForCausalLM", "DeepseekV4ForCausalLMNextN", "DeepseekV4ForCausalLMDSpark")
"""Models whose routing, clamp and scaling this backend was checked with."""

DEFAULT_CAPACITY = 8192
"""Tokens per kernel call where the call may be split (standard mode): bounds the kernel's buffers, not the batch."""

_NOTE = "_HOPPER_MOE_PLAN"

# (argument, flag, why not). A truthy value is refused.
UNSUPPORTED = (
    ("enable_two_batch_overlap", "--enable-two-batch-overlap", "the fused kernel cannot run half a batch"),
    ("enable_single_batch_overlap", "--enable-single-batch-overlap", "the fused kernel has no dispatch to overlap with"),
    ("enable_lora", "--enable-lora", "adapters on packed FP4 experts would be ignored"),
    ("lora_paths", "--lora-paths", "adapters on packed FP4 experts would be ignored"),
    (
        "enforce_shared_experts_fusion",
        "--enforce-shared-experts-fusion",
        "it would turn the FP8 shared expert into an FP4 routed one",
    ),
    ("enable_waterfill", "--enable-waterfill", "it needs the shared expert fused into the routed ones"),
    ("enable_paged_experts", "--enable-paged-experts", "it moves expert weights behind the kernel's back"),
    ("kt_weight_path", "--kt-weight-path", "it moves experts to the CPU"),
    ("cpu_offload_gb", "--cpu-offload-gb", "it moves packed experts to the CPU"),
    ("elastic_ep_backend", "--elastic-ep-backend", "experts must stay on the ranks that packed them"),
    ("use_ray", "--use-ray", "which Ray's workers would not know: SGLang loads no plugins in them"),
    ("enable_w4a4_mxfp4_megamoe", "--enable-w4a4-mxfp4-megamoe", "FP4 activations need another GPU"),
)

_WHOLE_PARAMETERS = ("sharded_state", "presharded", "remote_instance")
"""Load formats that fill a layer's parameters as they are after loading, past the loader that shows us every expert tensor."""


@dataclass(frozen=True)
class ServingPlan:
    """What the resolved arguments mean for every MoE layer of every rank."""

    kernel: str  # a name of the registry
    exchange: str  # "none": SGLang's standard dispatcher; "megamoe": rows stay with their rank, the kernel exchanges
    capacity: int  # tokens per kernel call: in "megamoe" the most a rank may bring, in "none" the size of one split

    def publish(self, environ: MutableMapping[str, str]) -> None:
        environ[_NOTE] = json.dumps(asdict(self))

    @staticmethod
    def read(environ: Mapping[str, str]) -> ServingPlan | None:
        """The plan of this process or its parent; None: nobody asked for this backend."""
        note = environ.get(_NOTE)
        return ServingPlan(**json.loads(note)) if note else None

    @staticmethod
    def withdraw(environ: MutableMapping[str, str]) -> None:
        environ.pop(_NOTE, None)


def is_asked_for(args: Any) -> bool:
    """Whether target or draft layers are to run on this backend."""
    return BACKEND in (args.moe_runner_backend, args.speculative_moe_runner_backend)


def early(args: Any, spec: KernelSpec, settings: Settings, attn_dp_size: int) -> dict[str, Any]:
    """Refusals that need no model, and the fields to declare: `moe_a2a_backend`, and graphs off where a kernel cannot be
    captured.

    Args:
        args: SGLang's arguments as the user gave them, defaults filled in or not.
        spec: the kernel that was chosen.
        attn_dp_size: ranks of attention data parallelism, 1 without it.
    """
    if args.moe_runner_backend != BACKEND:
        raise Refusal(
            f"--speculative-moe-runner-backend {BACKEND} needs --moe-runner-backend {BACKEND} as well: give both or neither "
            f"(--moe-runner-backend is {args.moe_runner_backend})."
        )
    if args.speculative_moe_runner_backend not in (None, BACKEND):
        raise Refusal(
            f"--speculative-moe-runner-backend {args.speculative_moe_runner_backend} beside --moe-runner-backend {BACKEND} "
            f"would serve the draft's FP4 experts with another kernel: drop --speculative-moe-runner-backend."
        )
    for field, flag, reason in UNSUPPORTED:
        value = getattr(args, field, None)
        if value:
            raise Refusal(f"{flag} ({value}) cannot run with --moe-runner-backend {BACKEND}, {reason}: drop one of the two.")
    for field, flag, highest in (("dwdp_size", "--dwdp-size", 1), ("offload_group_size", "--offload-group-size", 0)):
        value = getattr(args, field, None) or 0
        if value > highest:
            raise Refusal(f"{flag} {value} copies or moves expert weights behind the kernel's back: drop it.")
    if args.load_format == "dummy":
        raise Refusal(
            "--load-format dummy makes up FP4 scales that mean nothing: drop it and give a checkpoint, such as "
            "eval/data/gpu_dsv4 of this package."
        )
    if args.load_format in _WHOLE_PARAMETERS or args.weight_cache_mode != "off":
        option = (
            f"--load-format {args.load_format}"
            if args.load_format in _WHOLE_PARAMETERS
            else f"--weight-cache-mode {args.weight_cache_mode}"
        )
        raise Refusal(
            f"{option} fills parameters without SGLang's weight loader, where {BACKEND} checks and packs each expert: drop it "
            "and give the stock checkpoint."
        )
    if args.quantization not in (None, "fp8"):
        raise Refusal(
            f"--quantization {args.quantization} is not how DeepSeek-V4 FP4 experts are stored: drop it, the checkpoint says fp8."
        )

    exchange = _exchange(args, spec, attn_dp_size)
    if args.speculative_moe_a2a_backend not in (None, exchange):
        raise Refusal(
            f"--speculative-moe-a2a-backend {args.speculative_moe_a2a_backend} would lay out the draft's rows in another way "
            f"than {spec.name}, which runs its layers too, takes them here ({exchange}): drop --speculative-moe-a2a-backend."
        )
    declared: dict[str, Any] = {"moe_a2a_backend": exchange}
    if uncapturable := _uncapturable(spec, settings):
        logger.warning("%s cannot be captured in a CUDA graph: graphs are off.", uncapturable)
        declared["disable_cuda_graph"] = True
    return declared


def _uncapturable(spec: KernelSpec, settings: Settings) -> str | None:
    """What of this launch keeps CUDA graphs off; None: nothing does."""
    if not spec.capturable:
        return f"kernel {spec.name}"
    return "HOPPER_MOE_INEXACT_ROWS=reference" if settings.inexact_rows == "reference" else None


def _exchange(args: Any, spec: KernelSpec, attn_dp_size: int) -> str:
    asked = args.moe_a2a_backend
    if asked not in ("none", "megamoe"):
        raise Refusal(
            f"--moe-a2a-backend {asked} moves tokens before the experts run, but {BACKEND} takes them in SGLang's standard "
            "layout: "
            "drop --moe-a2a-backend."
        )
    if asked == "megamoe" and args.tp_size > 1 and not spec.multi_rank:
        raise Refusal(
            f"--moe-a2a-backend megamoe with {args.tp_size} ranks needs a kernel that exchanges tokens itself, which "
            f"{spec.name} does not "
            "in this release: drop --moe-a2a-backend, then SGLang's own collectives move them."
        )
    return "megamoe" if spec.multi_rank and attn_dp_size > 1 else asked


@dataclass(frozen=True)
class ModelFacts:
    """What the late check needs of SGLang's model config."""

    architecture: str
    quantization: str | None  # how SGLang builds every linear and expert; None: nothing is quantized
    is_fp4_experts: bool  # also for experts of a type that SGLang does not know, so it says nothing without the line above
    has_nvfp4_experts: bool
    hidden_size: int
    moe_intermediate_size: int
    num_experts: int  # without redundant ones
    top_k: int
    swiglu_limit: float | None


def layer_shape(args: Any, model: ModelFacts, settings: Settings) -> LayerShape:
    """One MoE layer as a rank sees it, from resolved arguments; its experts as the kernel gets them."""
    return LayerShape(
        hidden_size=model.hidden_size,
        intermediate_size=model.moe_intermediate_size // max(args.tp_size // args.ep_size, 1),
        num_experts=model.num_experts + (args.ep_num_redundant_experts or 0),
        top_k=model.top_k,
        expert_dtype="fp4" if model.is_fp4_experts and not settings.expand_fp4 else "fp8",
        ep_size=args.ep_size,
    )


def late(args: Any, spec: KernelSpec, settings: Settings, model: ModelFacts, attn_dp_size: int) -> ServingPlan:
    """Refusals that need the model and the resolved arguments; returns the plan for the workers."""
    if model.architecture not in ARCHITECTURES:
        raise Refusal(
            f"--moe-runner-backend {BACKEND} serves {', '.join(ARCHITECTURES)}, not {model.architecture}: use "
            "--moe-runner-backend auto."
        )
    if model.has_nvfp4_experts:
        raise Refusal(f"the checkpoint's experts are NVFP4, {BACKEND} serves MXFP4 experts: use --moe-runner-backend auto.")
    if model.quantization != "fp8":
        # Another method than SGLang's Fp8Config never asks us for its layers: Triton would run them without a word.
        raise Refusal(
            f"the model's quantization is {model.quantization}, but only quant_method fp8 in its config.json makes SGLang build "
            f"expert layers for {BACKEND}: give the stock checkpoint, or use --moe-runner-backend auto."
        )
    if model.swiglu_limit is not None and not (math.isfinite(model.swiglu_limit) and model.swiglu_limit > 0):
        raise Refusal(f"swiglu_limit {model.swiglu_limit} in the model's config.json is no positive number: mend or remove it.")
    if model.moe_intermediate_size % (moe_tp := max(args.tp_size // args.ep_size, 1)):
        raise Refusal(
            f"moe_intermediate_size {model.moe_intermediate_size} does not divide into {moe_tp} tensor-parallel slices: use "
            f"--ep-size {args.tp_size}."
        )
    for sentence in layer_refusals(spec, layer_shape(args, model, settings)):
        raise Refusal(sentence)
    if uncapturable := _uncapturable(spec, settings):
        _require_no_graphs(args, uncapturable)
    if args.moe_a2a_backend != (exchange := _exchange(args, spec, attn_dp_size)):
        raise Refusal(
            f"SGLang resolved --moe-a2a-backend to {args.moe_a2a_backend}, but {spec.name} needs {exchange}: drop the option "
            "behind it."
        )
    return ServingPlan(spec.name, args.moe_a2a_backend, _capacity(args, spec, settings, attn_dp_size))


def _require_no_graphs(args: Any, uncapturable: str) -> None:
    for phase in ("decode", "prefill"):
        backend = getattr(args.cuda_graph_config, phase).backend
        if backend != "disabled":
            raise Refusal(
                f"{uncapturable} cannot be captured in a CUDA graph, but --cuda-graph-backend-{phase} {backend} was given: "
                "drop it."
            )


def required_tokens(args: Any, attn_dp_size: int) -> int:
    """Most tokens that one rank brings to a layer call in "megamoe" mode, from resolved arguments.

    SGLang has already divided chunked_prefill_size by the attention-DP size when this runs (`handle_data_parallelism`), so it is
    taken as it is; SGLang's own check divides once more and lets budgets through that are too small. Rows are padded to the
    attention-TP size.
    """
    align = max(args.tp_size // attn_dp_size // (getattr(args, "attn_cp_size", None) or 1), 1)
    tokens_per_request = (args.speculative_num_draft_tokens or 1) if args.speculative_algorithm else 1
    requests = args.cuda_graph_config.decode.max_bs or 0
    if args.max_running_requests:
        requests = max(requests, -(-args.max_running_requests // attn_dp_size))
    tokens = max(0 if args.disaggregation_mode == "decode" else _largest_chunk(args), requests * tokens_per_request)
    return -(-tokens // align) * align


def _has_dynamic_chunks(args: Any) -> bool:
    return args.enable_dynamic_chunking and args.pp_size > 1


def _largest_chunk(args: Any) -> int:
    """Most tokens of a prefill chunk. With pipeline stages --enable-dynamic-chunking sizes it anew at every step, up to
    --max-prefill-tokens, after it has timed chunks of 1.25 times --chunked-prefill-size."""
    chunk = args.chunked_prefill_size
    if not _has_dynamic_chunks(args):
        return chunk
    return max(chunk, math.ceil(1.25 * chunk), args.max_prefill_tokens or 0)


def _capacity(args: Any, spec: KernelSpec, settings: Settings, attn_dp_size: int) -> int:
    asked = settings.max_tokens_per_rank
    if args.moe_a2a_backend != "megamoe":
        return asked or DEFAULT_CAPACITY  # a larger batch is run in pieces: nothing crosses ranks inside the kernel
    if args.disaggregation_mode != "decode" and (args.chunked_prefill_size is None or args.chunked_prefill_size <= 0):
        raise Refusal(
            f"--chunked-prefill-size {args.chunked_prefill_size} leaves the tokens per rank unbounded, but the exchange buffer "
            f"of {spec.name} "
            "is sized once: give a positive --chunked-prefill-size."
        )
    needed = required_tokens(args, attn_dp_size)
    if asked is not None and asked < needed:
        raise Refusal(
            f"{_origin(settings)}={asked} is below the {needed} tokens that a rank may bring (chunked prefill "
            f"{args.chunked_prefill_size} per "
            f"rank, or running requests x draft tokens): raise it to {needed} or lower --chunked-prefill-size"
            f"{' or --max-prefill-tokens, up to which chunks are sized dynamically' if _has_dynamic_chunks(args) else ''}."
        )
    return asked or needed


def _origin(settings: Settings) -> str:
    source = settings.sources["max_tokens_per_rank"]
    return source if source.isupper() else "HOPPER_MOE_MAX_TOKENS_PER_RANK"
