"""SGLang's quant method for routed experts: parameters in the checkpoint's types, packed once after loading; one kernel call."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from hopper_moe.kernels.reference_weights import Fp8BlockExperts, Mxfp4Experts
from hopper_moe.moe_backends import compat, self_check
from hopper_moe.moe_backends.base import ExpertShard
from hopper_moe.moe_backends.env import settings
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.moe_backends.metrics import metrics
from hopper_moe.moe_backends.registry import KernelSpec, create_runner
from hopper_moe.moe_backends.sglang_hooks import MARK
from hopper_moe.moe_backends.startup import READY, announce_plan
from hopper_moe.quantization import layout
from hopper_moe.quantization.exactness import check_exact
from hopper_moe.quantization.sglang_loading import CHECKPOINT_PARAMETERS, LoadLedger, pack_layer, refuse_reload

if TYPE_CHECKING:
    from hopper_moe.moe_backends.arguments import ServingPlan

logger = logging.getLogger("hopper_moe")


class HopperMoEMethod(FusedMoEMethodBase):
    """One object per layer.

    Args:
        fp8_method: SGLang's Fp8MoEMethod, which creates the parameters; nothing else of it is used.
        prefix: the layer's name.
        kernel: what runs the layer.
        plan: exchange and capacity of this launch.
    """

    # 0.5.23 then multiplies the routed scaling factor into the top-k weights itself; 0.5.17 ignores it (see `_weights`).
    fuse_routed_scaling_factor_in_topk = True

    def __init__(self, fp8_method: Any, prefix: str, kernel: KernelSpec, plan: ServingPlan) -> None:
        self._fp8, self._prefix, self._kernel, self._plan = fp8_method, prefix, kernel, plan
        self._ledger: LoadLedger | None = None

    # ---- construction

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The checkpoint's tensors, E and I of this rank. FP4: w13_weight int8 [E, 2I, H/2], w2_weight int8 [E, H, I/2] and their
        `_scale_inv` float8_e8m0fnu [.., ../32]. FP8: float8_e4m3fn [E, 2I, H], [E, H, I] and float32 per 128 x 128."""
        layout.check_dims(hidden_size, intermediate_size_per_partition)
        if layer.num_fused_shared_experts:
            raise Refusal(f"{self._prefix}: shared experts are fused into the routed ones: drop --enforce-shared-experts-fusion.")
        if extra_weight_attrs.get("with_bias"):
            raise Refusal(f"{self._prefix}: experts with a bias are not served: use --moe-runner-backend auto.")
        self._fp8.create_weights(
            layer,
            num_experts,
            hidden_size,
            intermediate_size_per_partition,
            params_dtype,
            fp4_scale_dtype=torch.float8_e8m0fnu,
            **extra_weight_attrs,
        )
        self._ledger = LoadLedger(layer, self._prefix, layer.moe_ep_rank * num_experts)

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        config = moe_runner_config
        unsupported = {
            "activation": config.activation != "silu",
            "is_gated": not config.is_gated,
            "apply_router_weight_on_input": config.apply_router_weight_on_input,
            "no_combine": config.no_combine,
            "gemm1_alpha": config.gemm1_alpha is not None,
            "gemm1_clamp_limit": config.gemm1_clamp_limit is not None,
        }
        for field in (name for name, bad in unsupported.items() if bad):
            raise Refusal(
                f"{self._prefix}: {field}={getattr(config, field)} is not DeepSeek-V4's SwiGLU: use --moe-runner-backend auto."
            )
        self._config = config
        self._shard = ExpertShard(
            num_experts=config.num_experts,
            first_expert=layer.moe_ep_rank * config.num_local_experts,
            num_local_experts=config.num_local_experts,
            top_k=config.top_k,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size_per_partition,
            swiglu_limit=config.swiglu_limit,
            max_tokens_per_rank=self._plan.capacity,
            group=self._group(layer),
            fp8_combine=settings().fp8_combine,
            fp4_dispatch=settings().fp4_dispatch,
            timeout_s=settings().timeout_s,
            layer=next((int(part) for part in self._prefix.split(".") if part.isdigit()), -1),
        )
        if layer.moe_ep_rank == layer.moe_tp_rank == 0:
            announce_plan(self._kernel, self._shard, self._plan, layer.w13_weight.device)

    def get_moe_runner_backend(self, layer: torch.nn.Module) -> None:
        """None: SGLang's standard top-k; under expert parallelism its dispatcher makes ids local, which `_global_ids` undoes."""

    # ---- after loading

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check that every tensor came, pack, hand over to the kernel; the first layer of a kind is checked against the
        reference. A second call changes nothing."""
        if getattr(layer, MARK, False):
            return
        self._ledger.require_complete()
        packed = self._can_be_packed(layer)
        kernel = self._kernel.name if packed else "reference"
        sample = self._sample(layer, kernel)
        self._runner = create_runner(kernel)
        if packed:
            experts = pack_layer(layer, self._runner.experts_type)
        else:
            experts = Mxfp4Experts(*(getattr(layer, name).data for name in CHECKPOINT_PARAMETERS))
        self._ledger.close()
        refuse_reload(layer, self._prefix)
        self._runner.prepare(experts, self._shard)
        compat.keep_global_ids(layer)
        layer._mega_moe_weights_built = self._plan.exchange == "megamoe"
        setattr(layer, MARK, True)
        READY.add(layer.parameters())
        if sample is not None:
            started = time.monotonic()
            error = self_check.require_agreement(self._prefix, kernel, self._runner, sample, self._group(layer))
            READY.checked(error, sample.seconds + time.monotonic() - started)

    def _sample(self, layer: torch.nn.Module, kernel: str) -> self_check.Sample | None:
        """What this layer must give, from the tensors as they were loaded; None: a layer of its kind was checked before, on
        `kernel`."""
        if not settings().self_check or not self_check.is_first(kernel, self._shard):
            return None
        # FP4 experts may be expanded for an FP8 kernel.
        stored = Mxfp4Experts if layer.w13_weight.dtype is torch.int8 else Fp8BlockExperts
        checkpoint = stored(*(getattr(layer, name).data for name in CHECKPOINT_PARAMETERS))
        return self_check.expect(kernel, checkpoint, self._shard, layer.w13_weight.device, self._group(layer))

    def _group(self, layer: torch.nn.Module) -> Any:
        """The ranks that exchange tokens inside the kernel; None: SGLang moves them."""
        return compat.ep_process_group() if self._plan.exchange == "megamoe" and layer.moe_ep_size > 1 else None

    def _can_be_packed(self, layer: torch.nn.Module) -> bool:
        """Whether the kernel's format holds this layer as it is; False: it runs on the reference, on every rank of its group.

        Raises `Refusal` where it would be rounded and HOPPER_MOE_INEXACT_ROWS does not allow the reference.
        """
        if create_runner(self._kernel.name).experts_type.holds_every_row:
            return True
        report = check_exact(layer.w13_weight_scale_inv.data, layer.w2_weight_scale_inv.data)
        may_differ = self._kernel.name == "reference" or settings().inexact_rows == "reference"
        if report.has_nan or not may_differ:
            report.require_exact(self._prefix)
        if not may_differ:
            return True
        num_inexact, num_rows = self._sum_over_group(layer, report.num_inexact_rows, report.num_rows)
        if not num_inexact:
            return True
        if compat.has_redundant_experts():
            raise Refusal(
                f"{self._prefix}: {num_inexact} rows cannot be packed, so this layer's tensors differ from the "
                "others', which "
                "--enable-eplb and --ep-num-redundant-experts cannot move: drop them."
            )
        logger.warning(
            "%s: %d of %d rows cannot be packed exactly, so the whole layer runs on the exact reference (slow)",
            self._prefix,
            num_inexact,
            num_rows,
        )
        return False

    def _sum_over_group(self, layer: torch.nn.Module, *counts: int) -> list[int]:
        """Each count over the ranks that exchange tokens inside the kernel. They have to decide alike: a rank on the reference
        and one on the fused kernel would wait for each other until the timeout."""
        group = self._group(layer)
        if group is None:
            return list(counts)
        sums = torch.tensor(counts, dtype=torch.int64, device=layer.w13_weight.device)
        dist.all_reduce(sums, group=group)
        return sums.tolist()

    # ---- forward

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        """Standard dispatcher: partial sums of this rank's experts for every row; SGLang adds the ranks up."""
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        hidden_states = dispatch_output.hidden_states
        self._note_call(hidden_states.shape[0])
        if compat.exchange_is_megamoe():
            raise Refusal(
                f"{self._prefix}: {hidden_states.shape[0]} tokens came past the fused exchange, whose limit is "
                f"{self._plan.capacity} per rank: "
                "raise HOPPER_MOE_MAX_TOKENS_PER_RANK or lower --chunked-prefill-size."
            )
        if not dispatch_output.format.is_standard() or dispatch_output.hidden_states_scale is not None:
            raise Refusal(
                f"{self._prefix}: expected BF16 rows in SGLang's standard layout, got {type(dispatch_output).__name__}."
            )
        topk = dispatch_output.topk_output
        scale = 1.0 if layer.should_fuse_routed_scaling_factor_in_topk else self._config.routed_scaling_factor
        output = self._run_in_pieces(
            hidden_states, self._global_ids(layer, topk.topk_ids), self._weights(topk.topk_weights, scale)
        )
        return StandardCombineInput(hidden_states=output)

    def run_mega(
        self,
        layer: torch.nn.Module,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        *,
        hidden_size: int,
        intermediate_size: int,
        top_k: int,
        num_tokens: int,
        activation_clamp: float | None = None,
        routed_scaling_factor: float = 1.0,
        activation: str = "swiglu",
        num_shared_experts: int = 0,
        shared_l1_weights: torch.Tensor | None = None,
        shared_l2_weights: torch.Tensor | None = None,
        routing_in_buffer: bool = False,
    ) -> torch.Tensor:
        """The "megamoe" exchange: complete sums for this rank's rows. Every rank calls it, also with 0 tokens.

        Ids are global (physical) here. `routed_scaling_factor` is what SGLang has not multiplied in yet: 1.0 if its top-k has.
        Returns a fresh bf16 [num_tokens, hidden_size].
        """
        self._note_call(num_tokens)
        shard = self._shard
        if (
            shared_l1_weights is not None
            or shared_l2_weights is not None
            or num_shared_experts
            or routing_in_buffer
            or activation != "swiglu"
        ):
            raise Refusal(
                f"{self._prefix}: SGLang asks for shared experts, routing or activation inside the kernel, which it does not "
                "have."
            )
        if (hidden_size, top_k, activation_clamp) != (shard.hidden_size, shard.top_k, shard.swiglu_limit):
            raise Refusal(
                f"{self._prefix}: called for hidden_size {hidden_size}, top_k {top_k}, swiglu_limit {activation_clamp}, but "
                "built for "
                f"{shard.hidden_size}, {shard.top_k}, {shard.swiglu_limit}: the model's config changed after loading."
            )
        if num_tokens > shard.max_tokens_per_rank:
            raise Refusal(
                f"{self._prefix}: {num_tokens} tokens exceed the {shard.max_tokens_per_rank} per rank that the buffer was "
                "sized for: "
                "raise HOPPER_MOE_MAX_TOKENS_PER_RANK or lower --chunked-prefill-size."
            )
        if topk_ids is None:
            topk_ids = hidden_states.new_empty((0, top_k), dtype=torch.int32)
            topk_weights = hidden_states.new_empty((0, top_k), dtype=torch.float32)
        weights = self._weights(topk_weights, routed_scaling_factor)
        group = self._group(layer)
        if group is None:
            return self._runner.run(hidden_states, topk_ids.to(torch.int32), weights)
        return self._runner.run_across_ranks(hidden_states, topk_ids.to(torch.int32), weights, group)

    def _note_call(self, num_tokens: int) -> None:
        figures = metrics(self._kernel.name)
        if READY.announce() and figures is not None:
            figures.ready(READY)
        if figures is not None:
            figures.count(self._runner, num_tokens)

    def _run_in_pieces(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """The runner over at most `max_tokens_per_rank` rows at a time; a row's result does not depend on the others."""
        limit = self._shard.max_tokens_per_rank
        if hidden_states.shape[0] <= limit:
            return self._runner.run(hidden_states, topk_ids, topk_weights)
        pieces = zip(hidden_states.split(limit), topk_ids.split(limit), topk_weights.split(limit), strict=True)
        return torch.cat([self._runner.run(*piece) for piece in pieces])

    def _global_ids(self, layer: torch.nn.Module, topk_ids: torch.Tensor) -> torch.Tensor:
        """What the dispatcher passed on, as global ids: it makes them local (-1: not here) unless it was told not to."""
        ids = topk_ids.to(torch.int32)
        if layer.moe_ep_size == 1 or layer.dispatcher.skip_local_expert_mapping:
            return ids
        return torch.where(ids < 0, ids, ids + self._shard.first_expert)

    @staticmethod
    def _weights(topk_weights: torch.Tensor, routed_scaling_factor: float | None) -> torch.Tensor:
        """FP32 weights with the routed scaling factor in them, exactly once."""
        weights = topk_weights.float()
        return weights if routed_scaling_factor in (None, 1.0) else weights * routed_scaling_factor
