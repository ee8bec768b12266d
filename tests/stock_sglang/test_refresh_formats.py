"""Refreshes of every format, from disk, after EPLB, over several ranks, after a sleep, on a machine that stores wrongly."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
import stock
import torch
from refresh_rig import Server, contents, loaded, pointers, same, shuffled
from safetensors.torch import save_file
from stock import EXPERTS
from test_refresh import BAD, EP4, NAME, bytes_changed, spread

from hopper_moe.moe_backends.runners.fp8_mega import Fp8MegaRunner
from hopper_moe.moe_backends.runners.w4a16 import W4A16Runner
from hopper_moe.moe_backends.sglang.weight_calls import IPC_WITH_DRAFT
from hopper_moe.quantization import packing_w4a16
from hopper_moe.quantization.codecs import quantize_mxfp4
from hopper_moe.quantization.errors import Refusal
from hopper_moe.quantization.packing import PackedExperts

Tensors = dict[str, torch.Tensor]


def refreshed(args: Any, folder: Any, first: Tensors, then: Tensors, fresh: Tensors | None = None, **changes: Any) -> bool:
    """Whether a layer loaded from `first` and refreshed with `then` has the bytes of one loaded from `fresh`, in place."""

    def work(rank: int) -> tuple[Any, ...]:
        server = Server(loaded(first, **changes))
        places = pointers(server.experts)
        wanted = contents(loaded(then if fresh is None else fresh, **changes))
        answer = server.refresh(then)
        return answer, server.reason, same(contents(server.experts), wanted), pointers(server.experts) == places

    (found,) = stock.in_ranks(work, args, 1, folder)
    assert found == ((True, "Success"), None, True, True)
    return True


@pytest.fixture(scope="module")
def old(seed) -> Tensors:
    return stock.random_checkpoint(seed).tensors


@pytest.fixture(scope="module")
def new(seed) -> Tensors:
    return stock.random_checkpoint(seed + 1).tensors


def test_bf16_matrices_are_rounded_as_quantize_mxfp4_does(model, old, new, seed, tmp_path):
    rng, sent, wanted = torch.Generator().manual_seed(seed), {}, {}
    for name in (name for name in new if name.endswith(".weight")):
        rows, columns = new[name].shape
        sent[name] = torch.randn(rows, 2 * columns, generator=rng).bfloat16() / 32
        weight, scale = quantize_mxfp4(sent[name])
        wanted[name], wanted[name.replace(".weight", ".scale")] = weight.view(torch.int8), scale.view(torch.float8_e8m0fnu)
    assert refreshed(stock.resolve(model), tmp_path, old, sent, wanted)


def test_the_wide_format_takes_wide_rows(model, old, new, tmp_path):
    assert refreshed(stock.resolve(model), tmp_path, spread(old, 20), spread(new, 20))


def test_rows_are_rounded_where_the_server_may(model, old, new, tmp_path):
    os.environ["HOPPER_MOE_INEXACT_ROWS"] = "round"
    assert refreshed(stock.resolve(model), tmp_path, spread(old, 40), spread(new, 40))


def test_the_references_checkpoint_tensors_are_refreshed_themselves(model, old, new, tmp_path):
    os.environ.update(HOPPER_MOE_KERNEL="mxfp4_mega", HOPPER_MOE_INEXACT_ROWS="reference", HOPPER_MOE_SELF_CHECK="0")
    assert refreshed(stock.resolve(model), tmp_path, spread(old, 40), spread(new, 38))


@pytest.fixture
def no_kernel(monkeypatch) -> None:
    """The kernels need a GPU; the packed tensors, which are what is refreshed, do not. FlashInfer's helper for weights does:
    another permutation of the bytes takes its place."""
    os.environ["HOPPER_MOE_SELF_CHECK"] = "0"
    for runner in (Fp8MegaRunner, W4A16Runner):
        monkeypatch.setattr(runner, "prepare", lambda self, experts, shard: None)
    monkeypatch.setattr(packing_w4a16, "interleave_weight", lambda weight: weight.flip(0).roll(1, 1))


def test_w4a16(model, old, new, tmp_path, no_kernel):
    os.environ["HOPPER_MOE_KERNEL"] = "w4a16"
    assert refreshed(stock.resolve(model), tmp_path, old, new)


def test_fp8(seed, tmp_path, no_kernel):
    os.environ["HOPPER_MOE_KERNEL"] = "fp8_mega"
    args = stock.resolve(stock.write_model(tmp_path / "model", "F8_E4M3"))
    assert refreshed(
        args, tmp_path, *map(stock.random_fp8_tensors, (seed, seed + 1)), quant_config=stock.quant_config(is_fp4=False)
    )


def test_from_disk(model, old, new, tmp_path):
    """Stock's loader reads the files; a bad one is answered, not raised out of the scheduler."""
    from sglang.srt.arg_groups.overrides import model_config_of

    args = stock.resolve(model)
    config, name = model_config_of(args), NAME.format(BAD, "w1", "scale")
    for folder, tensors in {"good": new, "bad": new | {name: bytes_changed(7, 2, 255)(new[name])}}.items():
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")

    def work(rank: int) -> tuple[Any, ...]:
        server = Server(loaded(old), config=config)

        def update(folder: str) -> tuple[bool, str]:
            request = {"model_path": str(tmp_path / folder), "load_format": "auto"}
            return server.call("update_weights_from_disk", "UpdateWeightFromDiskReqInput", **request)

        bad, reason = update("bad"), server.reason
        return bad, reason, update("good"), server.reason, same(contents(server.experts), contents(loaded(new)))

    ((bad, reason, good, healed, equal),) = stock.in_ranks(work, args, 1, tmp_path)
    assert not bad[0] and "experts.5.w1.scale holds 255 (NaN)" in bad[1] and reason
    assert good[0] and healed is None and equal


