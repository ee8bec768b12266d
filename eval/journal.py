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


LOCK = "lock"


class RunLock:
    """One process at a time writes in a run folder, or deletes what is there. Held until closed; the file stays."""

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise Refusal(f"{folder}: another run is writing here: wait for it or give another --out.") from None

    def close(self) -> None:
        os.close(self._fd)


class Journal:
    """Answers by (question id, repeat). Safe against SIGKILL at any point: a half-written last line is dropped on opening.

    Failed requests are never written, so a resumed run asks them again. The caller holds the folder's `RunLock`.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._fd, whole)
        self.answers: dict[tuple[str, int], Sample] = {}
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                key = (record.pop("id"), record.pop("repeat"))
            except (ValueError, KeyError, AttributeError) as error:
                os.close(self._fd)
                raise Refusal(f"{path}, line {number}, is no answer of ours ({error!r}): --fresh starts over.") from error
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
