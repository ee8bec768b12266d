"""The table of the CUDA kernels, end to end, with the CPU host in SGLang's place: servers, questions, comparison, table."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from importlib.metadata import distributions, entry_points
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from processes import SLEEPER, STUBBORN, has_said, runs, wait_for

from hopper_moe.eval.accuracy_table import gpu
from hopper_moe.eval.benchmarks import WORD_PROBLEMS
from hopper_moe.eval.demo import tiny_model
from hopper_moe.kernels.reference import exact, moe_layer
from hopper_moe.kernels.shard import ExpertShard
from hopper_moe.moe_backends.runners.reference import ReferenceRunner
from hopper_moe.quantization.packing import pack_experts

# Takes SGLang's arguments and starts the CPU host with them.
HOST = """
import os, sys
from hopper_moe.launch.cpu_host.server import serve
value = lambda name: sys.argv[sys.argv.index(name) + 1]
serve(value("--model-path"), host="127.0.0.1", port=int(value("--port")), kernel=os.environ["HOPPER_MOE_KERNEL"])
"""
MARKS = "<!-- accuracy table, H200: begin (written by eval.accuracy_table) -->\n\n<!-- accuracy table, H200: end -->\nend\n"


def test_table_is_written_from_served_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "start", partial(gpu.start, launcher=(sys.executable, "-c", HOST)))
    readme = tmp_path / "README.md"
    readme.write_text(MARKS)
    arguments = ["--kernels", "reference,w4a16", "--no-sabotages", "--no-log-probabilities", "--num-examples", "16"]
    arguments += ["--model", str(tiny_model())]
    arguments += ["--data", str(WORD_PROBLEMS), "--readme", str(readme), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(gpu.main, arguments)
    assert result.exit_code == 0, result.output
    lines = [line for line in readme.read_text().splitlines() if line.startswith("| ")]
    assert len(lines) == 3 and lines[1].startswith("| reference (W4A8) | ") and "w4a16" in lines[2]
    assert readme.read_text().endswith("end\n") and (tmp_path / "accuracy_table" / "gpu_model_h200.png").exists()
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"reference", "w4a16", "servers"}


# It would wait ten minutes for a server that ignores SIGTERM: an end before that was not waited for.
PATIENT = """
from hopper_moe.eval.accuracy_table.gpu import main
from hopper_moe.launch import server_process
server_process._PATIENCE = 600
main()
"""


@pytest.mark.parametrize(("number", "program"), [(signal.SIGHUP, SLEEPER), (signal.SIGTERM, STUBBORN)], ids=["hup", "stubborn"])
def test_a_table_that_is_ended_leaves_no_server_behind(tmp_path: Path, sglang, number: int, program: str) -> None:
    """While its servers start, which it does from threads. Told twice, it waits for none of them."""
    sglang(program)
    command = [sys.executable, "-c", PATIENT, "--no-sabotages"]
    command += ["--kernels", "reference,w4a16,marlin", "--model", str(tiny_model()), "--out", str(tmp_path / "out")]
    logs = [tmp_path / "out" / "servers" / f"{name}.log" for name in ("reference", "w4a16", "marlin")]
    process = subprocess.Popen(command, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    try:
        wait_for(lambda: all(map(has_said, logs)))
        process.send_signal(number)
        if program == STUBBORN:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(number)
        process.wait(120)
        assert not any(map(runs, logs))
    finally:
        process.kill()
        process.wait()
        for log in logs:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(log.read_text()), signal.SIGKILL)


def test_exact_experts_are_a_plugin_of_one_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Found through the metadata on PYTHONPATH and nowhere else; what it puts in place of the reference rounds nothing."""
    row = gpu.row_of("exact", tmp_path / "model", tmp_path)
    folder = row.environment["PYTHONPATH"].split(os.pathsep)[0]
    assert not [e for e in entry_points(group="sglang.srt.plugins") if "exact" in e.name]
    (found,) = (e for d in distributions(path=[folder]) for e in d.entry_points if e.group == "sglang.srt.plugins")
    monkeypatch.setattr(ReferenceRunner, "run", ReferenceRunner.run)  # put back afterwards
    found.load()()
    torch.manual_seed(seed)
    experts = pack_experts(
        *(torch.randint(low, high, shape, dtype=torch.uint8) for low, high, shape in (
            (0, 256, (4, 256, 64)), (118, 122, (4, 256, 4)), (0, 256, (4, 128, 64)), (118, 122, (4, 128, 4)),
        ))
    )  # fmt: skip
    runner = ReferenceRunner()
    runner.prepare(experts, ExpertShard(4, 0, 4, 2, 128, 128, 1.5, 16))
    x, ids, weights = torch.randn(16, 128).bfloat16(), torch.rand(16, 4).topk(2).indices.int(), torch.rand(16, 2)
    want = exact(x, ids, weights, experts, swiglu_limit=1.5)
    assert torch.equal(runner.run(x, ids, weights), want.bfloat16())
    rounded = moe_layer(x, ids, weights, experts, swiglu_limit=1.5)
    assert (rounded.double() - want).norm() > 0.01 * want.norm()


