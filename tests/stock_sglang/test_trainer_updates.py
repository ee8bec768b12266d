"""The trainer of `eval/serving_bench/refresh` against real layers behind SGLang's own calls: what its bad updates are answered,
and that SGLang reads back what it sends."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
import stock
import torch
import torch.distributed as dist
from refresh_rig import Server, contents, loaded, same, updater
from stub_server import Stub

from hopper_moe.eval.serving_bench import trainer_calls, trainer_group
from hopper_moe.eval.serving_bench.refresh_bad import BAD_UPDATES, NOT_SERVED
from hopper_moe.eval.serving_bench.trainer_calls import Answer, WeightCalls
from hopper_moe.eval.serving_bench.trainer_group import BroadcastCalls, TrainerGroup
from hopper_moe.eval.serving_bench.trainer_tensors import Named, buckets, experts_of, flattened
from hopper_moe.quantization.errors import Refusal

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
    "init_weights_update_group": "InitWeightsUpdateGroupReqInput",
    "update_weights_from_distributed": "UpdateWeightsFromDistributedReqInput",
    "destroy_weights_update_group": "DestroyWeightsUpdateGroupReqInput",
    "release_memory_occupation": "ReleaseMemoryOccupationReqInput",
    "resume_memory_occupation": "ResumeMemoryOccupationReqInput",
    "flush_cache": None,
}


@pytest.fixture
def no_group(monkeypatch) -> None:
    """Process groups that are joined at once and send to nobody."""
    monkeypatch.setattr("sglang.srt.utils.init_custom_process_group", lambda **_how: None)
    monkeypatch.setattr(dist, "broadcast", lambda *_args, **_how: SimpleNamespace(wait=lambda _limit: True))
    monkeypatch.setattr(dist, "destroy_process_group", lambda _group: None)


def test_every_call_is_one_of_sglangs_with_a_body_that_it_reads(monkeypatch, no_group):
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
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "")  # so that it is gone again after the test
    monkeypatch.delenv("NCCL_CUMEM_ENABLE")
    with TrainerGroup("", 4, "nccl") as group:
        assert os.environ["NCCL_CUMEM_ENABLE"] == "0", "as in SGLang's own processes"
        assert BroadcastCalls(group).send(named, flat=True, version="step-2").success
    assert [name for name, _ in made] == [
        "pause_generation", "begin_weight_update", "update_weights_from_tensor", "update_weights_from_tensor",
        "end_weight_update", "continue_generation", "update_weights_from_disk", "release_memory_occupation",
        "resume_memory_occupation", "flush_cache", "init_weights_update_group", "update_weights_from_distributed",
        "destroy_weights_update_group",
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


# ---- by broadcast


def described(named: Any) -> list[list[Any]]:
    """Name, type, shape and digest of each tensor, as JSON gives them back."""
    return [
        [name, str(t.dtype), list(t.shape), hashlib.sha256(t.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()]
        for name, t in named
    ]


def receive(own: Any, name: str, body: dict[str, Any]) -> tuple[bool, str]:
    """The call, made of SGLang's updater; the message says what came. A version "refused" is, before anything is received."""
    if name != "update_weights_from_distributed":
        return getattr(own, name)(**body)
    if body["weight_version"] == "refused":
        return False, "not now"
    fields = ("names", "dtypes", "shapes", "group_name", "load_format")
    try:
        return True, json.dumps(described(own.receive_weights_from_distributed(**{field: body[field] for field in fields})))
    except Exception as error:  # as the scheduler answers it
        return False, f"Failed to receive weights: {error}"


def serve(store: Path, url: Any) -> None:
    """A worker of one rank behind HTTP; it ends when it is killed."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    own = updater(torch.nn.Module())

    def reply(_method: str, path: str, _headers: Any, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        success, message = receive(own, path.strip("/"), body)
        return 200 if success else 400, {}, {"success": success, "message": message}

    with Stub(reply=reply) as stub:
        url.send(stub.url.removesuffix("/v1"))
        threading.Event().wait()


@pytest.fixture
def worker(tmp_path) -> Iterator[str]:
    """The URL of a `serve` in a process of its own; forked, so that it costs no second import of SGLang."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(tmp_path / "store", there), daemon=True)
    process.start()
    try:
        assert here.poll(60), "the worker says nothing"
        yield here.recv()
    finally:
        process.kill()
        process.join()


@pytest.fixture
def named(seed) -> list[Named]:
    rng = torch.Generator().manual_seed(seed)
    scale = torch.randint(0, 255, (5, 3), generator=rng, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    weight = torch.randint(-128, 128, (5, 7), generator=rng, dtype=torch.int8)
    return [("weight", weight), ("scale", scale), ("norm", torch.randn(6, generator=rng).bfloat16())]


def test_what_is_broadcast_arrives_bit_for_bit(worker, named):
    """Twice, since a second run joins the same server anew."""
    for _ in range(2):
        with TrainerGroup(worker, 1, "gloo", timeout=30) as group:
            calls = BroadcastCalls(group)
            for flat, sent, order in ((True, named, (2, 0, 1)), (False, [named[0], named[2]], (0, 1))):
                answer = calls.send(sent, flat=flat)
                assert answer.success, answer.message
                assert json.loads(answer.message) == described([sent[number] for number in order])


def test_a_scale_is_broadcast_in_a_flattened_bucket_only(worker, named):
    with TrainerGroup(worker, 1, "gloo", timeout=30) as group:
        answer = BroadcastCalls(group).send(named[1:2])
    assert not answer.success and answer.message.count("Invalid scalar type") == 2, answer.message


def test_a_broadcast_that_nobody_takes_ends_with_the_refusal(worker, named, monkeypatch):
    monkeypatch.setattr(trainer_group, "_AFTER_REFUSAL", 0.5)
    started = time.monotonic()
    with TrainerGroup(worker, 1, "gloo", timeout=60) as group:
        answer = BroadcastCalls(group).send(named, flat=True, version="refused")
    assert not answer.success and answer.message.startswith("not now; the broadcast failed"), answer.message
    assert time.monotonic() - started < 30, "waited for the group's own limit"


@pytest.mark.parametrize("taken", [True, False])
def test_a_group_is_aborted_where_nobody_took_its_broadcast(monkeypatch, no_group, named, taken):
    """Over NCCL, which waits for ever: seen on two H200. gloo ends such a broadcast by itself."""
    done: list[str] = []
    group = SimpleNamespace(abort=lambda: done.append("aborted"))
    monkeypatch.setattr("sglang.srt.utils.init_custom_process_group", lambda **_how: group)
    monkeypatch.setattr(trainer_group, "call", lambda *_call: Answer(True, "Success"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda _group: done.append("destroyed"))
    with TrainerGroup("", 1, "nccl") as joined:
        calls = BroadcastCalls(joined)
        monkeypatch.setattr(calls, "_call", lambda *_call: Answer(taken, "not now"))
        assert calls.send(named, flat=True).success == taken
    assert done == (["destroyed"] if taken else ["aborted", "destroyed"])


def test_a_server_that_does_not_join_is_refused_at_once():
    with Stub(reply=lambda *_request: (400, {}, {"success": False, "message": "no such backend"})) as stub:
        url = stub.url.removesuffix("/v1")
        with pytest.raises(Refusal, match=rf"{url} and this process form no group of 3 ranks over gloo \(no such backend\)"):
            TrainerGroup(url, 2, "gloo")
