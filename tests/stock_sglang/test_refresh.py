"""New weights for a packed layer through stock SGLang's update calls: bytes of a fresh load, or a sentence and a known state."""

from __future__ import annotations

import gc
import re
from typing import Any

import pytest
import stock
import torch
from refresh_rig import (
    Server,
    changed_experts,
    contents,
    in_buckets,
    loaded,
    pointers,
    same,
    shuffled,
    weights_then_scales,
)

TP2, EP4 = ("--tp-size", "2"), ("--tp-size", "4", "--ep-size", "4")
NAME = "layers.0.ffn.experts.{}.{}.{}"


@pytest.fixture(scope="module")
def old(seed) -> stock.Checkpoint:
    return stock.random_checkpoint(seed)


@pytest.fixture(scope="module")
def new(seed) -> stock.Checkpoint:
    return stock.random_checkpoint(seed + 1)


@pytest.mark.parametrize(("argv", "ranks"), [((), 1), (TP2, 2), (EP4, 4)], ids=["one GPU", "TP 2", "EP 4"])
def test_refreshed_bytes_are_those_of_a_fresh_load(model, old, new, seed, tmp_path, argv, ranks):
    """The same weights, others, and back; in one call, in buckets that end inside an expert, weights before scales, at random."""

    def work(rank: int) -> dict[str, bool]:
        server = Server(loaded(old.tensors), threads=8)
        before, places, wanted = contents(server.experts), pointers(server.experts), contents(loaded(new.tensors))
        orders = {
            "again": ([old.tensors], before),
            "one call": ([new.tensors], wanted),
            "buckets": (in_buckets(old.tensors, 7), before),
            "weights first": (weights_then_scales(new.tensors), wanted),
            "random": (in_buckets(shuffled(old.tensors, seed), 11), before),
        }
        found = {}
        for name, (parts, bytes_then) in orders.items():
            answer = server.refresh(*parts, bucket=name == "buckets")
            found[name] = answer[0] and same(contents(server.experts), bytes_then) and pointers(server.experts) == places
            found[f"{name}, served"] = server.reason is None
        return found

    for found in stock.in_ranks(work, stock.resolve(model, *argv), ranks, tmp_path):
        assert all(found.values()) and len(found) == 10, found


def test_twenty_refreshes_leave_no_new_tensors_and_no_new_pointers(model, old, new, tmp_path):
    """A tensor kept by every refresh would be 18 more by the last one. A few come and go with torch's own caches."""

    def work(rank: int) -> tuple[list[int], bool, bool]:
        server, counts = Server(loaded(old.tensors)), []
        places = pointers(server.experts)
        for turn in range(20):
            assert server.refresh((new, old)[turn % 2].tensors)[0]
            if turn in (1, 19):
                gc.collect()
                counts.append(sum(type(found) in (torch.Tensor, torch.nn.Parameter) for found in gc.get_objects()))
        return counts, pointers(server.experts) == places, same(contents(server.experts), contents(loaded(old.tensors)))

    ((counts, same_places, same_bytes),) = stock.in_ranks(work, stock.resolve(model), 1, tmp_path)
    assert counts[1] - counts[0] < 18 and same_places and same_bytes


def test_experts_that_no_session_touches_stay_and_are_served(model, old, tmp_path):
    def work(rank: int) -> tuple[Any, ...]:
        server = Server(loaded(old.tensors))
        before = contents(server.experts)
        return server.refresh(), same(contents(server.experts), before), server.reason

    assert stock.in_ranks(work, stock.resolve(model), 1, tmp_path) == [((True, "Success"), True, None)]


# ---- updates that are refused

BAD = 5  # the expert that is damaged


def bytes_changed(row: int, column: int, value: int):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        data = tensor.view(torch.uint8).clone()
        data[row, column] = value
        return data.view(tensor.dtype)

    return change


def as_float(row: int, value: float, dtype: torch.dtype = torch.float32):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        data = tensor.to(dtype)
        data[row, 1] = value
        return data

    return change


def bf16(value: float):
    def change(tensor: torch.Tensor) -> torch.Tensor:
        data = torch.ones(tensor.shape[0], 2 * tensor.shape[1], dtype=torch.bfloat16)
        data[3, 4] = value
        return data

    return change


