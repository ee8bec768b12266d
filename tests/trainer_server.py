"""A server for tests of trainers: SGLang's weight calls over HTTP, with weights that are hashes and answers made of them.

It stands for the protocol: sessions, pauses, flushing, what is answered of which weights. What real layers refuse is tested on
them (`tests/stock_sglang`); here a tensor named "bad" is.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from stub_server import Stub, fraction

from hopper_moe.eval.serving_bench.trainer_calls import Answer, call
from hopper_moe.eval.serving_bench.trainer_tensors import aligned, read


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def serialize(named: Sequence[tuple[str, torch.Tensor]], flat: bool, ranks: int) -> list[str]:
    """What stands for handles of GPU memory: names and digests."""
    return [json.dumps([(name, digest(tensor)) for name, tensor in (aligned(named) if flat else named)])] * ranks


class StubGroup:
    """What stands for `TrainerGroup`: it leaves digests with the server where that would broadcast."""

    def __init__(self, server: TrainerServer, url: str, ranks: int, backend: str) -> None:
        self.url, self.ranks, self.name, self._server = url, ranks, "trainer", server
        assert call(url, "init_weights_update_group", {"group_name": self.name, "backend": backend}).success

    def broadcast(self, named: Sequence[tuple[str, torch.Tensor]], flat: bool, receive: Callable[[], Answer]) -> Answer:
        assert named == (aligned(named) if flat else named)
        self._server.broadcast = [digest(tensor) for _, tensor in named]
        return receive()

    def __enter__(self) -> StubGroup:
        return self

    def __exit__(self, *_error: object) -> None:
        assert call(self.url, "destroy_weights_update_group", {"group_name": self.name}).success


class TrainerServer(Stub):
    """Weights are those of `folder` at first. `sabotage`: "leak", "recapture", "forget" (an update that stores nothing), "mix"
    (a pause that lets running requests end with other weights and says nothing), "sleepless", "traces" (of every update), "blind"
    (to what did not come)."""

    def __init__(self, folder: Path, log: Path, sabotage: str = "") -> None:
        super().__init__(reply=self.called)
        self.weights = {name: digest(tensor) for name, tensor in read(folder, "cpu").items()}
        self.log, self.sabotage, self.gpu_mib = log, sabotage, 20_000.0
        self.version, self.torn, self.in_session, self.paused, self.calls = "default", False, False, "", []
        self.groups: set[str] = set()
        self.broadcast: list[str] = []  # digests of what comes next
        self._running, self._is_awaited, self._change = 0, False, threading.Condition()
        log.write_text("Capture target decode CUDA graph begin.\nCapture target decode CUDA graph end.\n")

    def look(self, _url: str) -> dict[str, Any]:
        return {"gpu_mib": self.gpu_mib}

    def called(self, _method: str, path: str, _headers: Any, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        name = path.strip("/")
        if name == "generate":
            return 200, {}, self.generated(body)
        self.calls.append(name)
        with self._change:
            answer = getattr(self, name)(body)
            self._change.notify_all()
        return (
            200 if answer is None or answer[0] else 400,
            {},
            None if answer is None else dict(zip(("success", "message"), answer, strict=True)),
        )

    def logprob(self, before: int, token: int) -> float:
        return -100 * fraction(self._all, before, token)

    @property
    def weights(self) -> dict[str, str]:
        return self._weights

    @weights.setter
    def weights(self, weights: dict[str, str]) -> None:
        self._weights, self._all = weights, hashlib.sha256(json.dumps(sorted(weights.items())).encode()).hexdigest()

    def generated(self, body: dict[str, Any]) -> dict[str, Any]:
        """Tokens are the position's; only log probabilities tell weights apart."""
        ids, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        with self._change:
            self._change.wait_for(lambda: not self.paused and not self._is_awaited)
            self._running += 1
        spans, out, finish = [self.version], [], "length"
        try:
            for token in range(count):
                with self._change:
                    if self.paused == "abort":
                        finish = "abort"
                        break
                    self._change.wait_for(lambda: self.paused != "retract")
                    spans += [self.version] * (self.version != spans[-1] and self.sabotage != "mix")
                    out.append((self.logprob(token - 1 if token else ids[-1], token), token))
                time.sleep(0.001 if count > 2 else 0)
            given = [[None, ids[0]], *[[self.logprob(ids[i - 1], ids[i]), ids[i]] for i in range(1, len(ids))]]
        finally:
            with self._change:
                self._running -= 1
                self._change.notify_all()
        meta = {"finish_reason": {"type": finish}, "input_token_logprobs": given, "output_token_logprobs": out}
        meta |= {"output_top_logprobs": [[pair, (pair[0] - 1, -1)] for pair in out]}
        return {"meta_info": meta | {"weight_versions": [{"version": version} for version in spans]}}

    # ---- the calls; each holds the lock

    def pause_generation(self, body: dict[str, Any]) -> None:
        self.paused = body["mode"]
        if self.paused == "abort":
            self._change.wait_for(lambda: not self._running)

    def continue_generation(self, _body: dict[str, Any]) -> None:
        self.paused = ""

    def begin_weight_update(self, _body: dict[str, Any]) -> tuple[bool, str]:
        if self.in_session:
            return False, "a weight-update session is already open; call end_weight_update() first"
        self.in_session = True
        return True, "Success"

    def end_weight_update(self, _body: dict[str, Any]) -> tuple[bool, str]:
        self.in_session = False
        return not self.torn, "refused before" if self.torn else "Success"

    def update_weights_from_tensor(self, body: dict[str, Any]) -> tuple[bool, str]:
        if not self.in_session:
            return False, "update_weights_from_tensor must run between begin_weight_update() and end_weight_update()"
        (payload,) = body["serialized_named_tensors"]
        return self._store(dict(json.loads(payload)), body["weight_version"])

    def init_weights_update_group(self, body: dict[str, Any]) -> tuple[bool, str]:
        self.groups.add(body["group_name"])
        return True, "Success"

    def destroy_weights_update_group(self, body: dict[str, Any]) -> tuple[bool, str]:
        self.groups.remove(body["group_name"])
        return True, "Success"

    def update_weights_from_distributed(self, body: dict[str, Any]) -> tuple[bool, str]:
        if not self.in_session or body["group_name"] not in self.groups:
            return False, "no session, or no group"
        return self._store(dict(zip(body["names"], self.broadcast, strict=True)), body["weight_version"])

    def by_ipc(self, _url: str, folder: Path, _ranks: int, leave_out: str = "") -> Answer:
        """What stands for `trainer_ipc.send`."""
        given = {name: digest(tensor) for name, tensor in read(folder, "cpu").items()}
        if not leave_out:
            with self._change:
                return Answer(*self._store(given, None))
        if self.sabotage != "blind":
            self.weights = self.weights | {f"{leave_out}w1.weight": "half"}
            return Answer(False, f"model.{leave_out.removesuffix('.')} did not come, 1 of 8 experts of this rank are missing")
        return Answer(True, "Success")

    def update_weights_from_disk(self, body: dict[str, Any]) -> tuple[bool, str]:
        if not self.paused:
            self._is_awaited = True  # new requests wait
            self._change.wait_for(lambda: not self._running)
            self._is_awaited = False
        if not list(Path(body["model_path"]).glob("*.safetensors")):
            return False, "Failed to get weights iterator: none"
        return self._store({n: digest(t) for n, t in read(Path(body["model_path"]), "cpu").items()}, body["weight_version"])

    def _store(self, given: dict[str, str], version: str | None) -> tuple[bool, str]:
        self.torn = "bad" in given
        if self.torn:
            return False, "bad is bad"
        if self.sabotage != "forget":
            self.weights = self.weights | given | ({"trace": str(len(self.calls))} if self.sabotage == "traces" else {})
        self.version = version or self.version
        self.gpu_mib += 100 * (self.sabotage == "leak")
        if self.sabotage == "recapture":
            self.log.write_text(self.log.read_text() + "Capture target decode CUDA graph end.\n")
        return True, "Success"

    def release_memory_occupation(self, body: dict[str, Any]) -> None:
        if self.sabotage != "sleepless":
            self.gpu_mib -= 10_000.0
            self.weights = dict.fromkeys(self.weights, "garbage")

    def resume_memory_occupation(self, body: dict[str, Any]) -> None:
        if self.sabotage != "sleepless":
            self.gpu_mib += 5_000.0

    def flush_cache(self, _body: dict[str, Any]) -> tuple[bool, str]:
        return True, "flushed"
