"""A launch as the rules read it: SGLang's arguments before or after SGLang has resolved them.

The plugin's hooks use it with resolved arguments, `serve` and `doctor` with parsed ones. Before resolution, values that SGLang
derives from other arguments are derived here in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hopper_moe.moe_backends.kernel_specs import KernelSpec
from hopper_moe.moe_backends.sglang.plan import BACKEND, DEEPEP_EXCHANGE, FUSED_EXCHANGE, NO_EXCHANGE


@dataclass(frozen=True)
class LaunchView:
    """`args` has SGLang's field names. `is_resolved`: its values are final; otherwise None means SGLang's own choice."""

    args: Any
    is_resolved: bool

    def option(self, field: str) -> Any:
        """The value of an argument; None where it is off in any of SGLang's spellings (None, False, 0, "", "none", empty)."""
        value = getattr(self.args, field, None)
        return None if not value or value == "none" or value == "off" else value

    @property
    def asks_for_us(self) -> bool:
        """Whether the launch selects this backend for target or draft layers."""
        return BACKEND in (self.args.moe_runner_backend, self.args.speculative_moe_runner_backend)

    @property
    def asks_for_determinism(self) -> str | None:
        """The argument after which no result may depend on the batch; None: not given."""
        if target := self.option("rl_on_policy_target"):
            return f"--rl-on-policy-target {target}"
        return "--enable-deterministic-inference" if self.option("enable_deterministic_inference") else None

    @property
    def attn_dp_size(self) -> int:
        """Ranks of attention data parallelism; 1 without it."""
        if self.args.enable_dp_attention and self.args.attn_dp_size == 1:
            return self.args.dp_size
        return self.args.attn_dp_size

    @property
    def num_replicas(self) -> int:
        """Replicas of the whole model; with the older --enable-dp-attention, --dp-size counts attention ranks instead."""
        folded = self.args.enable_dp_attention and self.args.attn_dp_size == 1
        return 1 if folded else self.args.dp_size

    def exchange(self, spec: KernelSpec) -> str:
        """The value of `--moe-a2a-backend` that this kernel requires. With attention data parallelism that is the kernel's own
        exchange inside a host, and DeepEP for a stage that spans hosts; DeepEP serves every kernel if it is asked for."""
        asked = self.args.moe_a2a_backend
        if asked == DEEPEP_EXCHANGE or not spec.multi_rank or self.attn_dp_size == 1:
            return asked
        return DEEPEP_EXCHANGE if asked == NO_EXCHANGE and self.nodes_per_stage > 1 else FUSED_EXCHANGE

    def ep_size(self, spec: KernelSpec) -> int:
        """Expert-parallel ranks. An exchange spreads experts over all ranks of a pipeline stage."""
        return self.args.tp_size if self.exchange(spec) in (FUSED_EXCHANGE, DEEPEP_EXCHANGE) else self.args.ep_size

    @property
    def deepep_mode(self) -> str:
        """The value of `--deepep-mode` where DeepEP moves the tokens: "normal", "low_latency", or "auto", which prefills in the
        one and decodes in the other. Where DeepEP itself was not asked for, "auto" is nobody's wish, and the mode is normal."""
        asked = self.args.deepep_mode
        return "normal" if self.args.moe_a2a_backend == NO_EXCHANGE and asked == "auto" else asked

    @property
    def ranks_per_node(self) -> int:
        return max(self.args.tp_size * self.args.pp_size // max(self.args.nnodes, 1), 1)

    @property
    def nodes_per_stage(self) -> int:
        """Hosts that share one pipeline stage; SGLang gives a stage neighbouring hosts, or a host neighbouring stages."""
        return max(self.args.nnodes // max(self.args.pp_size, 1), 1)

    @property
    def local_stages(self) -> range:
        """The pipeline stages of this host (--node-rank)."""
        count = max(self.args.pp_size // self.args.nnodes, 1)
        first = count * (self.args.node_rank // self.nodes_per_stage)
        return range(first, first + count)

    def node_of(self, stage: int) -> int:
        """The host that holds those ranks of a pipeline stage that talk to this host's: the same ones within their stage."""
        return stage // len(self.local_stages) * self.nodes_per_stage + self.args.node_rank % self.nodes_per_stage

    @property
    def local_ranks(self) -> range:
        """The ranks of this host within each of its stages."""
        count = self.args.tp_size // self.nodes_per_stage
        first = count * (self.args.node_rank % self.nodes_per_stage)
        return range(first, first + count)

    @property
    def chunked_prefill_size(self) -> int | None:
        """Tokens of a prefill chunk on one rank; 0 or less: unbounded; None: unknown before resolution."""
        chunk = self.args.chunked_prefill_size
        if chunk is None or chunk <= 0:
            return chunk
        if not self.is_resolved:  # `handle_data_parallelism` divides it
            chunk = max(chunk // self.attn_dp_size, 1)
        return -(-chunk // self._cp_size)

    @property
    def _cp_size(self) -> int:
        """Context-parallel ranks, which divide the tokens of one prefill chunk."""
        size = getattr(self.args, "attn_cp_size", None) or 1
        return size if getattr(self.args, "enable_prefill_cp", False) else 1

    @property
    def has_dynamic_chunks(self) -> bool:
        return self.args.enable_dynamic_chunking and self.args.pp_size > 1

    @property
    def required_tokens(self) -> int:
        """Largest number of tokens of one rank in a layer call with the fused exchange, as far as it is known.

        SGLang's own check divides the chunk by the attention-DP size a second time and accepts budgets that are too small. Rows
        are padded to the attention-TP size.
        """
        args, align = self.args, self.attn_tp_size
        tokens = max(0 if args.disaggregation_mode == "decode" else self.largest_chunk, self._decode_tokens)
        return -(-tokens // align) * align

    @property
    def attn_tp_size(self) -> int:
        """Ranks that share the tokens of one attention data-parallel rank."""
        return max(self.args.tp_size // self.attn_dp_size // (getattr(self.args, "attn_cp_size", None) or 1), 1)

    @property
    def tokens_per_request(self) -> int:
        """Of one decode step; with speculation as far as it is known."""
        return (self.args.speculative_num_draft_tokens or 1) if self.args.speculative_algorithm else 1

    @property
    def _decode_tokens(self) -> int:
        args = self.args
        requests = (args.cuda_graph_config.decode.max_bs or 0) if args.cuda_graph_config else 0
        if args.max_running_requests:
            requests = max(requests, -(-args.max_running_requests // self.attn_dp_size))
        return requests * self.tokens_per_request

    @property
    def largest_chunk(self) -> int:
        """With pipeline stages --enable-dynamic-chunking sizes a chunk anew at every step, up to --max-prefill-tokens, after it
        has timed chunks of 1.25 times --chunked-prefill-size."""
        chunk = self.chunked_prefill_size or 0
        if not self.has_dynamic_chunks:
            return chunk
        return max(chunk, math.ceil(1.25 * chunk), self.args.max_prefill_tokens or 0)

    def graph_backend(self, phase: str) -> str:
        """The CUDA graph backend of "decode" or "prefill"; "disabled": none, or none requested yet."""
        if self.args.cuda_graph_config:
            return getattr(self.args.cuda_graph_config, phase).backend
        return getattr(self.args, f"cuda_graph_backend_{phase}") or "disabled"