ONE_TENSOR = [  # (shard, part, what becomes of it, words of the sentence)
    ("w1", "scale", bytes_changed(7, 2, 255), r"w1.scale holds 255 \(NaN\) at row 7, group 2"),
    ("w2", "scale", bytes_changed(0, 0, 255), r"w2.scale holds 255 \(NaN\) at row 0, group 0"),
    ("w3", "scale", bytes_changed(255, 11, 255), r"w3.scale holds 255 \(NaN\) at row 255, group 11"),
    ("w3", "scale", as_float(3, 0.3), "w3.scale holds 0.30.*, which is no power of two"),
    ("w3", "scale", as_float(3, 0.75, torch.bfloat16), "w3.scale holds 0.75, which is no power of two"),
    ("w1", "scale", as_float(2, -0.5), "w1.scale holds -0.5, which is no power of two"),
    ("w1", "scale", as_float(2, 0.0), "w1.scale holds 0.0, which is no power of two"),
    ("w2", "scale", as_float(2, float("inf")), "w2.scale holds inf, which is no power of two"),
    ("w2", "scale", as_float(2, float("nan")), "w2.scale holds nan, which is no power of two"),
    ("w1", "scale", lambda t: t.double(), "w1.scale is torch.float64, not UE8M0 scales"),
    ("w1", "scale", lambda t: t.half(), "w1.scale is torch.float16, not UE8M0 scales"),
    ("w2", "scale", lambda t: t.view(torch.int8), "w2.scale is torch.int8, not UE8M0 scales"),
    ("w2", "scale", lambda t: t[:, :-1], r"w2.scale has shape \[384, 7\], not \[384, 8\]"),
    ("w1", "scale", lambda t: t[::128], r"w1.scale has shape \[2, 12\], not \[256, 12\]"),
    ("w1", "weight", lambda t: t.float(), "w1.weight is torch.float32, not packed FP4"),
    ("w1", "weight", lambda t: t.half(), "w1.weight is torch.float16, not packed FP4"),
    ("w3", "weight", lambda t: t.int(), "w3.weight is torch.int32, not packed FP4"),
    ("w2", "weight", lambda t: t.view(torch.float8_e4m3fn), "w2.weight is torch.float8_e4m3fn, not packed FP4"),
    ("w1", "weight", lambda t: t[:-1], r"w1.weight has shape \[255, 192\], not \[256, 192\]"),
    ("w1", "weight", lambda t: torch.cat((t, t)), r"w1.weight has shape \[512, 192\], not \[256, 192\]"),
    ("w2", "weight", lambda t: t.T.contiguous(), r"w2.weight has shape \[128, 384\], not \[384, 128\]"),
    ("w2", "weight", lambda t: t[None], r"w2.weight has shape \[1, 384, 128\], not \[384, 128\]"),
    ("w3", "weight", lambda t: t.flatten(), r"w3.weight has shape \[49152\], not \[256, 192\]"),
    ("w3", "weight", lambda t: t.to(torch.bfloat16), r"w3.weight has shape \[256, 192\], not \[256, 384\]"),
    ("w1", "weight", bf16(float("nan")), "w1.weight: a weight to quantise is NaN or infinite"),
    ("w2", "weight", bf16(float("-inf")), "w2.weight: a weight to quantise is NaN or infinite"),
    ("w1", "weight", bf16(1.0), "w1.scale came twice"),
]


def spread(tensors: dict[str, torch.Tensor], span: int) -> dict[str, torch.Tensor]:
    """Two rows of the bad expert's w2 whose scales span so many octaves, and whose codes allow no others."""
    names = [NAME.format(BAD, "w2", part) for part in ("weight", "scale")]
    weight, scale = (tensors[name].view(torch.uint8).clone() for name in names)
    scale[[1, 9]], weight[[1, 9]] = 123, 0x71  # .5 and 6
    scale[[1, 9], 0] = 123 - span
    return tensors | dict(zip(names, (weight.view(torch.int8), scale.view(torch.float8_e8m0fnu)), strict=True))


