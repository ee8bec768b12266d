"""eval/serving_bench/batches and stock_rows: they find what depends on a batch in a server and in a layer, and nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from stub_server import Stub, fraction

from hopper_moe.eval.serving_bench import batches, stock_rows
from hopper_moe.launch.ports import free_port

VOCABULARY = 1000


def server(depends: str = "") -> Stub:
    """Log probabilities are the prompt's; `depends`: "prefill" or "decode" also the batch's, from 4 on; "tokens": tokens are."""

    def reply(_method, path, _headers, body):
        if path == "/flush_cache":
            return 200, {}, None
        size = len(body["input_ids"]) if len(body["input_ids"]) >= 4 else 0
        found = []
        for ids in body["input_ids"]:
            given = [[None, ids[0]]] + [
                [-fraction(ids[i], size if depends == "prefill" else 0), ids[i]] for i in range(1, len(ids))
            ]
            chosen = [
                (-fraction(ids, i, size if depends == "decode" and i else 0), i + size * (depends == "tokens" and i > 2))
                for i in range(body["sampling_params"]["max_new_tokens"])
            ]
            found.append({"meta_info": {"input_token_logprobs": given, "output_token_logprobs": chosen}})
        return 200, {}, found

    return Stub(reply=reply)


def ran(tmp_path, depends: str = "", *arguments: str):
    out = tmp_path / "out.json"
    with server(depends) as stub:
        options = ["--batch-sizes", "2,4", "--prompts", "5", "--length", "9", "--num-tokens", "6", *arguments]
        result = CliRunner().invoke(batches.main, [stub.url.removesuffix("/v1"), *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text())["batches"]


def test_a_server_whose_answers_are_its_own(tmp_path):
    found = ran(tmp_path)
    assert list(found) == ["1", "2", "4"]
    for result in found.values():
        assert result["prefill"] == {"logprobs": 5 * 9, "other_bits": 0, "largest": 0.0}
        assert result["decode"] == {"logprobs": 5 * 5, "other_bits": 0, "largest": 0.0} and result["answers_that_part"] == 0


@pytest.mark.parametrize(("depends", "prefill", "decode"), [("prefill", 4 * 8, 0), ("decode", 0, 4 * 5)])
def test_what_depends_on_the_batch_is_counted(tmp_path, depends, prefill, decode):
    """The fifth prompt runs alone each time."""
    found = ran(tmp_path, depends)
    assert found["2"]["prefill"]["other_bits"] == found["2"]["decode"]["other_bits"] == 0
    assert found["4"]["prefill"]["other_bits"] == prefill and found["4"]["decode"]["other_bits"] == decode
    assert (found["4"]["prefill"]["largest"] > 0) == (prefill > 0) and (found["4"]["decode"]["largest"] > 0) == (decode > 0)


def test_decoding_is_compared_up_to_another_token(tmp_path):
    found = ran(tmp_path, "tokens")["4"]
    assert found["answers_that_part"] == 4 and found["decode"] == {"logprobs": 4 * 2 + 5, "other_bits": 0, "largest": 0.0}


def test_a_server_that_is_not_there_is_one_sentence(tmp_path):
    result = CliRunner().invoke(batches.main, [f"http://127.0.0.1:{free_port()}", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "does not answer" in result.output and len(result.output.splitlines()) == 1


class SplitLinear(torch.nn.Linear):
    """Sums two halves apart in batches of more than 32 rows, as a split over k does."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return (x[:, None] * w).sum(-1)

        if len(rows) <= 32:
            return product(rows, self.weight)
        half = self.in_features // 2
        return product(rows[:, :half], self.weight[:, :half]) + product(rows[:, half:], self.weight[:, half:])


class RowNorm(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * self.weight


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.norm = SplitLinear(64, 16, bias=False, dtype=torch.bfloat16), RowNorm()
        self.experts, self.shared_experts = (torch.nn.Sequential(torch.nn.Linear(64, 8).bfloat16()) for _ in range(2))
        self.hc_mult, self.hidden_size, self.hc_attn_fn, self.hc_attn_scale, self.hc_attn_base = 4, 64, None, None, None

    def hc_pre(self, rows: torch.Tensor, *_parameters: object) -> tuple[torch.Tensor, None]:
        return rows[:, 0] + rows[:, 1] * (len(rows) > 128), None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.wq(self.norm(rows))


def test_operations_that_round_a_row_by_its_batch_are_named(tmp_path):
    layer, out = Layer(), tmp_path / "rows.json"
    layer.register_forward_hook(stock_rows.probe({"out": str(out)}))
    layer(torch.zeros(3, 64, dtype=torch.bfloat16))
    found = json.loads(out.read_text())
    assert list(found)[:3] == ["wq", "norm", "shared_experts.0"]
    assert found["norm"] == {"row": [64], "other_bits": {}}
    assert set(found["wq"]["other_bits"]) <= {str(size) for size in stock_rows.BATCHES if size > 32} and found["wq"]["other_bits"]
    assert all(0 < far < 0.1 for far in found["wq"]["other_bits"].values())
    assert list(found["hyper-connections"]["other_bits"]) == ["129", "256"]
    assert found["hyper-connections, fused with the sublayer before"]["not_measured"]
    out.unlink()
    layer(torch.zeros(3, 64, dtype=torch.bfloat16))
    assert not out.exists(), "it runs once"
