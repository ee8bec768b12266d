"""What a worker registers appears where SGLang's endpoint collects it: in another process, through prometheus_client's files."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WORKER = """
import os
import torch
from hopper_moe.moe_backends.sglang.metrics import metrics
from hopper_moe.moe_backends.sglang.startup import Ready

class Runner:
    launch_counter = None

first, second = Runner(), Runner()
figures = metrics("mxfp4_mega", int(os.environ.get("REPLICA", "0")))
if figures is None:
    print("none")
else:
    ready = Ready()
    ready.add([torch.zeros(10, dtype=torch.int32)])
    ready.add([torch.zeros(2, dtype=torch.int32)])
    ready.checked(4.5e-3, 0.1)
    figures.ready(ready)
    for tokens in (7, 5):
        figures.count(first, tokens)
        figures.count(second, tokens)
"""
COLLECT = """
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def run(program: str, environ: dict[str, str]) -> str:
    return subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True).stdout


def test_figures_reach_the_collector(tmp_path):
    pytest.importorskip("prometheus_client")
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    run(WORKER, environ)
    found = run(COLLECT, environ)
    labels = '{dp_rank="0",kernel="mxfp4_mega",rank="0"}'
    for line in ("layers", 2), ("expert_bytes", 48), ("self_check_error", 0.0045), ("eager_tokens_total", 12):
        assert f"hopper_moe:{line[0]}{labels} {float(line[1])}" in found, found


def test_two_replicas_are_told_apart(tmp_path):
    """--dp-size 2: both have a rank 0, and write to the same files' folder."""
    pytest.importorskip("prometheus_client")
    for replica in ("0", "1"):
        run(WORKER, {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "REPLICA": replica})
    found = run(COLLECT, {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)})
    for replica in (0, 1):
        labels = f'{{dp_rank="{replica}",kernel="mxfp4_mega",rank="0"}}'
        assert f"hopper_moe:layers{labels} 2.0" in found and f"hopper_moe:eager_tokens_total{labels} 12.0" in found, found


def test_without_the_flag_nothing_is_registered():
    environ = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    assert run(WORKER, environ).strip() == "none"
