"""Shared test set-up: the `gpu` marker, a logged seed for fresh random data, and a stand-in for SGLang's server."""

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest


def _hopper_present() -> bool:
    import torch

    from hopper_moe.kernels.device import is_sm90

    return torch.cuda.is_available() and is_sm90(torch.cuda.get_device_capability(0))


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("TEST_SEED", str(random.SystemRandom().randrange(2**31)))  # here, because -q prints no header
    os.environ.setdefault("SGLANG_OPT_FUSE_MHC_POST_PRE", "0")  # test models are small: moe_backends/sglang/hyper_connections.py


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.import_plugin("many_seeds")
    parser.addoption("--replays", type=int, default=300, help="CUDA-graph replays of the fused kernel's test (the bar: 10000)")
    parser.addoption("--cases", type=int, help="random endpoints and damaged checkpoints that a test draws (the bars: 2000)")
    parser.addoption("--scenarios", type=int, help="scenarios of every number of emulated GPUs (30 are all)")


def pytest_report_header(config: pytest.Config) -> str:
    return f"hopper-moe: TEST_SEED={os.environ['TEST_SEED']} (set it to repeat a run)"


LONGEST = ("test_stock_sglang.py", "test_jit.py", "test_demo.py", "test_uninstall.py", "test_packaging.py")
"""Files of few tests that take minutes: they begin first, so that no worker waits for the other one at the end. The Makefile
keeps xdist from putting the files with most tests there."""


def _begin_with_the_longest(items: list[pytest.Item]) -> None:
    """Reorders files; the tests of one keep their order. A run without these files (tests/stock_sglang) keeps its own."""
    counts = Counter(item.path for item in items)
    place = {name: number for number, name in enumerate(LONGEST)}
    if any(path.name in place for path in counts):
        items.sort(key=lambda item: (place.get(item.path.name, len(place)), -counts[item.path], str(item.path)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _begin_with_the_longest(items)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or _hopper_present():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA Hopper GPU (compute capability 9.0)")
    for item in marked:
        item.add_marker(skip)


@pytest.fixture(scope="session")
def seed() -> int:
    """Seed of this run's random data; fresh in every run, printed in pytest's header. `--seeds` gives each test many."""
    return int(os.environ["TEST_SEED"])


@pytest.fixture(scope="session")
def cases(pytestconfig: pytest.Config) -> Callable[[int], int]:
    """How many cases a test draws that would draw `usual`: as many as `--cases` says, a quarter with each of many seeds."""
    asked, many = pytestconfig.getoption("cases"), pytestconfig.getoption("seeds")
    return lambda usual: asked or (max(usual // 4, 20) if many else usual)


@pytest.fixture
def seed_block() -> range:
    """For a test that starts a process of its own, which should go through several seeds under `--seeds`."""
    return range(int(os.environ["TEST_SEED"]), int(os.environ["TEST_SEED"]) + 1)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The usual cache of Hugging Face in an empty folder, without a network."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that puts a program in the place of SGLang's server, for every process that the test starts."""

    def put(program: str) -> None:
        (tmp_path / "sglang").mkdir()
        (tmp_path / "sglang" / "__init__.py").touch()
        (tmp_path / "sglang" / "launch_server.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    return put


@pytest.fixture(scope="session")
def prebuilt() -> Path:
    """Every library, compiled once per machine and set of sources: what `kernels build --into` gives."""
    from hopper_moe.kernels import jit

    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hopper_moe_tests" / "kernels"
    for library in jit.LIBRARIES.values():
        jit.build_into(library, folder)
    return folder
