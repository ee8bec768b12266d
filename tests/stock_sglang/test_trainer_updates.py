"""The trainer of `eval/serving_bench/refresh` against real layers behind SGLang's own calls: what its bad updates are answered,
and that SGLang reads back what it sends."""

from __future__ import annotations

import base64
import importlib.util
import re
from pathlib import Path
from typing import Any

import httpx
import msgspec
import stock
import torch
from refresh_rig import Server, contents, loaded, same

from hopper_moe.eval.serving_bench import trainer_calls
from hopper_moe.eval.serving_bench.refresh_bad import BAD_UPDATES, NOT_SERVED
from hopper_moe.eval.serving_bench.trainer_calls import Answer, WeightCalls
from hopper_moe.eval.serving_bench.trainer_tensors import buckets, experts_of, flattened

ROOT = Path(__file__).parents[2]


class Direct(WeightCalls):
    """The calls without HTTP and handles of GPU memory."""

    def __init__(self, server: Server) -> None:
        super().__init__("", serialize=lambda named, _flat, _ranks: list(named))
        self._server = server

    def _call(self, name: str, body: dict[str, Any]) -> Answer:
        if name == "update_weights_from_tensor":
            flat = body["load_format"] == "flattened_bucket"
            return Answer(*self._server.send(dict(body["serialized_named_tensors"]), bucket=flat))
        if name == "update_weights_from_disk":
            request = {"model_path": body["model_path"], "load_format": body["load_format"]}
            return Answer(*self._server.call(name, "UpdateWeightFromDiskReqInput", **request))
        return Answer(*(self._server.begin() if name == "begin_weight_update" else self._server.end()))


def test_bad_updates_are_answered_and_leave_the_state_that_the_table_says(model, seed, tmp_path):
    from sglang.srt.arg_groups.overrides import model_config_of

    args = stock.resolve(model)
    tensors, config = stock.random_checkpoint(seed).tensors, model_config_of(args)

    def work(rank: int) -> dict[str, tuple[Any, ...]]:
        server, found = Server(loaded(tensors), config=config), {}
        calls, before = Direct(server), contents(server.experts)
        for bad in BAD_UPDATES:
            answer, reason = bad.make(calls, tensors, 0), server.reason
            healed = calls.session(buckets(experts_of(tensors, 0), 100_000)).success
            found[bad.name] = (answer, reason, healed and server.reason is None and same(contents(server.experts), before))
        return found

    (found,) = stock.in_ranks(work, args, 1, tmp_path)
    for bad in BAD_UPDATES:
        answer, reason, is_healed = found[bad.name]
        assert not answer.success and re.search(bad.words, answer.message), (bad.name, answer)
        assert (reason is not None) == (bad.state == NOT_SERVED) and is_healed, (bad.name, reason)


def test_sessions_of_parts_are_taken(model, seed, tmp_path):
    """In buckets that end inside an expert, as tensors and flattened."""
    old, new = (stock.random_checkpoint(seed + number).tensors for number in range(2))

    def work(rank: int) -> list[bool]:
        server = Server(loaded(old))
        calls, wanted = Direct(server), contents(loaded(new))
        sent = [calls.session(buckets(new, 70_000)), same(contents(server.experts), wanted)]
        return [*sent, calls.session(buckets(old, 300_000), flat=True), same(contents(server.experts), wanted)]

    ((first, is_new, second, is_still_new),) = stock.in_ranks(work, stock.resolve(model), 1, tmp_path)
    assert first.success and is_new and second.success and not is_still_new


STRUCTS = {  # of SGLang's io_struct; None: the call takes no body
    "pause_generation": "PauseGenerationReqInput",
    "continue_generation": "ContinueGenerationReqInput",
    "begin_weight_update": "BeginWeightUpdateReqInput",
    "update_weights_from_tensor": "UpdateWeightsFromTensorReqInput",
    "end_weight_update": "EndWeightUpdateReqInput",
    "update_weights_from_disk": "UpdateWeightFromDiskReqInput",
    "release_memory_occupation": "ReleaseMemoryOccupationReqInput",
    "resume_memory_occupation": "ResumeMemoryOccupationReqInput",
    "flush_cache": None,
}


def test_every_call_is_one_of_sglangs_with_a_body_that_it_reads(monkeypatch):
    """Fields that SGLang does not know would be dropped in silence."""
    from sglang.srt.managers import io_struct

    made: list[tuple[str, dict[str, Any]]] = []

    def reply(url: str, body: dict[str, Any], _timeout: float) -> httpx.Response:
        made.append((url.removeprefix("/"), body))
        return httpx.Response(200, json={"success": True, "message": ""})

    for name in ("post", "post_anyhow"):
        monkeypatch.setattr(trainer_calls, name, reply)
    calls = WeightCalls("", serialize=lambda _named, _flat, ranks: [base64.b64encode(b"handle").decode()] * ranks)
    named = [("a", torch.zeros(1))]
    assert calls.refresh([named, named], flat=True, version="step-1").success and calls.from_disk("/models/x").success
    calls.release("weights")
    calls.resume("weights")
    assert calls.flush().success
    assert [name for name, _ in made] == [
        "pause_generation", "begin_weight_update", "update_weights_from_tensor", "update_weights_from_tensor",
        "end_weight_update", "continue_generation", "update_weights_from_disk", "release_memory_occupation",
        "resume_memory_occupation", "flush_cache",
    ]  # fmt: skip
    assert [(made[n][1]["flush_cache"], made[n][1]["weight_version"]) for n in (2, 3)] == [(False, None), (True, "step-1")]
    routes = Path(importlib.util.find_spec("sglang.srt.entrypoints.http_server").origin).read_text()
    page = (ROOT / "launch" / "recipes" / "refresh.md").read_text()
    for name, body in made:
        assert re.search(rf'@app\.(post|api_route)\("/{name}"', routes) and name in page
        if STRUCTS[name]:
            known = {field.name: field.type for field in msgspec.structs.fields(getattr(io_struct, STRUCTS[name]))}
            for field, value in body.items():
                msgspec.convert(value, known[field])


def test_a_flattened_bucket_is_read_back():
    """In this order a tensor of 12 bytes stands before one of 8-byte numbers."""
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    scale = torch.full((3,), 120, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    named = [("a", torch.rand(3)), ("b", torch.arange(4)), ("c", scale), ("d", torch.rand(2, 2).bfloat16())]
    given = flattened(named)
    bucket = FlattenedTensorBucket(flattened_tensor=given["flattened_tensor"], metadata=given["metadata"])
    back = dict(bucket.reconstruct_tensors())
    assert back.keys() == dict(named).keys()
    for name, tensor in named:
        assert back[name].dtype == tensor.dtype and torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8))
