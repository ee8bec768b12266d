"""These tests import stock SGLang, which changes transformers for the whole process, so `test_stock_sglang.py` runs them in
processes of their own: one per SGLang version. Run one alone with `STOCK_SGLANG=0.5.23 pytest tests/stock_sglang`.
"""

import os
from pathlib import Path

import pytest

VERSION = os.environ.get("STOCK_SGLANG")
FILES = {"0.5.23": "test_0523_*.py", "0.5.17": "test_0517.py"}

collect_ignore_glob = [pattern for version, pattern in FILES.items() if version != VERSION]

if VERSION:
    # A name that only we would set; the kernel of every launch here unless a test says otherwise.
    os.environ["HOPPER_MOE_KERNEL"] = "reference"


@pytest.fixture(scope="session", autouse=True)
def plugged() -> None:
    """SGLang as in a server process on SM90: platform, then plugins."""
    import stock

    stock.simulate_sm90()
    from sglang.srt.plugins import load_plugins

    load_plugins()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A DeepSeek-V4 folder with FP4 experts, as far as argument resolution reads it."""
    import stock

    return stock.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def clean_environment():
    """A launch leaves notes in the environment; the next test starts without them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
