"""The append-only file that makes a run resumable: one JSON line per finished answer, written before it counts."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

from sgl_eval.types import Sample

from hopper_moe.quantization.errors import Refusal

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


def json_line(record: dict[str, Any]) -> bytes:
    """One line of UTF-8. Half a surrogate pair, which UTF-8 cannot hold, is written as JSON's escape and read back."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


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
        self._path = path
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
        """Record a finished answer. One write call, so the line is whole or absent. Raises Refusal for a full disk, which leaves
        no half line."""
        record = {"id": example_id, "repeat": repeat, "seed": seed, **{name: getattr(sample, name) for name in _FIELDS}}
        line = json_line(record)
        with self._lock:
            size = os.fstat(self._fd).st_size
            try:
                if os.write(self._fd, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                os.ftruncate(self._fd, size)
                raise Refusal(
                    f"{self._path} cannot be written ({error.strerror}), after {len(self.answers)} answers: free some space, and "
                    "the same command carries on."
                ) from error
            self.answers[example_id, repeat] = sample

    def close(self) -> None:
        os.close(self._fd)
