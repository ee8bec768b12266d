"""The GPU model's training code: its forward pass is transformers', its quantisers are the checkpoint writer's."""

import pytest
import torch

from hopper_moe.eval.gpu_model import fake_quant
from hopper_moe.eval.gpu_model.config import CONFIG
from hopper_moe.eval.gpu_model.forward import forward
from hopper_moe.eval.gpu_model.state import initial_state, is_trained, whole_state
from hopper_moe.eval.tiny_model.config import build_model
from hopper_moe.quantization import codecs


@pytest.fixture
def state(seed: int) -> dict[str, torch.Tensor]:
    """Random everywhere: nothing at a neutral value that would hide it."""
    generator = torch.Generator().manual_seed(seed)
    state = initial_state(seed)
    for name, tensor in state.items():
        if is_trained(name):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05 if tensor.ndim > 1 else 0.3)
        elif name.endswith("bias"):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return state


def test_forward_is_transformers(state: dict[str, torch.Tensor], seed: int) -> None:
    model = build_model(seed, **CONFIG).eval()
    rest = model.state_dict()
    missing = {n for n in rest if n not in state}
    assert all("indexer" in n or "layers.1.self_attn.compressor" in n for n in missing), missing
    model.load_state_dict(whole_state(state, rest))
    ids = torch.randint(0, CONFIG["vocab_size"], (3, 52), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        ours, chosen = forward(state, ids, quantised=False, dtype=torch.float32)
        theirs = model(ids, use_cache=False).logits
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)
    assert all(c.shape == (3 * 52, CONFIG["num_experts_per_tok"]) for c in chosen.values())


def test_padding_after_the_end_changes_nothing(state: dict[str, torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, CONFIG["vocab_size"], (2, 40), generator=generator)
    other = torch.cat((ids[:, :30], torch.randint(0, CONFIG["vocab_size"], (2, 10), generator=generator)), 1)
    with torch.inference_mode():
        one, two = (forward(state, i, quantised=False, dtype=torch.float32)[0] for i in (ids, other))
    torch.testing.assert_close(one[:, :30], two[:, :30])


def test_every_trained_parameter_gets_a_gradient(state: dict[str, torch.Tensor], seed: int) -> None:
    trained = {n: t.requires_grad_() for n, t in state.items() if is_trained(n)}
    ids = torch.randint(0, CONFIG["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(seed))
    forward(state, ids, quantised=True, dtype=torch.float32)[0].square().sum().backward()
    assert [n for n, t in trained.items() if t.grad is None or not t.grad.isfinite().all() or not t.grad.any()] == []


def test_fake_quantisers_are_the_codecs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(256, 256, generator=generator) * torch.exp(torch.randn(256, 1, generator=generator))
    w[3, 32:64] = 0
    packed, scale = codecs.quantize_mxfp4(w)
    torch.testing.assert_close(fake_quant.mxfp4(w), codecs.dequantize_mxfp4(packed, scale, torch.float32), rtol=0, atol=0)
    q, scale = codecs.quantize_fp8_blocks(w)
    torch.testing.assert_close(fake_quant.fp8_blocks(w), codecs.dequantize_fp8_blocks(q, scale, dtype=torch.float32), rtol=0, atol=0)
    for group in (64, 128, 256):
        q, scale = codecs.quantize_activations(w, group)
        expected = codecs.dequantize_activations(q, scale, group, torch.float32)
        torch.testing.assert_close(fake_quant.activations(w, group), expected, rtol=1e-2, atol=1e-6)
