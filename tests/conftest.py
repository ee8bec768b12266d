"""Shared test set-up: the `gpu` marker, a logged seed for fresh random data, and a stand-in for SGLang's server."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest


def _hopper_present() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability(0) == (9, 0)


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("TEST_SEED", str(random.SystemRandom().randrange(2**31)))  # here, because -q prints no header


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--replays", type=int, default=300, help="CUDA-graph replays of the fused kernel's test (the bar: 10000)")
    parser.addoption("--scenarios", type=int, help="scenarios of every number of emulated GPUs (30 are all)")


def pytest_report_header(config: pytest.Config) -> str:
    return f"hopper-moe: TEST_SEED={os.environ['TEST_SEED']} (set it to repeat a run)"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or _hopper_present():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA Hopper GPU (compute capability 9.0)")
    for item in marked:
        item.add_marker(skip)


@pytest.fixture
def seed() -> int:
    """Seed of this run's random data; fresh in every run, printed in pytest's header."""
    return int(os.environ["TEST_SEED"])


@pytest.fixture
def sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that puts a program in the place of SGLang's server, for every process that the test starts."""

    def put(program: str) -> None:
        (tmp_path / "sglang").mkdir()
        (tmp_path / "sglang" / "__init__.py").touch()
        (tmp_path / "sglang" / "launch_server.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    return put
