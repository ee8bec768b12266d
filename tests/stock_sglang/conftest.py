"""These tests import stock SGLang, which changes transformers for the whole process, so `test_stock_sglang.py` runs them in
a process of their own. Run them alone with `STOCK_SGLANG=1 pytest tests/stock_sglang`.
"""

import os
from pathlib import Path

import pytest

if "STOCK_SGLANG" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    # A name that only we would set; the kernel of every launch here unless a test says otherwise.
    os.environ["HOPPER_MOE_KERNEL"] = "reference"


@pytest.fixture(scope="session", autouse=True)
def plugged() -> None:
    """SGLang as in a server process on SM90: platform, then plugins."""
    import stock

    stock.simulate_sm90()
    from sglang.srt.plugins import load_plugins

    load_plugins()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A DeepSeek-V4 folder with FP4 experts, as far as argument resolution reads it."""
    import stock

    return stock.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    """What building the model asks of a GPU or of a tokenizer, none of it about parameters."""
    import torch
    from sglang.srt.layers.rotary_embedding import base, rope_variant
    from sglang.srt.models import deepseek_v4

    monkeypatch.setattr(torch.cuda, "Stream", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_args: (9, 0))
    monkeypatch.setattr(base, "_is_cuda", True)
    monkeypatch.setattr(rope_variant, "get_device", lambda *_args: "cpu")
    monkeypatch.setattr(deepseek_v4.EngramHasher, "from_config", lambda *_args, **_kwargs: torch.nn.Module())


@pytest.fixture(autouse=True)
def clean_environment():
    """A launch leaves notes in the environment; the next test starts without them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def reference_in_place_of_fp8_mega(monkeypatch) -> None:
    """Launches take `fp8_mega`, and the reference its place, on the very tensors that the kernel would get; so does the
    self-check."""
    from hopper_moe.kernels.reference import moe_layer
    from hopper_moe.moe_backends.runners.fp8_mega import Fp8MegaRunner

    def prepare(self, experts, shard):
        self.given = experts, shard

    def run(self, x, ids, weights):
        experts, shard = self.given
        return moe_layer(x, ids, weights, experts, swiglu_limit=shard.swiglu_limit, first_expert=shard.first_expert)

    monkeypatch.setattr(Fp8MegaRunner, "prepare", prepare)
    monkeypatch.setattr(Fp8MegaRunner, "run", run)
    monkeypatch.setenv("HOPPER_MOE_KERNEL", "fp8_mega")
