"""Which kernel runs and why; what a layer must look like; and that making a runner imports only its own module."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from hopper_moe.kernels.device import SM90
from hopper_moe.kernels.measured import gpus
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends import registry
from hopper_moe.moe_backends.env import load
from hopper_moe.moe_backends.kernel_specs import REGISTRY
from hopper_moe.moe_backends.registry import choose, create_runner, layer_refusals
from hopper_moe.quantization.errors import Refusal

H200 = gpus()["H200"]


def shard(hidden_size: int, intermediate_size: int, num_experts: int, top_k: int, ep_size: int = 1) -> ExpertShard:
    return ExpertShard(
        num_experts=num_experts,
        first_expert=0,
        num_local_experts=num_experts // ep_size,
        top_k=top_k,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        swiglu_limit=10.0,
        max_tokens_per_rank=8192,
    )


FLASH = shard(4096, 2048, 256, 6)


@pytest.mark.parametrize(
    "capability, kernel",
    [(SM90, "mxfp4_mega"), (None, "reference"), ((8, 0), "reference"), ((10, 0), "reference"), ((12, 0), "reference")],
)
def test_auto_takes_the_best_that_runs_and_logs_why(capability, kernel, caplog):
    with caplog.at_level(logging.INFO, logger="hopper_moe"):
        choice = choose(load({}), capability)
    assert choice.spec.name == kernel
    assert [record.getMessage() for record in caplog.records] == [f"kernel {kernel}: {choice.reason}"]
    if kernel == "reference":
        assert "mxfp4_mega, fp8_mega, w4a16 (needs compute capability 9.0" in choice.reason


def test_auto_stays_within_what_older_switches_allow():
    assert choose(load({"SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "0"}), SM90).spec.name == "w4a16"
    assert choose(load({"SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "1"}), SM90).spec.name == "mxfp4_mega"


def test_auto_asks_the_measured_table_once_the_layer_is_known(monkeypatch, caplog):
    asked = []

    def fastest(kernels, device, layer, tokens):
        asked.append((kernels, device, layer, tokens))
        return "w4a16", "because a test says so"

    monkeypatch.setattr(registry, "fastest", fastest)
    shape = shard(4096, 2048, 256, 6, ep_size=8)
    with caplog.at_level(logging.INFO, logger="hopper_moe"):
        choice = choose(load({}), SM90, device=H200, shard=shape, prefill_only=True)
    assert choice.spec.name == "w4a16" and "kernel w4a16: because a test says so" in caplog.text
    ((kernels, device, layer, tokens),) = asked
    assert set(kernels) >= {"mxfp4_mega", "w4a16"} and "reference" not in kernels and tokens == registry.PREFILL
    assert (device, layer.num_local_experts, layer.num_ranks) == (H200, 32, 8)
    monkeypatch.setattr(registry, "fastest", lambda *args: None)
    choice = choose(load({}), SM90, device=H200, shard=shape)
    assert choice.spec.name == "mxfp4_mega" and "no measurement compares" in choice.reason
    assert choose(load({"HOPPER_MOE_KERNEL": "w4a16"}), SM90, device=H200, shard=shape).spec.name == "w4a16"


def test_auto_leaves_out_what_cannot_serve_the_layer(monkeypatch):
    monkeypatch.setattr(registry, "fastest", lambda kernels, *rest: pytest.fail(f"only one of {kernels} can serve 640 experts"))
    shape = shard(4096, 2048, 640, 6)
    assert choose(load({}), SM90, device=H200, shard=shape).spec.name == "w4a16"


def test_a_kernel_of_a_package_that_is_missing_is_passed_over_by_auto_and_refused_by_name(monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    choice = choose(load({"SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "0"}), SM90)
    assert choice.spec.name == "reference" and "w4a16 (needs flashinfer" in choice.reason
    with pytest.raises(Refusal, match="HOPPER_MOE_KERNEL=w4a16: needs flashinfer, which is not installed"):
        choose(load({"HOPPER_MOE_KERNEL": "w4a16"}), SM90)


def test_a_named_kernel_is_taken_as_named():
    assert choose(load({"HOPPER_MOE_KERNEL": "reference"}), SM90).spec.name == "reference"


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_layer_gets_a_runner_of_its_own(name):
    runner = create_runner(name)
    assert callable(runner.prepare) and callable(runner.run)
    assert create_runner(name) is not runner


@pytest.mark.parametrize("option", ["HOPPER_MOE_FP8_COMBINE", "HOPPER_MOE_FP4_DISPATCH", "DG_USE_FP8_COMBINE", "DG_USE_FP4_ACTS"])
def test_options_of_other_kernels_are_refused_by_the_name_that_was_set(option, monkeypatch):
    with monkeypatch.context() as without_packages:  # that FlashInfer is missing here must not be the reason
        without_packages.setitem(REGISTRY, "w4a16", replace(REGISTRY["w4a16"], package=None))
        with pytest.raises(Refusal, match=f"unset {option}") as refused:
            choose(load({option: "1", "HOPPER_MOE_KERNEL": "w4a16"}), SM90)
        assert "in this release" in str(refused.value)
        assert choose(load({option: "1"}), SM90).spec.name == "mxfp4_mega", "auto takes a kernel that has the option"
    assert choose(load({option: "1"}), None).spec.name == "reference"


@pytest.mark.parametrize(
    "shape",
    [
        FLASH,
        shard(7168, 3072, 384, 6),
        shard(7168, 2048, 256, 8),
        shard(5120, 2304, 384, 6),
        shard(5120, 2304, 384 + 64, 6, ep_size=8),  # with redundant experts
        shard(5120, 2304, 1024, 6, ep_size=4),
    ],
)
@pytest.mark.parametrize("name", ["mxfp4_mega", "reference"])
def test_published_shapes_are_served(name, shape):
    assert layer_refusals(REGISTRY[name], shape, "fp4") == []


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden_size": 4095}, "hidden_size 4095"),
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"intermediate_size": 192}, "intermediate_size 192"),
        ({"num_experts": 0, "top_k": 1}, "num_experts 0"),
        ({"top_k": 17}, "top_k 17"),
        ({"top_k": 0}, "top_k 0"),
        ({"num_experts": 4}, "top_k 6 is outside 1..4"),
        ({"num_experts": 1032, "num_local_experts": 129}, "num_experts 1032 is above 1024"),
        ({"num_experts": 448, "num_local_experts": 448}, "448 experts on one rank are above 400, the limit of the fused kernel"),
        ({"num_experts": 1024, "num_local_experts": 512}, "use --ep-size 4 or more"),
    ],
)
def test_each_wrong_size_is_one_sentence(change, said):
    refusals = layer_refusals(REGISTRY["mxfp4_mega"], replace(FLASH, **change), "fp4")
    assert len(refusals) == 1 and said in refusals[0] and refusals[0].endswith(".")


@pytest.mark.parametrize("dtype", ["fp8", "bf16"])
def test_other_experts_are_refused_and_unknown_ones_left_to_the_loader(dtype):
    (refusal,) = layer_refusals(REGISTRY["mxfp4_mega"], FLASH, dtype)
    assert f"experts are {dtype}" in refusal
    assert layer_refusals(REGISTRY["mxfp4_mega"], FLASH, "unknown") == []


def test_unknown_runner_is_refused():
    with pytest.raises(Refusal, match="'mxfp4' is not a kernel: use one of mxfp4_mega"):
        create_runner("mxfp4")


def test_order_of_preference_is_that_of_the_table():
    assert tuple(REGISTRY) == registry.KERNELS and registry.KERNELS[-1] == "reference"