def test_every_rank_answers_what_one_refused(model, old, new, tmp_path):
    """Expert 5 is on rank 1 alone, and SGLang sends rank 0's answer."""
    name = NAME.format(BAD, "w2", "scale")
    bad = new | {name: bytes_changed(1, 1, 255)(new[name])}

    def work(rank: int) -> tuple[Any, ...]:
        server = Server(loaded(old))
        server.begin()
        sent, ended = server.send(bad), server.end()
        reason = server.reason
        return sent, ended, reason, server.refresh(new), server.reason, same(contents(server.experts), contents(loaded(new)))

    found = stock.in_ranks(work, stock.resolve(model, *EP4), 4, tmp_path)
    for sent, ended, *_, healed, served, equal in found:
        assert not sent[0] and not ended[0] and "experts.5.w2.scale holds 255 (NaN)" in sent[1] and healed[0] and served is None
        assert equal and "experts.5.w2.scale" in ended[1]
    assert [reason is not None for _, _, reason, *_ in found] == [False, True, False, False]


def test_an_ipc_update_answers_what_its_post_hook_hides(model, old, new, tmp_path, monkeypatch):
    """checkpoint-engine needs a GPU: here stock's end of an update is swallowed as its post hook does, and so is what the last
    bucket of a message raises, since checkpoint-engine 0.4.2 does not look at that answer."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
    from sglang.srt.model_loader.loader import DefaultModelLoader

    def work(rank: int) -> tuple[Any, ...]:
        server, sent = Server(loaded(old)), []

        def update(self: WeightUpdater, request: Any) -> tuple[bool, str]:
            with contextlib.suppress(Refusal):
                server.model.load_weights(sent)
            with contextlib.suppress(Exception):
                DefaultModelLoader.postprocess_weights(server.model, torch.device("cpu"))
            return True, "IPC weight update completed successfully"

        monkeypatch.setattr(WeightUpdater, "update_weights_from_ipc", update)
        found = []
        name = NAME.format(BAD, "w2", "scale")
        refused = new | {name: bytes_changed(1, 1, 255)(new[name])}
        for tensors in (list(new.items())[:32], list(refused.items()), list(new.items())):
            sent[:] = tensors
            found.append(server.call("update_weights_from_ipc", "UpdateWeightsFromIPCReqInput", zmq_handles={}))
            found.append(server.reason)
        server.manager.draft_worker = server.manager.tp_worker
        with_draft = server.call("update_weights_from_ipc", "UpdateWeightsFromIPCReqInput", zmq_handles={})
        return [*found, with_draft, server.reason]

    ((half, reason, nan, of_nan, whole, served, *with_draft),) = stock.in_ranks(work, stock.resolve(model), 1, tmp_path)
    assert with_draft == [(False, IPC_WITH_DRAFT), None], "checkpoint-engine sends once, SGLang asks for each of two models"
    assert not half[0] and "experts.5.w3.weight did not come" in half[1] and reason == half[1]
    assert not nan[0] and "experts.5.w2.scale" in nan[1] and of_nan == nan[1]
    assert whole[0] and served is None


def test_after_eplb_has_moved_experts(model, old, new, seed, tmp_path):
    """Two ranks, four redundant experts: stock's map sends an expert to all of its places."""
    args = stock.resolve(model, "--tp-size", "2", "--ep-size", "2", "--enable-eplb", "--ep-num-redundant-experts", "4")

    from sglang.srt.arg_groups.overrides import model_config_of
    from sglang.srt.eplb import eplb_algorithms, expert_location  # noqa: F401 (imported once, before the ranks are forked)

    def work(rank: int) -> tuple[Any, ...]:
        expert_location.get_device = lambda: type("Cpu", (), {"device": "cpu"})
        config = model_config_of(args)
        counts = torch.randint(
            1, 1000, (1, config.hf_config.num_hidden_layers, EXPERTS), generator=torch.Generator().manual_seed(seed)
        )
        found = []
        for load in (counts, counts.flip(-1)):
            placed = expert_location.ExpertLocationMetadata.init_by_eplb(config, load)
            expert_location.set_global_expert_location_metadata(placed, allow_overwrite=True)
            if not found:
                server = Server(loaded(old, num_experts=EXPERTS + 4), threads=8)
            answer = server.refresh(shuffled(new, seed))
            fresh = contents(loaded(new, num_experts=EXPERTS + 4))
            found.append((answer, server.reason, same(contents(server.experts), fresh)))
        return found

    for found in stock.in_ranks(work, args, 2, tmp_path):
        assert found == [((True, "Success"), None, True)] * 2