def test_rows_name_kernels_backends_and_mistakes(tmp_path: Path) -> None:
    ours, stock = (gpu.row_of(name, tmp_path, tmp_path) for name in ("w4a16", "marlin"))
    assert (ours.backend, ours.environment) == ("hopper_moe", {"HOPPER_MOE_KERNEL": "w4a16"})
    assert (stock.backend, stock.environment) == ("marlin", {})
    fp8 = gpu.row_of("fp8_mega", tmp_path, tmp_path)
    assert fp8.environment == {"HOPPER_MOE_KERNEL": "fp8_mega", "SGLANG_DSV4_FP4_DEQUANT": "1"}
    two = gpu.row_of("mxfp4_mega@2", tmp_path, tmp_path)
    assert (two.name, two.folder) == ("mxfp4_mega, 2 GPUs", "mxfp4_mega-2-GPUs")
    assert two.arguments[:4] == ("--tp", "2", "--dp", "2")
    assert two.environment == {"HOPPER_MOE_KERNEL": "mxfp4_mega"} and not ours.arguments
    moved = gpu.row_of("mxfp4_mega@2/auto", tmp_path, tmp_path)
    assert moved.folder == "mxfp4_mega-2-GPUs-DeepEP-auto" and moved.arguments[:-4] == two.arguments
    assert moved.arguments[-4:] == ("--moe-a2a-backend", "deepep", "--deepep-mode", "auto")
    assert moved.environment == {**two.environment, "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "256"}
    wrong = gpu.sabotaged_row("clamp missing", tiny_model(), "w4a16", tmp_path)
    assert wrong.sabotage and wrong.folder == "clamp-missing" and (wrong.model / "config.json").exists()
    assert gpu.sabotaged_row("clamp missing", tiny_model(), "w4a16", tmp_path) == wrong  # again: what is there is kept


@pytest.mark.parametrize(
    ("change", "second", "depends"),
    [(0.0, -9.0, False), (0.3, -9.0, False), (0.7, -9.0, True), (None, -0.4, False), (None, -9.0, True)],
    ids=["equal", "rounding", "another token's probability", "another token at a near tie", "another token"],
)
def test_answers_that_depend_on_their_batch_are_noticed(tmp_path: Path, change, second: float, depends: bool) -> None:
    """What the H200 showed on 2026-11-29: answers asked all at once were right, those asked one after the other were not."""

    def answers(tokens: list[int], logprob: float) -> list[dict]:
        return [{"prompt_tokens": 3, "tokens": tokens, "logprobs": [-0.1, logprob], "second_logprobs": [-5.0, second]}] * 70

    few = answers([7, 9] if change is None else [7, 8], -0.1 - (change or 0.0))
    for name, found in (("w4a16", answers([7, 8], -0.1)), ("w4a16-few", few[: gpu.FEW])):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    assert gpu.depends_on_its_batch({"few_at_a_time": gpu.in_small_batches(tmp_path, "w4a16")}) is depends
    assert not gpu.depends_on_its_batch({"name": "reference"})
