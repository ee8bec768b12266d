"""SGLang's quantisation method for routed experts: loads parameters in the checkpoint's types, packs them, calls one kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.moe.utils import get_moe_a2a_backend
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from hopper_moe.quantization import layout
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.expert_tensors import MARK, ExpertTensors
from hopper_moe.quantization.layer_backend import CheckpointExperts, LayerBackend
from hopper_moe.quantization.sglang_checks import CHECKPOINT_PARAMETERS, TensorCheck
from hopper_moe.quantization.sglang_loading import LoadLedger, pack_layer
from hopper_moe.quantization.sglang_refresh import RefreshLedger, staging_shapes

if TYPE_CHECKING:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE


class HopperMoEMethod(FusedMoEMethodBase):
    """One object per layer.

    Args:
        fp8_method: SGLang's Fp8MoEMethod, which creates the parameters; nothing else of it is used.
        prefix: the layer's name.
        backend: what runs the layer.
    """

    fuse_routed_scaling_factor_in_topk = True  # SGLang multiplies the routed scaling factor into the top-k weights

    _ledger: LoadLedger  # from `create_weights` on
    _refresh: RefreshLedger  # from `process_weights_after_loading` on

    def __init__(self, fp8_method: Any, prefix: str, backend: LayerBackend) -> None:
        self._fp8, self._prefix, self._backend = fp8_method, prefix, backend

    # ---- construction

    def create_weights(
        self,
        layer: FusedMoE,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The checkpoint's tensors, E and I of this rank: see `CheckpointExperts`; the scales' names end in `_scale_inv`."""
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
        self._check = TensorCheck(layer, self._prefix, layer.moe_ep_rank * num_experts)
        self._ledger = LoadLedger(layer, self._check)

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: Any) -> None:
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
        self._backend.build(layer, config)

    def get_moe_runner_backend(self, layer: FusedMoE) -> None:
        """None: SGLang's standard top-k."""

    # ---- after loading

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Check that every tensor was loaded, pack, pass to the kernel. A later call ends a refresh, if there was one."""
        if getattr(layer, MARK, False):
            self._refresh.end()
            return
        self._ledger.require_complete()
        checkpoint = CheckpointExperts(*(getattr(layer, name).data for name in CHECKPOINT_PARAMETERS))
        staging = staging_shapes(layer)
        packed_type = self._backend.choose_format(checkpoint)
        self._backend.expect(checkpoint)
        if packed_type is None:
            experts: ExpertTensors | CheckpointExperts = checkpoint
        else:
            del checkpoint  # so that `pack_layer` frees the originals
            experts = pack_layer(layer, packed_type)
        self._ledger.close()
        self._refresh = RefreshLedger(layer, self._check, staging, experts, self._backend.require_fit)
        # Ids stay global: converting them to local ones and back costs eight launches a layer.
        layer.dispatcher.skip_local_expert_mapping = True
        layer._mega_moe_weights_built = self._backend.exchanges
        setattr(layer, MARK, True)
        self._backend.prepare(experts)
        for number, tensor in enumerate(self._backend.kept_tensors):  # SGLang saves and restores buffers
            layer.register_buffer(f"hopper_moe_kept_{number}", tensor, persistent=False)
        self._backend.add_ready(list(layer.parameters()))

    def restore_weights_before_loading(self, layer: FusedMoE) -> None:
        """SGLang opens a weight update: whatever an earlier one left unfinished is dropped."""
        if getattr(layer, MARK, False):
            self._refresh.begin()

    @property
    def refresh(self) -> RefreshLedger:
        """Of the packed layer."""
        return self._refresh

    # ---- forward

    def apply(self, layer: FusedMoE, dispatch_output: Any) -> Any:
        """Standard dispatcher: partial sums of this rank's experts for every row; SGLang adds the ranks up. DeepEP's normal
        mode: the same for the rows that chose an expert of this rank, and DeepEP adds up. Its low-latency mode: each expert's
        own outputs, which DeepEP weights too."""
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        self._refresh.require_whole()
        if dispatch_output.format.is_deepep_normal():
            return self._run_received(layer, dispatch_output)
        if dispatch_output.format.is_deepep_ll():
            return self._run_blocks(layer, dispatch_output)
        hidden_states = dispatch_output.hidden_states
        if get_moe_a2a_backend().is_megamoe():
            raise Refusal(
                f"{self._prefix}: {hidden_states.shape[0]} tokens came past the fused exchange, whose limit is "
                f"{self._backend.max_tokens_per_rank} per rank: raise HOPPER_MOE_MAX_TOKENS_PER_RANK or lower "
                "--chunked-prefill-size."
            )
        if not dispatch_output.format.is_standard() or dispatch_output.hidden_states_scale is not None:
            raise Refusal(
                f"{self._prefix}: expected BF16 rows in SGLang's standard layout, got {type(dispatch_output).__name__}."
            )
        topk = dispatch_output.topk_output
        weights = _weights(topk.topk_weights, self._scale(layer))
        output = self._backend.run(hidden_states, topk.topk_ids.to(torch.int32), weights)
        return StandardCombineInput(hidden_states=output)

    def _run_received(self, layer: FusedMoE, received: Any) -> Any:
        """Rows bf16 [N, H] from all ranks, each once; ids [N, K] count this rank's experts from 0, -1 is an expert elsewhere.

        Returns a DeepEPNormalCombineInput of bf16 [N, H]: the weighted sum of a row's slots here.
        """
        from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPNormalCombineInput

        rows = self._unrounded(received)
        weights = _weights(received.topk_weights, self._scale(layer))
        output = self._backend.run(rows, received.topk_ids.to(torch.int32), weights)
        return DeepEPNormalCombineInput(output, received.topk_ids, received.topk_weights)

    def _run_blocks(self, layer: FusedMoE, received: Any) -> Any:
        """Rows bf16 [E, M, H] in a block for each of this rank's experts, the first `masked_m` int32 [E] of them valid. Ids and
        weights [n, K] are those of the rows that this rank sent, for the way back.

        Returns a DeepEPLLCombineInput of bf16 [E, M, H]: a row's output of its block's expert alone, which DeepEP multiplies by
        the weight where the row came from.
        """
        from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLCombineInput

        blocks = self._unrounded(received)
        output = self._backend.run_blocks(blocks, received.masked_m, received.topk_ids.shape[0])
        return DeepEPLLCombineInput(output, received.topk_ids, _weights(received.topk_weights, self._scale(layer)))

    def _unrounded(self, received: Any) -> torch.Tensor:
        """The rows that DeepEP brought. Raises `Refusal` where it rounded them."""
        rows: torch.Tensor = received.hidden_states
        if received.hidden_states_scale is not None or rows.dtype is not torch.bfloat16:
            raise Refusal(
                f"{self._prefix}: DeepEP brought {rows.dtype} rows, but the kernel takes BF16: drop "
                "--deepep-dispatcher-output-dtype."
            )
        return rows

    def _scale(self, layer: FusedMoE) -> float | None:
        """What SGLang's top-k has not multiplied in yet."""
        return 1.0 if layer.should_fuse_routed_scaling_factor_in_topk else self._config.routed_scaling_factor

    def run_mega(
        self,
        layer: FusedMoE,
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
        **of_other_gpus: Any,
    ) -> torch.Tensor:
        """The "megamoe" exchange: complete sums for this rank's rows. Every rank calls it, also with 0 tokens.

        Ids are global (physical) here. `routed_scaling_factor` is what SGLang has not multiplied in yet: 1.0 if its top-k has.
        Returns a fresh bf16 [num_tokens, hidden_size].
        """
        self._refresh.require_whole()
        self._check_mega_call(hidden_size, top_k, activation_clamp, num_tokens, of_other_gpus)
        if topk_ids is None:
            topk_ids = hidden_states.new_empty((0, top_k), dtype=torch.int32)
            topk_weights = hidden_states.new_empty((0, top_k), dtype=torch.float32)
        assert topk_weights is not None  # SGLang gives both or neither
        weights = _weights(topk_weights, routed_scaling_factor)
        return self._backend.run_across_ranks(hidden_states, topk_ids.to(torch.int32), weights)

    def _check_mega_call(
        self, hidden_size: int, top_k: int, limit: float | None, num_tokens: int, of_other_gpus: dict[str, Any]
    ) -> None:
        """Raises `Refusal` for a call that this layer was not built for."""
        usual = {"activation": "swiglu", "num_shared_experts": 0, "routing_in_buffer": False}
        for name, value in of_other_gpus.items():
            if value != usual.get(name):
                raise Refusal(f"{self._prefix}: SGLang asks for {name}={value} inside the kernel, which does not have it.")
        config = self._config
        if (hidden_size, top_k, limit) != (config.hidden_size, config.top_k, config.swiglu_limit):
            raise Refusal(
                f"{self._prefix}: called for hidden_size {hidden_size}, top_k {top_k}, swiglu_limit {limit}, but built for "
                f"{config.hidden_size}, {config.top_k}, {config.swiglu_limit}: the model's config changed after loading."
            )
        if num_tokens > self._backend.max_tokens_per_rank:
            raise Refusal(
                f"{self._prefix}: {num_tokens} tokens exceed the {self._backend.max_tokens_per_rank} per rank that the buffer "
                "was sized for: raise HOPPER_MOE_MAX_TOKENS_PER_RANK or lower --chunked-prefill-size."
            )


def _weights(topk_weights: torch.Tensor, routed_scaling_factor: float | None) -> torch.Tensor:
    """FP32 weights with the routed scaling factor in them, exactly once."""
    weights = topk_weights.float()
    return weights if routed_scaling_factor in (None, 1.0) else weights * routed_scaling_factor