def without(tensors: dict[str, torch.Tensor], *words: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not any(word in name for word in words)}


def another_model(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:, ::2].contiguous() for name, tensor in tensors.items()}


SEVERAL = {  # name -> (the calls of one session, words of the sentence)
    "a missing expert": (lambda t: [without(t, "experts.5.")], "experts.5 did not come, 1 of 16 experts"),
    "half of the experts": (lambda t: [dict(list(t.items())[:48])], "experts.8 did not come, 8 of 16 experts"),
    "one tensor missing": (lambda t: [without(t, "experts.5.w2.scale")], "experts.5.w2.scale did not come, 1 tensors of 1 "),
    "half a bucket": (lambda t: [dict(list(t.items())[:32])], "experts.5.w3.weight did not come, 4 tensors of 1 experts"),
    "no scales": (lambda t: [without(t, ".scale")], "experts.0.w1.scale did not come, 48 tensors of 16 experts"),
    "no weights": (lambda t: [without(t, ".weight")], "experts.0.w1.weight did not come, 48 tensors of 16 experts"),
    "a bucket twice": (lambda t: [*in_buckets(t, 7)[:2], in_buckets(t, 7)[1]], "experts.1.w1.scale came twice"),
    "everything twice": (lambda t: [t, t], "experts.0.w1.weight came twice in one weight update"),
    "another model": (lambda t: [another_model(t)], r"experts.0.w1.weight has shape \[256, 96\], not \[256, 192\]"),
    "rows for no format": (lambda t: [spread(t, 40)], "experts.5: 2 of 896 rows span more octaves .* PackedExperts"),
    "rows for the wide format": (lambda t: [spread(t, 20)], "experts.5: 2 of 896 rows need the wide format, .* PackedExperts"),
}


BAD_IS_STORED = ("half of the experts", "everything twice", f"{len(ONE_TENSOR) - 1} w1.weight")  # all its six tensors were good


def bad_updates() -> dict[str, tuple[Any, str]]:
    found = dict(SEVERAL)
    for number, (shard, part, change, words) in enumerate(ONE_TENSOR):
        name = NAME.format(BAD, shard, part)
        found[f"{number} {shard}.{part}"] = (lambda t, name=name, change=change: [t | {name: change(t[name])}], words)
    return found


@pytest.fixture(scope="module")
def outcomes(model, old, new, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What each bad update answers and leaves behind, of one server that is healed with all old weights before the next one."""

    def work(rank: int) -> dict[str, dict[str, Any]]:
        server = Server(loaded(old.tensors))
        before, places, found = contents(server.experts), pointers(server.experts), {}
        for name, (calls, _) in bad_updates().items():
            answer = server.refresh(*calls(new.tensors))
            after = contents(server.experts)
            half = {n: t for n, t in new.tensors.items() if ".experts.1." in n}
            found[name] = {
                "answer": answer,
                "reason": server.reason,
                "changed": changed_experts(after, before),
                "partly": server.refresh(half),  # an update that brings one expert does not heal the layer
                "still": server.reason,
                "heals": server.refresh(old.tensors)[0] and server.reason is None and same(contents(server.experts), before),
                "places": pointers(server.experts) == places,
            }
        return found

    (found,) = stock.in_ranks(work, stock.resolve(model), 1, tmp_path_factory.mktemp("bad"))
    return found


def test_many_bad_updates_are_tried():
    assert len(bad_updates()) >= 30


@pytest.mark.parametrize("name", bad_updates())
def test_a_bad_update_is_refused_and_leaves_a_known_state(outcomes, name):
    """The sentence names layer and tensor; nothing is served until every expert came; the bad expert keeps its old bytes."""
    found, words = outcomes[name], bad_updates()[name][1]
    assert not found["answer"][0] and found["answer"][1].startswith("model.layers.0.mlp.experts")
    assert re.search(words, found["answer"][1]), found["answer"][1]
    assert found["reason"].startswith("model.layers.0.mlp.experts: an update of its weights ")
    assert "one weight update that brings every expert" in found["reason"]
    assert BAD not in found["changed"] or name in BAD_IS_STORED
    assert not found["partly"][0] and found["still"] and found["heals"] and found["places"]
