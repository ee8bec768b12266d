"""The table of the CUDA kernels, end to end, with the CPU host in SGLang's place: servers, questions, comparison, table."""

import sys
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from hopper_moe.eval.benchmarks import WORD_PROBLEMS
from hopper_moe.eval.gpu_model import h200_table
from hopper_moe.launch.demo import tiny_model

# Takes SGLang's arguments and starts the CPU host with them.
HOST = """
import os, sys
from hopper_moe.launch import cpu_host
value = lambda name: sys.argv[sys.argv.index(name) + 1]
cpu_host.serve(value("--model-path"), host="127.0.0.1", port=int(value("--port")), kernel=os.environ["HOPPER_MOE_KERNEL"])
"""
MARKS = "<!-- table of truth, H200: begin (written by table_of_truth.py) -->\n\n<!-- table of truth, H200: end -->\nend\n"


def test_table_is_written_from_served_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h200_table, "serving", partial(h200_table.serving, launcher=(sys.executable, "-c", HOST)))
    readme = tmp_path / "README.md"
    readme.write_text(MARKS)
    arguments = ["--kernels", "reference,w4a16", "--no-sabotages", "--num-examples", "16", "--model", str(tiny_model())]
    arguments += ["--data", str(WORD_PROBLEMS), "--readme", str(readme), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(h200_table.main, arguments)
    assert result.exit_code == 0, result.output
    lines = [line for line in readme.read_text().splitlines() if line.startswith("| ")]
    assert len(lines) == 3 and lines[1].startswith("| reference (W4A8) | ") and "w4a16" in lines[2]
    assert readme.read_text().endswith("end\n") and (tmp_path / "table_of_truth_h200.png").exists()
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"reference", "w4a16", "servers"}