@pytest.mark.parametrize(
    ("flags", "is_lost"), [((), True), (("--enable-weights-cpu-backup",), False)], ids=["no backup", "backup"]
)
def test_after_a_sleep_nothing_is_served_until_every_expert_came(model, old, new, tmp_path, monkeypatch, flags, is_lost):
    class Saver:
        enabled = True

        def pause(self, tag: str) -> None: ...

        resume = pause

    args = stock.resolve(model, *flags)

    def work(rank: int) -> tuple[Any, ...]:
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput, ResumeMemoryOccupationReqInput

        monkeypatch.setattr(torch, "get_device_module", lambda *_: torch.cpu)  # stock synchronises the GPU
        server, reasons = Server(loaded(old), saver=Saver()), []
        for tags in (["kv_cache"], ["weights"]):
            server.manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=tags))
            server.manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=tags))
            reasons.append(server.reason)
        server.refresh({})
        return *reasons, server.reason, server.refresh(new)[0], server.reason

    ((kv, asleep, still, awake, served),) = stock.in_ranks(work, args, 1, tmp_path)
    assert kv is None and awake and served is None
    for reason in (asleep, still):
        assert (reason is not None) == is_lost and (not is_lost or "released from memory" in reason)


def test_an_expert_that_reads_back_differently_is_refused(model, old, new, tmp_path, monkeypatch):
    """One wrong byte, as a broken machine would store it."""
    right = PackedExperts.store

    def wrong(self: PackedExperts, expert: int, *tensors: torch.Tensor) -> None:
        right(self, expert, *tensors)
        self.w2_packed[expert, 1, 0, 1, 77] ^= 1

    def work(rank: int) -> tuple[Any, ...]:
        server = Server(loaded(old))
        monkeypatch.setattr(PackedExperts, "store", wrong)
        return server.refresh(new), server.reason

    (((success, message), reason),) = stock.in_ranks(work, stock.resolve(model), 1, tmp_path)
    assert not success and "experts.0 reads back other values" in message and reason


def test_what_a_kernel_keeps_outlives_a_release_of_the_weights_memory(model, old, no_kernel, monkeypatch):
    """Stock saves and restores buffers; layers that share a kernel share its buffer, and no checkpoint has it."""
    from sglang.srt.managers.scheduler_components.weight_updater import _export_static_state, _import_static_state

    os.environ["HOPPER_MOE_KERNEL"] = "w4a16"
    limit = torch.full((EXPERTS,), 7.5)
    monkeypatch.setattr(W4A16Runner, "kept_tensors", (limit,))
    stock.publish(stock.resolve(model))
    both = torch.nn.ModuleList([loaded(old), loaded(old)])
    state = _export_static_state(both)
    limit.zero_()
    _import_static_state(both, state)
    assert torch.equal(limit, torch.full((EXPERTS,), 7.5))
    assert len(state["buffers"]) == 1 and not any("kept" in name for name in both.state_dict())
