"""Which kernel runs and why; what a layer must look like; and that making a runner imports only its own module."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from hopper_moe.moe_backends import registry
from hopper_moe.moe_backends.env import load
from hopper_moe.moe_backends.errors import Refusal
from hopper_moe.moe_backends.registry import REGISTRY, LayerShape, choose, create_runner, layer_refusals

FLASH = LayerShape(4096, 2048, 256, 6, "fp4")


@pytest.mark.parametrize(
    "capability, kernel",
    [((9, 0), "mxfp4_mega"), (None, "reference"), ((8, 0), "reference"), ((10, 0), "reference"), ((12, 0), "reference")],
)
def test_auto_takes_the_best_that_runs_and_logs_why(capability, kernel, caplog):
    with caplog.at_level(logging.INFO, logger="hopper_moe"):
        choice = choose(load({}), capability)
    assert choice.spec.name == kernel
    assert [record.getMessage() for record in caplog.records] == [f"kernel {kernel}: {choice.reason}"]
    if kernel == "reference":
        assert "mxfp4_mega, fp8_mega, w4a16 (needs compute capability 9.0" in choice.reason


def test_auto_stays_within_what_older_switches_allow():
    assert choose(load({"SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "0"}), (9, 0)).spec.name == "w4a16"
    assert choose(load({"SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "1"}), (9, 0)).spec.name == "mxfp4_mega"


def test_auto_asks_the_measured_table_once_the_layer_is_known(monkeypatch, caplog):
    asked = []

    def fastest(kernels, layer, tokens):
        asked.append((kernels, layer, tokens))
        return "w4a16", "because a test says so"

    monkeypatch.setattr(registry, "fastest", fastest)
    shape = LayerShape(4096, 2048, 256, 6, "fp4", ep_size=8)
    with caplog.at_level(logging.INFO, logger="hopper_moe"):
        choice = choose(load({}), (9, 0), device_name="NVIDIA H200", layer=shape, prefill_only=True)
    assert choice.spec.name == "w4a16" and "kernel w4a16: because a test says so" in caplog.text
    ((kernels, layer, tokens),) = asked
    assert set(kernels) >= {"mxfp4_mega", "w4a16"} and "reference" not in kernels and tokens == registry.PREFILL
    assert (layer.sku, layer.num_local_experts, layer.ranks) == ("H200", 32, 8)
    monkeypatch.setattr(registry, "fastest", lambda *args: None)
    choice = choose(load({}), (9, 0), device_name="NVIDIA H200", layer=shape)
    assert choice.spec.name == "mxfp4_mega" and "no measurement compares" in choice.reason
    assert choose(load({"HOPPER_MOE_KERNEL": "w4a16"}), (9, 0), device_name="NVIDIA H200", layer=shape).spec.name == "w4a16"


def test_auto_leaves_out_what_cannot_serve_the_layer(monkeypatch):
    monkeypatch.setattr(registry, "fastest", lambda kernels, *rest: pytest.fail(f"only one of {kernels} can serve 640 experts"))
    shape = LayerShape(4096, 2048, 640, 6, "fp4")
    assert choose(load({}), (9, 0), device_name="NVIDIA H200", layer=shape).spec.name == "w4a16"


def test_a_kernel_of_a_package_that_is_missing_is_passed_over_by_auto_and_refused_by_name(monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    choice = choose(load({"SGLANG_OPT_USE_DEEPGEMM_MEGA_MOE": "0"}), (9, 0))
    assert choice.spec.name == "reference" and "w4a16 (needs flashinfer" in choice.reason
    with pytest.raises(Refusal, match="HOPPER_MOE_KERNEL=w4a16: needs flashinfer, which is not installed"):
        choose(load({"HOPPER_MOE_KERNEL": "w4a16"}), (9, 0))


def test_a_named_kernel_is_taken_as_named():
    assert choose(load({"HOPPER_MOE_KERNEL": "reference"}), (9, 0)).spec.name == "reference"


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_unbuilt_kernels_are_refused_and_built_ones_made(name):
    if REGISTRY[name].factory is None:
        with pytest.raises(Refusal, match="not built in this release"):
            create_runner(name)
        with pytest.raises(Refusal, match="not built in this release"):
            choose(load({"HOPPER_MOE_KERNEL": name}), (9, 0))
    else:
        runner = create_runner(name)
        assert callable(runner.prepare) and callable(runner.run)
        assert create_runner(name) is not runner, "one runner per layer"


@pytest.mark.parametrize("option", ["HOPPER_MOE_FP8_COMBINE", "HOPPER_MOE_FP4_DISPATCH", "DG_USE_FP8_COMBINE", "DG_USE_FP4_ACTS"])
def test_options_of_other_kernels_are_refused_by_the_name_that_was_set(option, monkeypatch):
    with monkeypatch.context() as without_packages:  # that FlashInfer is missing here must not be the reason
        without_packages.setitem(REGISTRY, "w4a16", replace(REGISTRY["w4a16"], package=None))
        with pytest.raises(Refusal, match=f"unset {option}") as refused:
            choose(load({option: "1", "HOPPER_MOE_KERNEL": "w4a16"}), (9, 0))
        assert "in this release" in str(refused.value)
        assert choose(load({option: "1"}), (9, 0)).spec.name == "mxfp4_mega", "auto takes a kernel that has the option"
    assert choose(load({option: "1"}), None).spec.name == "reference"


@pytest.mark.parametrize(
    "shape",
    [FLASH, LayerShape(7168, 3072, 384, 6, "fp4"), LayerShape(7168, 2048, 256, 8, "fp4"), LayerShape(5120, 2304, 384, 6, "fp4")],
)
@pytest.mark.parametrize("name", ["mxfp4_mega", "reference"])
def test_published_shapes_are_served(name, shape):
    assert layer_refusals(REGISTRY[name], shape) == []


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden_size": 4095}, "hidden_size 4095"),
        ({"hidden_size": 0}, "hidden_size 0"),
        ({"intermediate_size": 192}, "intermediate_size 192"),
        ({"num_experts": 0, "top_k": 1}, "num_experts 0"),
        ({"ep_size": 7}, "256 experts do not divide into 7"),
        ({"top_k": 17}, "top_k 17"),
        ({"top_k": 0}, "top_k 0"),
        ({"num_experts": 4}, "top_k 6 is outside 1..4"),
        ({"expert_dtype": "fp8"}, "experts are fp8"),
        ({"expert_dtype": "bf16"}, "experts are bf16"),
    ],
)
def test_each_wrong_size_is_one_sentence(change, said):
    shape = LayerShape(**{**FLASH.__dict__, **change})
    refusals = layer_refusals(REGISTRY["mxfp4_mega"], shape)
    assert len(refusals) == 1 and said in refusals[0] and refusals[0].endswith(".")


def test_limit_of_experts_is_the_kernels_own():
    from hopper_moe.kernels.mega_moe import MAX_EXPERTS

    assert REGISTRY["mxfp4_mega"].max_experts == MAX_EXPERTS


def test_unknown_runner_is_refused():
    with pytest.raises(Refusal, match="'mxfp4' is not a kernel: use one of mxfp4_mega"):
        create_runner("mxfp4")


def test_order_of_preference_is_that_of_the_table():
    assert tuple(REGISTRY) == registry.KERNELS and registry.KERNELS[-1] == "reference"
