"""eval/serving_bench/refresh against a server of stubs: what it finds, and that it finds what is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from trainer_server import StubGroup, TrainerServer, serialize

from hopper_moe.eval.serving_bench import refresh, refresh_load, refresh_steps, trainer_ipc
from hopper_moe.eval.serving_bench.refresh_bad import BAD_UPDATES, NOT_SERVED, UNCHANGED, BadUpdate, with_nan
from hopper_moe.eval.serving_bench.refresh_load import Reply
from hopper_moe.eval.serving_bench.refresh_steps import STEPS, Run
from hopper_moe.eval.serving_bench.trainer_calls import WeightCalls
from hopper_moe.eval.serving_bench.trainer_tensors import (
    aligned,
    buckets,
    experts_of,
    experts_of_all,
    layers,
    num_bytes,
    on_gpu,
    read,
    without,
)
from hopper_moe.launch.ports import free_port
from hopper_moe.quantization.errors import Refusal


def checkpoint(folder: Path, seed: int) -> Path:
    """Three layers of six experts, as far as names and types go."""
    rng, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(3):
        for expert in range(6):
            for shard in ("w1", "w2", "w3"):
                name = f"layers.{layer}.ffn.experts.{expert}.{shard}"
                tensors[f"{name}.weight"] = torch.randint(-128, 128, (8, 16), generator=rng, dtype=torch.int8)
                scale = torch.randint(110, 130, (8, 4), generator=rng, dtype=torch.uint8)
                tensors[f"{name}.scale"] = scale.view(torch.float8_e8m0fnu)
        for part in ("wq_a", "wkv"):
            tensors[f"layers.{layer}.attn.{part}.weight"] = torch.randn(4, 8, generator=rng)
        tensors[f"layers.{layer}.hc_attn_scale"] = torch.randn(3, generator=rng)
        tensors[f"layers.{layer}.ffn.gate.tid2eid"] = torch.randint(6, (5, 2), generator=rng)
    tensors["embed.weight"] = torch.randn(32, 8, generator=rng).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def same(tmp_path) -> Path:
    return checkpoint(tmp_path / "same", 1)


@pytest.fixture
def other(tmp_path) -> Path:
    return checkpoint(tmp_path / "other", 2)


# ---- tensors


def test_buckets_hold_everything_once_and_split_no_layers_attention(same):
    tensors = read(same, "cpu")
    for size in (1, 100, 1000, 1 << 20):
        parts = buckets(tensors, size)
        assert [name for part in parts for name, _ in part] and sorted(n for part in parts for n, _ in part) == sorted(tensors)
        for layer in range(3):
            rest = {n for n in tensors if n.startswith(f"layers.{layer}.") and ".experts." not in n}
            assert sum(bool(rest & {n for n, _ in part}) for part in parts) == 1
        assert all(num_bytes(t for _, t in part) <= size or ".experts." not in part[0][0] or len(part) == 1 for part in parts)
    assert buckets({}, 10) == []


def test_parts_of_a_checkpoint(same):
    tensors = read(same, "cpu")
    layer = experts_of(tensors, 2)
    assert len(layer) == 36 and len(experts_of(tensors, 2, 5)) == 6 and len(without(tensors, layer)) == len(tensors) - 36
    for number, expert in ((9, None), (1, 77)):
        with pytest.raises(Refusal, match=rf"in layers\.{number}: give another layer"):
            experts_of(tensors, number, expert)
    with pytest.raises(Refusal, match="holds no .safetensors files"):
        read(same.parent, "cpu")


def test_experts_for_more_layers_than_the_checkpoint_has(same):
    tensors = read(same, "cpu") | {"mtp.0.ffn.experts.0.w1.weight": torch.zeros(1)}
    given = experts_of_all(tensors, 5, shift=1)
    assert len(given) == 5 * 36
    for layer, source in enumerate((1, 2, 0, 1, 2)):
        for name, tensor in experts_of(tensors, source).items():
            assert given[name.replace(f"layers.{source}.", f"layers.{layer}.", 1)] is tensor
    with pytest.raises(Refusal, match="no routed experts"):
        experts_of_all({"mtp.0.ffn.experts.0.w1.weight": torch.zeros(1)}, 5, shift=0)


def test_wide_types_come_first_in_a_flattened_bucket(same):
    sizes = [tensor.element_size() for _, tensor in aligned(list(read(same, "cpu").items()))]
    assert sizes == sorted(sizes, reverse=True)


def test_each_rank_gets_what_lies_on_its_own_gpu(monkeypatch):
    """SGLang copies a flattened bucket from where it lies; from another GPU that ended a server on two H200."""
    here = SimpleNamespace(to=lambda device: f"on {device}")
    for visible, wanted in ((1, here), (2, "on cuda:1")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        assert on_gpu(1, {"flattened_tensor": here, "metadata": [1]}) == {"flattened_tensor": wanted, "metadata": [1]}
        assert on_gpu(1, [("a", here)]) == [("a", wanted)]


# ---- answers under load


def test_an_answer_of_two_weights_is_found():
    new, old = [-1.0] * 70, [-11.0] * 70
    assert refresh_load.weights_of(new, new) == "new" and refresh_load.weights_of(new, old) == "old"
    assert refresh_load.weights_of(new, [*old[:16], *new[16:]]) == "mixed"
    assert refresh_load.weights_of(new, [*new[:-22], *old[-22:]]) == "mixed"
    assert refresh_load.weights_of(new, [*new[:-5], *old[-5:]]) == "new", "too few to tell"


def test_what_a_load_concludes():
    """Prompts that begin with 9 are scored otherwise by the new weights, those with 1 as they were sent."""
    tokens, near, far = [*range(32)], [-1.0, -2.0] * 16, [-9.0] * 32
    new, old = Reply([1, 2, 3], tokens, near, "length", 1), Reply([9, 2, 3], tokens, near, "length", 1)
    both, halves = Reply([1, 2, 3], tokens, [*far[:16], *near[16:]], "length", 2), "1 answers are of both weights"
    unmarked, aborted = replace(both, versions=1), replace(new, finish="abort")

    def said(mode: str, *replies: Reply) -> list[str]:
        counts = refresh_load.judge("", replies, lambda _url, ids: [0.0] * 2 + (near if ids[0] == 1 else far))
        assert counts["requests"] == len(replies)
        return refresh_load.problems(mode, counts)

    assert said("drain", old, new) == [] == said("retract", both, new) == said("abort", old, new, aborted)
    assert said("drain", old, both, new) == [f"drain: {halves}"]
    assert said("retract", unmarked, new) == [f"retract: {halves} and do not say so"]
    assert said("drain", old, aborted, new) == ["drain: 1 requests were aborted"]
    failed = Reply([1, 2, 3], [], [], failure="gone")
    assert said("drain", failed, old, new) == ["drain: 1 requests failed, the first: gone"]
    for one in (old, new):
        assert "nothing was shown" in said("drain", one)[0]


# ---- the whole command


def run_of(server: TrainerServer, same: Path, other: Path, bits: dict) -> Run:
    calls = WeightCalls(server.url.removesuffix("/v1"), serialize=serialize)
    stubs = {"look": server.look, "join": partial(StubGroup, server), "by_ipc": server.by_ipc}
    run = Run(calls, same, other, bits, server.log, times=3, bucket_bytes=600, device="cpu", settle=0.2, **stubs)
    assert run.before
    return run


def recorded(folder: Path, tmp_path: Path) -> dict:
    with TrainerServer(folder, tmp_path / "fresh.log") as fresh:
        assert CliRunner().invoke(refresh.main, ["record", fresh.url.removesuffix("/v1"), str(tmp_path / "bits")]).exit_code == 0
    return json.loads((tmp_path / "bits").read_text())


@pytest.fixture
def two_bad_updates(monkeypatch) -> None:
    """A tensor that the stub refuses; and one that comes without a session."""

    def bad(calls: WeightCalls, tensors, layer: int):
        return calls.session([[("bad", torch.zeros(1))]])

    no_session = next(update for update in BAD_UPDATES if update.name == "no session")
    monkeypatch.setattr(refresh_steps, "BAD_UPDATES", (BadUpdate("bad", "bad is bad", NOT_SERVED, bad), no_session))


def ran(tmp_path: Path, same: Path, other: Path, names: list[str], sabotage: str = "") -> tuple[list[str], dict]:
    bits, out = recorded(other, tmp_path), tmp_path / "out.json"
    with TrainerServer(same, tmp_path / "log", sabotage) as server:
        problems = refresh.run_steps(run_of(server, same, other, bits), names, {"commit": "x"}, out)
    return problems, json.loads(out.read_text())


def test_every_step_passes(tmp_path, same, other, two_bad_updates):
    names = ["same", "other", "many", "load", "bad", "sleep"]
    problems, found = ran(tmp_path, same, other, names)
    assert problems == [] and list(found["steps"]) == names and found["commit"] == "x"
    many, load, bad = (found["steps"][name] for name in ("many", "load", "bad"))
    assert len(many["seconds"]) == 3 and many["bytes"] > 5000 and many["calls"] > 5
    assert load["drain"]["mixed"] == 0 < load["retract"]["mixed"] and load["abort"]["aborted"]
    assert bad["answers"]["bad"] == {"answer": "bad is bad", "state": NOT_SERVED}


def test_the_step_that_broadcasts(tmp_path, same, other):
    with TrainerServer(same, tmp_path / "log") as server:
        run = run_of(server, same, other, recorded(other, tmp_path))
        found = STEPS["distributed"](run)
        assert found["problems"] == [] and len(found["seconds"]) == 3 and found["bytes"] > 5000 and found["calls"] > 5
        assert server.calls.count("update_weights_from_distributed") == 3 * found["calls"] and not server.groups
        alone = STEPS["distributed"](replace(run, other_bits=None))
        assert alone["problems"] == [] and len(alone["seconds"]) == 1 and alone["backend"] == "nccl"


def test_the_step_through_checkpoint_engine(tmp_path, same, other):
    with TrainerServer(same, tmp_path / "log") as server:
        run = run_of(server, same, other, recorded(other, tmp_path))
        found = STEPS["ipc"](run)
        assert found["problems"] == [] and len(found["seconds"]) == 3 and "experts.5 did not come" in found["answer"]
        assert refresh_steps.bits(run.url) == run.before and not server.paused


def test_checkpoint_engine_gets_a_layer_in_one_message(same):
    tensors = read(same, "cpu")
    assert [len(part) for part in layers(tensors)] == [40, 40, 40, 1] and layers({}) == []
    of_ranks = [trainer_ipc.parts(tensors, rank, 2) for rank in range(2)]
    assert [[len(part) for part in parts] for parts in of_ranks] == [[40, 0, 40, 0], [0, 40, 0, 1]]
    assert trainer_ipc.buffer_gib(tensors) == 1
    assert (
        trainer_ipc.buffer_gib({f"layers.{n}.w": torch.empty(1 << 30, n, device="meta", dtype=torch.int8) for n in (1, 3)}) == 3
    )


def test_without_checkpoint_engine_the_step_says_what_to_install(tmp_path, same, monkeypatch):
    monkeypatch.setattr(trainer_ipc.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(Refusal, match="pip install checkpoint-engine"):
        trainer_ipc.send("http://127.0.0.1:1", same, 1)


def test_a_parameter_server_that_nobody_answers_ends(tmp_path):
    """checkpoint-engine itself would wait for ever."""
    out, url = tmp_path / "answer.json", f"http://127.0.0.1:{free_port()}"
    asks = f"from pathlib import Path; from {trainer_ipc.__name__} import _ask; _ask({url!r}, {{}}, 0, Path({str(out)!r}))"
    assert subprocess.run([sys.executable, "-c", asks], check=False, timeout=120).returncode == 1
    assert json.loads(out.read_text())["message"].startswith(f"{url}/update_weights_from_ipc does not answer")


def test_experts_of_a_whole_model(tmp_path, same, other):
    with TrainerServer(same, tmp_path / "log") as server:
        run = replace(run_of(server, same, other, {}), num_layers=5)
        found = STEPS["whole"](run)
        assert found["problems"] == [] and len(found["seconds"]) == len(found["gpu_mib"]) == 3
        assert found["bytes"] == num_bytes(experts_of_all(read(same, "cpu"), 5, 0).values())
        assert sum(name.startswith("layers.4.") for name in server.weights) == 36
        with pytest.raises(Refusal, match="give --layers"):
            STEPS["whole"](replace(run, num_layers=None))


@pytest.mark.parametrize(
    ("sabotage", "words"),
    [
        ("forget", "other experts changed nothing"),
        ("leak", "GPU memory grew by [0-9]+ MiB after the first"),
        ("recapture", "the log has [0-9]+ lines about graph capture, it had 2"),
        ("traces", "the first experts again: 500 of 500 log probabilities differ"),
    ],
)
def test_what_is_wrong_with_a_whole_model_is_found(tmp_path, same, other, sabotage, words):
    with TrainerServer(same, tmp_path / "log", sabotage) as server:
        found = STEPS["whole"](replace(run_of(server, same, other, {}), num_layers=5))
    assert [problem for problem in found["problems"] if re.search(words, problem)], found


def test_after_a_refused_broadcast_the_step_ends_and_the_server_is_whole(tmp_path, same, other):
    with TrainerServer(same, tmp_path / "log") as server:
        bits = recorded(other, tmp_path)
        save_file({"bad": torch.zeros(1)}, other / "z.safetensors")
        run = run_of(server, same, other, bits)
        found = STEPS["distributed"](run)
        assert found["problems"] == ["other: refused (bad is bad)"] and len(found["seconds"]) == 2
        assert refresh_steps.bits(run.url) == run.before and not server.groups and not server.paused


@pytest.mark.parametrize(
    ("sabotage", "step", "words"),
    [
        ("leak", "many", "GPU memory grew by"),
        ("recapture", "same", "the log has [0-9]+ lines about graph capture, it had 2"),
        ("recapture", "many", "the log has [0-9]+ lines about graph capture, it had 2"),
        ("recapture", "sleep", "the log has [0-9]+ lines about graph capture, it had 2"),
        ("forget", "other", "flattened buckets: 500 of 500 log probabilities differ"),
        ("forget", "load", "nothing was shown"),
        ("forget", "distributed", "other: 500 of 500 log probabilities differ"),
        ("recapture", "distributed", "the log has [0-9]+ lines about graph capture, it had 2"),
        ("forget", "ipc", "other: 500 of 500 log probabilities differ"),
        ("recapture", "ipc", "the log has [0-9]+ lines about graph capture, it had 2"),
        ("blind", "ipc", r"without layers\.2\.ffn\.experts\.5\."),
        ("mix", "load", "retract: [0-9]+ answers are of both weights and do not say so"),
        ("sleepless", "sleep", "0 MiB were released"),
    ],
)
def test_what_is_wrong_is_found(tmp_path, same, other, sabotage, step, words):
    problems, _ = ran(tmp_path, same, other, [step], sabotage)
    assert problems and any(re.search(words, problem) for problem in problems), problems


def test_a_server_that_cannot_be_healed_is_asked_nothing_more(tmp_path, same, other):
    save_file({"bad": torch.zeros(1)}, same / "z.safetensors")
    with TrainerServer(same, tmp_path / "log") as server:
        run = run_of(server, same, other, {})
        problems = refresh.run_steps(run, ["same", "many"], {}, tmp_path / "out")
        assert "and nor are the server's own weights taken (bad is bad)" in problems[0]
        assert problems[1:] == ["many: not run, the server is lost"]


def test_the_last_step_wants_the_server_to_end(tmp_path, same, other):
    with TrainerServer(same, tmp_path / "log") as server:
        run = run_of(server, same, other, {})
        found = STEPS["torn"](run)["problems"]  # the stub takes half an expert, answers, and says nothing in its log
    assert [words in " ".join(found) for words in ("half an expert was taken", "answered [0, 1]", "does not say why")] == [
        True
    ] * 3


def test_what_cannot_be_done_is_one_sentence(tmp_path, same):
    url = f"http://127.0.0.1:{free_port()}"
    for arguments, said in (
        (["record", url, str(tmp_path / "out")], f"{url}/generate does not answer"),
        (["measure", url, str(same), "--out", str(tmp_path / "out")], f"{url}/generate does not answer"),
        (
            ["measure", url, str(same), "--steps", "same,no", "--out", "x"],
            "--steps has 'no', which is no step: choose from same,",
        ),
    ):
        result = CliRunner().invoke(refresh.main, arguments)
        assert result.exit_code == 2 and said in result.output and len(result.output.splitlines()) == 1


def test_steps_that_need_more_say_what(tmp_path, same):
    with TrainerServer(same, tmp_path / "log") as server:
        run = Run(WeightCalls(server.url.removesuffix("/v1"), serialize=serialize), same, device="cpu", look=server.look)
        for step, words in (("load", "give --other FOLDER"), ("other", "give --other")):
            with pytest.raises(Refusal, match=words):
                STEPS[step](run)


def test_the_table_of_bad_updates():
    assert len(BAD_UPDATES) >= 10 and {update.state for update in BAD_UPDATES} == {NOT_SERVED, UNCHANGED}
    scale = torch.full((8, 4), 120, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert int((with_nan(scale).view(torch.uint8) == 255).sum()) == 1 and int(scale.view(torch.uint8).max()) == 120
    assert "python -m hopper_moe.eval.serving_bench.refresh" in refresh.__doc__
