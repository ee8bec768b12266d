"""The append-only file that makes a run resumable: one JSON line per finished answer, written before it counts."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

from sgl_eval.types import Sample

from hopper_moe.moe_backends.errors import Refusal

_FIELDS = (
    "text",
    "reasoning_content",
    "completion_tokens",
    "prompt_tokens",
    "reasoning_tokens",
    "finish_reason",
    "generation_start_time",
    "generation_end_time",
)


class Journal:
    """Answers by (question id, repeat). Safe against SIGKILL at any point: a half-written last line is dropped on opening.

    Failed requests are never written, so a resumed run asks them again. One process at a time may hold a journal.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise Refusal(f"{path.parent}: another run is writing here: wait for it or give another --out.") from None
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._fd, whole)
        self.answers: dict[tuple[str, int], Sample] = {}
        for line in content[:whole].splitlines():
            record = json.loads(line)
            key = (record.pop("id"), record.pop("repeat"))
            self.answers[key] = Sample(**{name: record.get(name) for name in _FIELDS})
        self._lock = threading.Lock()

    def add(self, example_id: str, repeat: int, seed: int | None, sample: Sample) -> None:
        """Record a finished answer. One write call, so the line is whole or absent."""
        record = {"id": example_id, "repeat": repeat, "seed": seed, **{name: getattr(sample, name) for name in _FIELDS}}
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self._lock:
            os.write(self._fd, line)
            self.answers[example_id, repeat] = sample

    def close(self) -> None:
        os.close(self._fd)
