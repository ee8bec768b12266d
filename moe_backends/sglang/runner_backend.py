"""The `LayerBackend` of a worker: one layer's runner, self-check, logs and metrics."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from hopper_moe.kernels.expert_blocks import run_on_blocks
from hopper_moe.kernels.reference_weights import Fp8BlockExperts, Mxfp4Experts
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends import self_check
from hopper_moe.moe_backends.env import settings
from hopper_moe.moe_backends.kernel_specs import REFERENCE, REGISTRY
from hopper_moe.moe_backends.registry import create_runner
from hopper_moe.moe_backends.sglang import compat
from hopper_moe.moe_backends.sglang.metrics import metrics
from hopper_moe.moe_backends.sglang.plan import DEEPEP_EXCHANGE, FUSED_EXCHANGE
from hopper_moe.moe_backends.sglang.startup import READY, announce_plan
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.exactness import check_exact
from hopper_moe.quantization.layer_backend import CheckpointExperts
from hopper_moe.quantization.packing import PackedExperts, choose_format
from hopper_moe.quantization.row_scales import RowKind

if TYPE_CHECKING:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.moe_runner.base import MoeRunnerConfig

    from hopper_moe.moe_backends.runner import ExchangingRunner
    from hopper_moe.moe_backends.sglang.plan import ServingPlan
    from hopper_moe.quantization.expert_tensors import ExpertTensors

logger = logging.getLogger("hopper_moe")


class RunnerBackend:
    """See `LayerBackend`.

    Args:
        prefix: the layer's name.
        plan: kernel, exchange and capacity of this launch.
    """

    def __init__(self, prefix: str, plan: ServingPlan) -> None:
        self._prefix, self._plan = prefix, plan
        self._kernel = plan.kernel  # what runs this layer; REFERENCE for one that no packed format holds
        self._format: type[ExpertTensors] | None = None  # None: the checkpoint's own tensors
        self._sample: self_check.Sample | None = None
        self.exchanges = plan.exchange == FUSED_EXCHANGE
        self.max_tokens_per_rank = plan.capacity

    def build(self, layer: FusedMoE, config: MoeRunnerConfig) -> None:
        self._num_ranks = layer.moe_ep_size
        shard = ExpertShard(
            num_experts=config.num_experts,
            first_expert=layer.moe_ep_rank * config.num_local_experts,
            num_local_experts=config.num_local_experts,
            top_k=config.top_k,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size_per_partition,
            swiglu_limit=config.swiglu_limit,
            max_tokens_per_rank=self._plan.capacity,
            group=compat.ep_process_group() if self.exchanges and layer.moe_ep_size > 1 else None,
            fp8_combine=settings().fp8_combine,
            fp4_dispatch=settings().fp4_dispatch,
            timeout_s=settings().timeout_s,
            layer=next((int(part) for part in self._prefix.split(".") if part.isdigit()), -1),
        )
        if layer.moe_ep_rank == 0 and layer.moe_tp_rank == 0:
            announce_plan(REGISTRY[self._plan.kernel], shard, self._plan, layer.w13_weight.device)
        self._shard = shard.alone() if self._plan.exchange == DEEPEP_EXCHANGE else shard

    def choose_format(self, checkpoint: CheckpointExperts) -> type[ExpertTensors] | None:
        self._format = create_runner(self._plan.kernel).experts_type
        if self._format.holds_every_row:
            return self._format
        rule, report = settings().inexact_rows, check_exact(*checkpoint.tensors)
        if report.has_nan or (rule == "refuse" and self._plan.kernel != REFERENCE):
            report.require_exact(self._prefix)
        if report.num_inexact_rows and rule != "round":
            self._require_reference(report.num_inexact_rows, report.num_rows)
        rows = self._sum_over_ranks(report.rows, checkpoint.w13.device)
        self._format = choose_format(rows, may_round=rule == "round")
        if self._format is None:
            self._require_reference(rows[RowKind.BEYOND], sum(rows))
            logger.warning(
                "%s: %d of %d rows cannot be packed exactly, so the whole layer runs on the exact reference (slow)",
                self._prefix,
                rows[RowKind.BEYOND],
                sum(rows),
            )
            self._kernel = REFERENCE
        elif not report.is_exact:
            logger.warning(report.rounding_sentence(self._prefix))
        elif rows[RowKind.WIDE]:
            logger.info("%s: %d of %d rows need the wide format (%s)", self._prefix, rows[RowKind.WIDE], sum(rows), self._kernel)
        return self._format

    def require_fit(self, expert: CheckpointExperts, name: str) -> bool:
        if self._format is None or not issubclass(self._format, PackedExperts):
            return True
        may_round, report = settings().inexact_rows == "round", check_exact(*expert.tensors)
        needed = choose_format(report.rows, may_round=may_round)
        if needed is None or not issubclass(self._format, needed):
            found = "span more octaves than a packed format holds" if needed is None else "need the wide format"
            count = report.rows[RowKind.WIDE] + report.num_inexact_rows
            raise Refusal(
                f"{name}: {count} of {report.num_rows} rows {found}, and this layer was packed as {self._format.__name__} when "
                "the server started: restart it with these weights."
            )
        if not report.is_exact:
            logger.warning(report.rounding_sentence(name))
        return report.is_exact

    def _sum_over_ranks(self, rows: tuple[int, ...], device: torch.device) -> list[int]:
        """Sum over the ranks that have to choose the same format: a rank on the reference and one on the fused kernel would wait
        for each other until the timeout, and EPLB moves experts only between equal formats."""
        group = self._shard.group
        if group is None and self._num_ranks > 1 and compat.has_redundant_experts():
            group = compat.ep_process_group()
        if group is None:
            return list(rows)
        sums = torch.tensor(rows, dtype=torch.int64, device=device)
        dist.all_reduce(sums, group=group)
        return sums.tolist()

    def _require_reference(self, num_inexact: int, num_rows: int) -> None:
        """Raises `Refusal` where this layer may not run on the reference."""
        if settings().inexact_rows == "refuse" and self._plan.kernel != REFERENCE:
            raise Refusal(
                f"{self._prefix}: {num_inexact} of {num_rows} rows, all on other ranks, cannot be packed exactly: see what these "
                "ranks log."
            )
        if compat.has_redundant_experts():
            raise Refusal(
                f"{self._prefix}: {num_inexact} rows cannot be packed, so this layer's tensors differ from the others', which "
                "--enable-eplb and --ep-num-redundant-experts cannot move: drop them, or set HOPPER_MOE_INEXACT_ROWS=round."
            )

    def expect(self, checkpoint: CheckpointExperts) -> None:
        """Skipped if a layer of this kind was checked before with the same kernel and format."""
        if not settings().self_check or not self_check.is_first(self._kernel, self._format, self._shard):
            return
        definition = REGISTRY[self._kernel].definition
        self._sample = self_check.expect(definition, _as_source(checkpoint), self._shard, checkpoint.w13.device)

    def prepare(self, experts: ExpertTensors | CheckpointExperts) -> None:
        self._runner = create_runner(self._kernel)
        self._runner.prepare(_as_source(experts) if isinstance(experts, CheckpointExperts) else experts, self._shard)
        if self._sample is None:
            return
        sample, self._sample = self._sample, None
        started = time.monotonic()
        error = self_check.require_agreement(self._prefix, self._kernel, self._runner, sample, self._shard.group)
        READY.checked(error, sample.seconds + time.monotonic() - started)

    @property
    def kept_tensors(self) -> tuple[torch.Tensor, ...]:
        return self._runner.kept_tensors

    def add_ready(self, parameters: list[torch.Tensor]) -> None:
        READY.add(parameters)

    def run(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        self._note_call(hidden_states.shape[0])
        return self._run_in_pieces(hidden_states, topk_ids, topk_weights)

    def run_blocks(self, blocks: torch.Tensor, counts: torch.Tensor, num_tokens: int) -> torch.Tensor:
        self._note_call(num_tokens)
        return run_on_blocks(blocks, counts, self._shard.top_k, self._run_in_pieces)

    def _run_in_pieces(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """At most `max_tokens_per_rank` rows at a time; a row's result does not depend on the others."""
        limit = self.max_tokens_per_rank
        if hidden_states.shape[0] <= limit:
            return self._runner.run(hidden_states, topk_ids, topk_weights)
        y = torch.empty_like(hidden_states)
        for piece in zip(*(tensor.split(limit) for tensor in (hidden_states, topk_ids, topk_weights, y)), strict=True):
            self._runner.run(*piece)
        return y

    def run_across_ranks(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        self._note_call(hidden_states.shape[0])
        if self._shard.group is None:
            return self._runner.run(hidden_states, topk_ids, topk_weights)
        exchanging = cast("ExchangingRunner", self._runner)  # a shard has a group only where the kernel exchanges
        return exchanging.run_across_ranks(hidden_states, topk_ids, topk_weights, self._shard.group)

    def _note_call(self, num_tokens: int) -> None:
        figures = metrics(self._plan.kernel, compat.replica_rank())
        if READY.announce() and figures is not None:
            figures.ready(READY)
        if figures is not None:
            figures.count(self._runner, num_tokens)


def _as_source(checkpoint: CheckpointExperts) -> Any:
    """The checkpoint's tensors as the reference reads them; FP4 ones may be expanded for an FP8 kernel."""
    stored = Mxfp4Experts if checkpoint.w13.dtype is torch.int8 else Fp8BlockExperts
    return stored(checkpoint.w13, checkpoint.w13_scale, checkpoint.w2, checkpoint.w2_scale)
