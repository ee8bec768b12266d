"""Processes that tests start through the package: programs for them, and what became of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

SLEEPER = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"  # a server that never becomes ready
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER


def wait_for(found: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, f"did not happen within {seconds:.0f} s"
        time.sleep(0.05)


def has_said(log: Path) -> bool:
    return log.exists() and log.read_text().endswith("\n")


def runs(log: Path) -> bool:
    """Whether the process is there whose number is the last word of the log's first line."""
    state = Path(f"/proc/{log.read_text().splitlines()[0].split()[-1]}/stat")
    return state.exists() and state.read_text().split()[2] != "Z"
