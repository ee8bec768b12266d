"""What several ranks refuse before they take memory, and what one says when another does not come. No GPU needed."""

from __future__ import annotations

import logging
import time

import pytest
from processes import wait_for

from hopper_moe.kernels import failure
from hopper_moe.kernels.failure import FailureRecord, PeerTimeout
from hopper_moe.kernels.jit import SOURCE_DIR
from hopper_moe.kernels.symmetric import RankPlace, check_places
from hopper_moe.kernels.workspace import default_wave_rows
from hopper_moe.quantization.errors import Refusal


def places(*hosts: str) -> list[RankPlace]:
    return [RankPlace(host, f"GPU-{rank}", ()) for rank, host in enumerate(hosts)]


FOUR = places("a", "a", "a", "a")


def test_a_proper_group_is_accepted():
    check_places(FOUR, 256)
    check_places([RankPlace("a", "GPU-0", ("GPU-9",)), RankPlace("a", "GPU-1", ())], 2)  # GPU 9 is visible but in no rank


@pytest.mark.parametrize(
    "everyone, num_experts, words",
    [
        (places(*"a" * 9), 9, "9 expert-parallel ranks are above the 8"),
        (FOUR, 130, "130 experts do not divide into 4"),
        (places("a", "a", "b", "b"), 256, "spans 2 hosts (a, b)"),
        ([*FOUR[:3], FOUR[1]], 256, "ranks 1 and 3 share GPU GPU-1"),
        ([*FOUR[:3], RankPlace("a", "GPU-3", ("GPU-1",))], 256, "rank 3's GPU cannot access that of rank 1"),
    ],
)
def test_other_groups_are_refused_in_one_sentence(everyone, num_experts, words):
    with pytest.raises(Refusal) as refused:
        check_places(everyone, num_experts)
    said = str(refused.value)
    assert words in said and said.endswith(".") and "\n" not in said


def report(record: FailureRecord, step: int) -> None:
    """As csrc/peers.cuh writes it: the fields first, then `reported`."""
    record._words[1:] = record._words.new_tensor([step, 3, 17, 42])
    record._words[0] = 1


@pytest.mark.parametrize("step, words", [(1, "token counts"), (2, "expert outputs")])
def test_a_report_names_ranks_step_and_layer(step, words):
    record = FailureRecord(rank=2, timeout_s=30, watch=False)
    record.check()
    assert record.message() is None
    report(record, step)
    with pytest.raises(PeerTimeout) as lost:
        record.check()
    for part in ("rank 2 waited 30 s for rank 3", "layer 17", "launch 42", words, "HOPPER_MOE_TIMEOUT_S"):
        assert part in str(lost.value)


def test_the_kernel_has_the_same_steps():
    peers = (SOURCE_DIR / "peers.cuh").read_text()
    declared = next(line for line in peers.splitlines() if line.startswith("enum class PeerStep"))
    assert len(failure._STEPS) == declared.count("=") and all(f"= {step}" in declared for step in failure._STEPS)


def test_the_watcher_logs_the_report_once(caplog):
    caplog.set_level(logging.CRITICAL, "hopper_moe")
    record = FailureRecord(rank=0, timeout_s=1, watch=True)
    time.sleep(0.3)
    assert not caplog.records
    report(record, 1)
    wait_for(lambda: bool(caplog.records))
    time.sleep(0.3)  # a second report would come with the next look
    assert [entry.getMessage() for entry in caplog.records] == [record.message()]


@pytest.mark.parametrize("capacity", [1, 128, 8192])
def test_pools_do_not_grow_with_the_ranks(capacity):
    one, two, eight = (default_wave_rows(n, capacity, 6, 32) for n in (1, 2, 8))
    assert one <= two == eight <= 1.5 * one + 128
    assert all(rows % 128 == 0 and rows >= 128 for rows in (one, two, eight))
