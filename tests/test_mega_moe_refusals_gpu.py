"""What the fused kernel's Python face refuses, before anything is launched."""

from __future__ import annotations

import pytest
import torch
from mega_moe_rig import Rig, make_rig

from hopper_moe.kernels.benchmarks.workload import ModelShape
from hopper_moe.quantization.errors import Refusal

pytestmark = pytest.mark.gpu
SHAPE = ModelShape(256, 128, 4, 2, 4)
CAPACITY = 16


@pytest.fixture(scope="module")
def rig() -> Rig:
    return make_rig(1, SHAPE, 4, CAPACITY)


BAD_CALLS = {
    "hidden_states is torch.float16": lambda b: {"hidden_states": b["hidden_states"].half()},
    "hidden_states is .*128": lambda b: {"hidden_states": b["hidden_states"][:, :128].contiguous()},
    "hidden_states is .*not a contiguous": lambda b: {"hidden_states": b["hidden_states"].T.contiguous().T},
    "hidden_states is .*cpu": lambda b: {"hidden_states": b["hidden_states"].cpu()},
    "topk_ids is torch.int64": lambda b: {"topk_ids": b["topk_ids"].long()},
    r"topk_ids is .*\[8, 1\]": lambda b: {"topk_ids": b["topk_ids"][:, :1].contiguous()},
    r"topk_ids is .*\[7, 2\]": lambda b: {"topk_ids": b["topk_ids"][:7]},
    "topk_weights is torch.bfloat16": lambda b: {"topk_weights": b["topk_weights"].bfloat16()},
    "topk_weights is .*cpu": lambda b: {"topk_weights": b["topk_weights"].cpu()},
    "num_valid_tokens is torch.int64": lambda b: {"num_valid_tokens": torch.tensor([3], device="cuda")},
    "out is torch.float32": lambda b: {"out": b["hidden_states"].float()},
    r"out is .*\[7, 256\]": lambda b: {"out": b["hidden_states"][:7]},
}


@pytest.mark.parametrize("words", BAD_CALLS)
def test_bad_arguments(rig, words):
    batch = rig.batch(8)
    good = {"hidden_states": batch.x, "topk_ids": batch.topk_ids, "topk_weights": batch.topk_weights}
    with pytest.raises(ValueError, match=words):
        rig.mm(**{**good, **BAD_CALLS[words](good)}, packed=rig.packed, swiglu_limit=None)


def test_more_tokens_than_capacity(rig):
    rig.run(rig.batch(CAPACITY))
    with pytest.raises(Refusal, match=f"{CAPACITY + 1} tokens are above the capacity {CAPACITY}"):
        rig.run(rig.batch(CAPACITY + 1))


def test_other_weights(rig):
    for other in (ModelShape(384, 128, 4, 2, 4), ModelShape(256, 256, 4, 2, 4)):
        packed, batch = make_rig(1, other, 4, 1).packed, rig.batch(1)
        with pytest.raises(ValueError, match="packed experts"):
            rig.mm(batch.x, batch.topk_ids, batch.topk_weights, packed, swiglu_limit=None)
