"""The parameters that are trained, and their way into the whole model: active heads only, transformers' names."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hopper_moe.eval.gpu_model.config import ACTIVE_HEADS_PER_GROUP, CONFIG

BUFFERS = ("tid2eid", "e_score_correction_bias")
_C = CONFIG
_GROUPS, _HEAD = _C["o_groups"], _C["head_dim"]
_HEADS = _GROUPS * ACTIVE_HEADS_PER_GROUP


def _layer(index: int) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """(name, shape, standard deviation at the start; 0 and 1 are constants) of one layer."""
    hidden, inner, experts = _C["hidden_size"], _C["moe_intermediate_size"], _C["n_routed_experts"]
    latent, streams = _C["q_lora_rank"], _C["hc_mult"]
    low = _GROUPS * _C["o_lora_rank"]
    for site in ("attn_hc", "ffn_hc"):
        yield f"{site}.fn", ((2 + streams) * streams, streams * hidden), 0.02
        yield f"{site}.base", ((2 + streams) * streams,), 0
        yield f"{site}.scale", (3,), 1
    yield "input_layernorm.weight", (hidden,), 1
    yield "post_attention_layernorm.weight", (hidden,), 1
    yield "self_attn.q_a_proj.weight", (latent, hidden), hidden**-0.5
    yield "self_attn.q_a_norm.weight", (latent,), 1
    yield "self_attn.q_b_proj.weight", (_HEADS * _HEAD, latent), latent**-0.5
    yield "self_attn.kv_proj.weight", (_HEAD, hidden), hidden**-0.5
    yield "self_attn.kv_norm.weight", (_HEAD,), 1
    yield "self_attn.sinks", (_HEADS,), 0
    yield "self_attn.o_a_proj.weight", (low, ACTIVE_HEADS_PER_GROUP * _HEAD), 0.5 * (ACTIVE_HEADS_PER_GROUP * _HEAD) ** -0.5
    yield "self_attn.o_b_proj.weight", (hidden, low), 0.5 * low**-0.5
    if _C["compress_ratios"][index] == 4:
        for part in ("kv_proj", "gate_proj"):
            yield f"self_attn.compressor.{part}.weight", (2 * _HEAD, hidden), hidden**-0.5
        yield "self_attn.compressor.position_bias", (4, 2 * _HEAD), 0
        yield "self_attn.compressor.kv_norm.weight", (_HEAD,), 1
    yield "mlp.gate.weight", (experts, hidden), hidden**-0.5
    yield "mlp.experts.gate_up_proj", (experts, 2 * inner, hidden), hidden**-0.5
    yield "mlp.experts.down_proj", (experts, hidden, inner), 0.5 * inner**-0.5
    for part, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))):
        yield f"mlp.shared_experts.{part}.weight", shape, shape[1] ** -0.5


def initial_state(seed: int) -> dict[str, torch.Tensor]:
    """Fresh FP32 parameters and the routing buffers (`tid2eid`: int64 [vocab, top_k], distinct experts per token)."""
    generator = torch.Generator().manual_seed(seed)
    vocab, hidden, streams = _C["vocab_size"], _C["hidden_size"], _C["hc_mult"]
    shapes: list[tuple[str, tuple[int, ...], float]]
    shapes = [("model.embed_tokens.weight", (vocab, hidden), 0.1), ("lm_head.weight", (vocab, hidden), 0.02)]
    shapes += [("model.norm.weight", (hidden,), 1), ("model.hc_head.hc_fn", (streams, streams * hidden), 0.02)]
    shapes += [("model.hc_head.hc_base", (streams,), 0), ("model.hc_head.hc_scale", (1,), 1)]
    for index in range(_C["num_hidden_layers"]):
        shapes += [(f"model.layers.{index}.{name}", shape, std) for name, shape, std in _layer(index)]
    state = {
        name: torch.full(shape, float(std)) if std in (0, 1) else torch.randn(shape, generator=generator) * std
        for name, shape, std in shapes
    }
    for index in range(_C["num_hidden_layers"]):
        gate = f"model.layers.{index}.mlp.gate"
        if index < _C["num_hash_layers"]:
            scores = torch.rand(vocab, _C["n_routed_experts"], generator=generator)
            state[f"{gate}.tid2eid"] = scores.topk(_C["num_experts_per_tok"]).indices
        else:
            state[f"{gate}.e_score_correction_bias"] = torch.zeros(_C["n_routed_experts"])
    return state


def is_trained(name: str) -> bool:
    return not name.endswith(BUFFERS)


def whole_state(state: dict[str, torch.Tensor], rest: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of transformers' model: `state` with its heads put in place among heads of zeros, the untrained tensors
    (indexer, ratio-128 compressor) from `rest`, a freshly built model's state dict.
    """
    heads = _C["num_attention_heads"]
    whole = dict(rest)
    for name, tensor in state.items():
        last = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if last == "q_b_proj":
            tensor = _place(tensor.view(_GROUPS, -1, _HEAD, tensor.shape[1]), heads, 1).reshape(heads * _HEAD, -1)
        elif last == "sinks":
            tensor = _place(tensor.view(_GROUPS, -1), heads, 1).flatten()
        elif last == "o_a_proj":
            tensor = _place(tensor.unflatten(1, (-1, _HEAD)), heads, 1).flatten(1)
        assert whole[name].shape == tensor.shape, (name, whole[name].shape, tensor.shape)
        whole[name] = tensor
    for name in rest:
        if name.endswith("compressor.kv_norm.weight") and name not in state:
            # The first entry of a ratio-128 layer appears at token 128, longer than anything trained on: keep it weak.
            whole[name] = torch.full_like(rest[name], 0.01)
    return whole


def _place(tensor: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """Append heads of zeros along `dim` until every group has heads / o_groups of them."""
    shape = list(tensor.shape)
    shape[dim] = heads // _GROUPS - shape[dim]
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)
