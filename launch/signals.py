"""Handling of the signals that end a command."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a batch system's limit, a closed terminal


@contextmanager
def handled(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Call `handler` for the signals that end a command while the block runs. For the main thread.

    Signals that this process was started to ignore stay ignored: SIGHUP under nohup, SIGINT of a shell's background job.
    """
    previous = {number: signal.getsignal(number) for number in _ENDS}
    taken = {number: was for number, was in previous.items() if was is not signal.SIG_IGN}
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in taken.items():
            signal.signal(number, was)
