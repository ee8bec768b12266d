"""Weights and routing of `w4a16` as far as they can be checked without a GPU: FlashInfer's layouts, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layer_data import make_layer

from hopper_moe.kernels.w4a16 import tuning_batch
from hopper_moe.moe_backends.registry import create_runner
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing_w4a16 import InterleavedExperts, interleave_scale, up_first

pytest.importorskip("flashinfer")


def test_the_runner_names_its_weight_format():
    runner = create_runner("w4a16")
    assert runner.experts_type is InterleavedExperts and InterleavedExperts.holds_every_row


def test_experts_take_as_many_bytes_as_in_the_checkpoint(seed):
    layer = make_layer(seed, num_experts=2, hidden_size=256, intermediate_size=128)
    experts = InterleavedExperts.empty(2, 256, 128, "cpu")
    tensors = (experts.w13_interleaved, experts.w13_interleaved_scale, experts.w2_interleaved, experts.w2_interleaved_scale)
    assert sum(t.numel() for t in tensors) == sum(t.numel() for t in layer.weights)
    assert all(t.shape[0] == 2 for t in tensors), "EPLB moves an expert by copying dim 0"
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size) == (2, 256, 128)


def test_up_comes_before_gate(seed):
    layer = make_layer(seed, intermediate_size=128)
    turned = up_first(layer.w13[1])
    assert torch.equal(turned[:128], layer.w13[1, 128:]) and torch.equal(turned[128:], layer.w13[1, :128])


def test_flashinfers_scales_are_a_permutation_within_rows_and_blocks(seed):
    """Whatever the installed version's order: every byte once, and a scale never leaves its block of 128 k."""
    rows, groups = 128, 16
    place = torch.arange(rows * groups).view(rows, groups)
    low, high = (place % 256).to(torch.uint8), (place // 256).to(torch.uint8)
    at = interleave_scale(low).long() + 256 * interleave_scale(high).long()
    assert torch.equal(at.sort().values, place.flatten())
    fours = at.view(-1, 4)
    assert torch.equal(fours, fours[:, :1] + torch.arange(4)), "the four scales of 128 k of a row stay together"


@pytest.mark.parametrize("sizes", [(192, 128), (128, 64), (4096, 288)])
def test_slices_that_are_no_multiple_of_128_are_refused(sizes):
    with pytest.raises(Refusal, match="not a positive multiple of 128"):
        InterleavedExperts.empty(1, *sizes, "cpu")


def test_storing_needs_the_gpu_and_scales_that_the_kernel_can_read(seed):
    layer = make_layer(seed, num_experts=1, hidden_size=256, intermediate_size=128)
    experts = InterleavedExperts.empty(1, 256, 128, "cpu")
    with pytest.raises(ValueError, match="move them from cpu to the GPU"):
        experts.store(0, *(t[0] for t in layer.weights))
    layer.w2_scale[0, 3, 1] = 0
    with pytest.raises(Refusal, match="w2 of local expert 0 has a scale byte 0"):
        experts.store(0, *(t[0] for t in layer.weights))


def test_an_expert_named_twice_gets_the_sum_of_its_weights(seed_block):
    """In Triton's interpreter, which has to be chosen before Triton is imported."""
    program = f"from merge_check import check\nfor seed in {seed_block}: print('seed', seed), check(seed, 'cpu')"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])  # PYTHONSAFEPATH hides the folder
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_merging_compiles_for_hopper():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hopper_moe.kernels.merge_slots import _merge

    tensors = {"ids_in": "*i32", "weights_in": "*fp32", "ids_out": "*i32", "weights_out": "*fp32", "num_tokens": "i32"}
    constants = {"top_k": 6, "block": 64}
    source = ASTSource(fn=_merge, signature=tensors | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_tuning_gives_the_kernel_its_types_whatever_the_default_is():
    """A server failed here: SGLang sets the default type to the model's while it loads."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        x, ids, weights = tuning_batch(5, 128, 2, 4, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (x.dtype, ids.dtype, weights.dtype) == (torch.bfloat16, torch.int32, torch.float32)
    assert x.shape == (5, 128) and ids.shape == weights.shape == (5, 2) and sorted(ids.unique().tolist()) == [0, 1, 2, 3]
