"""What a worker in stock SGLang does before it serves: says its plan, checks one layer of a kind, says what it holds."""

from __future__ import annotations

import logging

import pytest
import stock
import torch
from stock import EXPERTS, HIDDEN

from hopper_moe.moe_backends import self_check
from hopper_moe.moe_backends.runners.reference import ReferenceRunner
from hopper_moe.moe_backends.sglang import runner_backend, startup
from hopper_moe.quantization.errors import Refusal

RANK = 3


@pytest.fixture(scope="module")
def checkpoint(seed) -> stock.Checkpoint:
    return stock.random_checkpoint(seed)


@pytest.fixture(autouse=True)
def fresh_process():
    """As in a worker that has just started."""
    self_check._seen.cache_clear()
    startup.announce_plan.cache_clear()
    startup.READY.__init__()


@pytest.fixture(params=[(), ("--tp-size", "8", "--ep-size", "8")], ids=["one GPU", "rank 3 of EP 8"])
def worker(request, model):
    stock.publish(stock.resolve(model, *request.param), RANK if request.param else 0)


@pytest.fixture
def said():
    """Lines of our logger. SGLang replaces the handlers of the root logger, pytest's among them."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger, level = logging.getLogger("hopper_moe"), logging.getLogger("hopper_moe").level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def loaded(checkpoint: stock.Checkpoint):
    layer = stock.fused_moe()
    stock.load(layer, checkpoint.tensors)
    return layer


class Wrong(ReferenceRunner):
    """A kernel that forgets the routed scaling factor."""

    def run(self, hidden_states, topk_ids, topk_weights):
        return super().run(hidden_states, topk_ids, topk_weights / stock.FACTOR)


def test_a_wrong_kernel_does_not_get_to_serve(worker, checkpoint, monkeypatch):
    monkeypatch.setattr(runner_backend, "create_runner", lambda name: Wrong())
    layer = loaded(checkpoint)
    with pytest.raises(Refusal, match=r"reference differs from the reference by 0\.33.*HOPPER_MOE_SELF_CHECK=0"):
        layer.quant_method.process_weights_after_loading(layer)


def test_it_serves_if_the_check_is_switched_off(model, checkpoint, monkeypatch):
    monkeypatch.setattr(runner_backend, "create_runner", lambda name: Wrong())
    monkeypatch.setenv("HOPPER_MOE_SELF_CHECK", "0")
    stock.publish(stock.resolve(model))
    layer = loaded(checkpoint)
    layer.quant_method.process_weights_after_loading(layer)
    assert startup.READY.num_layers == 1 and not startup.READY.errors


def test_one_layer_of_a_kind_is_checked(worker, checkpoint):
    seconds = []
    for count in (1, 2):
        layer = loaded(checkpoint)
        layer.quant_method.process_weights_after_loading(layer)
        assert startup.READY.num_layers == count and startup.READY.errors == [0.0]
        seconds.append(startup.READY.check_seconds)
    assert seconds[0] == seconds[1] > 0


def test_the_log_says_what_will_run_and_what_it_holds(model, checkpoint, said):
    stock.publish(stock.resolve(model))
    said.clear()
    layer = loaded(checkpoint)
    layer.quant_method.process_weights_after_loading(layer)
    assert [line.split()[1] for line in said] == ["version", "kernel", "layer", "ranks", "memory", "fallback"]
    assert f"hidden {HIDDEN}" in said[2] and f"experts 0..{EXPERTS - 1}" in said[3] and "self-check on" in said[5]
    said.clear()
    startup.READY.announce()
    startup.READY.announce()
    (ready,) = said
    held = sum(parameter.nbytes for parameter in layer.parameters())
    assert startup.READY.expert_bytes == held > 0 and "1 layers" in ready and "self-check 0.0e+00" in ready


def test_only_the_first_rank_says_the_plan(model, checkpoint, said):
    stock.publish(stock.resolve(model, "--tp-size", "8", "--ep-size", "8"), RANK)
    said.clear()
    loaded(checkpoint)
    assert said == []


def test_a_token_without_an_expert_here_is_no_difference(model, checkpoint):
    """EP 8 holds 2 of 16 experts: the sample's last token often meets none of them, and exact zeros are right."""
    stock.publish(stock.resolve(model, "--tp-size", "8", "--ep-size", "8"), RANK)
    for _ in range(5):
        self_check._seen.cache_clear()
        layer = loaded(checkpoint)
        layer.quant_method.process_weights_after_loading(layer)
    assert startup.READY.errors == [0.0] * 5 and torch.isfinite(torch.tensor(startup.READY.errors)).all()
