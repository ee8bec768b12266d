"""eval/layer_bench/skew as far as it needs no GPU: its cases, what it makes of the ranks' times, its table, bad arguments."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from kept_results import kept_rows

from hopper_moe.eval.layer_bench import skew
from hopper_moe.eval.layer_bench.skew import Case, Result, cases, results, table
from hopper_moe.kernels.benchmarks.mega_moe import layer_calls
from hopper_moe.kernels.benchmarks.workload import SHAPES
from hopper_moe.kernels.device import Device


def test_cases_begin_with_uniform_routing():
    assert cases((512, 8192), [1.0], [0, 16]) == [
        *(Case(tokens, 0.0, None) for tokens in (512, 8192)),
        *(Case(tokens, 1.0, extra) for extra in (None, 0, 16) for tokens in (512, 8192)),
    ]


def test_the_slowest_rank_and_the_rows_of_each():
    """Rank 0's tokens send 5 rows to rank 0 and 1 to rank 1, rank 1's 4 and 2."""
    planned = [Case(1, 1.0, None)]
    (found,) = results(planned, [[((9.0, 8.0, 10.0), [5.0, 1.0])], [((7.0, 6.0, 12.0), [4.0, 2.0])]])
    assert found == Result(1, 1.0, None, 9.0, 8.0, 10.0, [9.0, 3.0])


def test_the_table_compares_with_uniform_and_with_the_ideal():
    uniform = Result(512, 0.0, None, 100.0, 99.0, 101.0, [6.0, 6.0], 98.0)
    lines = table([uniform, Result(512, 1.0, 16, 130.0, 129.0, 131.0, [9.0, 3.0], 125.0)]).splitlines()
    assert lines[2] == "| 512 | 0 | none | 100.0 (99.0-101.0) | 1.000 | 1.00 | 98.0 | 1.020 |"
    assert lines[3] == "| 512 | 1 | 16 redundant | 130.0 (129.0-131.0) | 1.300 | 1.50 | 125.0 | 1.040 |"
    assert "rearranged" in table([uniform, Result(512, 1.0, 0, 1.0, 1.0, 1.0, [1.0, 1.0])])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--exponents", "1.0,x"], "--exponents '1.0,x' is not a list of positive numbers: write it as 1.0,1.2."),
        (["--exponents", "nan"], "--exponents 'nan' is not a list of positive numbers"),
        (["--exponents", "-1"], "--exponents '-1' is not a list of positive numbers"),
        (["--redundant", "3"], "--redundant 3: 259 places are no multiple of 2 ranks."),
        (["--redundant", "0,x"], "--redundant '0,x' is not a list of whole numbers from 0: write it as 0,16,64."),
    ],
)
def test_bad_arguments_are_one_sentence(monkeypatch, arguments, said):
    monkeypatch.setattr(skew, "check_run", lambda *_: Device("NVIDIA H200", 132))
    result = CliRunner().invoke(skew.main, arguments)
    assert result.exit_code == 2 and said in result.output and len(result.output.splitlines()) == 1


def test_a_launch_takes_the_copies_of_the_weights_in_turn():
    made = []

    def layer(x, ids, weights, packed, *, swiglu_limit, out):
        made.append((x, ids, weights, packed, swiglu_limit, out))

    inputs = [(torch.full((2, 4), float(call)), f"ids {call}", f"weights {call}") for call in range(5)]
    run = layer_calls(layer, SHAPES["flash"], inputs, ["copy 0", "copy 1"])
    assert made == []
    run()
    assert [(int(x[0, 0]), *rest) for x, *rest, _, _ in made] == [
        (n, f"ids {n}", f"weights {n}", f"copy {n % 2}") for n in range(5)
    ]
    assert all(limit == 10.0 and out is made[0][-1] and out.shape == (2, 4) for *_, limit, out in made)


def test_kept_results_can_be_read():
    """Every committed line has the fields of a result and possible numbers; all rows are where some rank computes them."""
    for row in kept_rows(skew, "*_skew.jsonl"):
        _, _, ranks, shape = (row.pop(key) for key in ("commit", "gpu", "ranks", "shape"))
        found = Result(**row)
        assert len(found.rows) == ranks and sum(found.rows) == pytest.approx(found.tokens * ranks * SHAPES[shape].top_k), row
        assert 0 < found.us_p10 <= found.us <= found.us_p90 and found.ideal_us, row
