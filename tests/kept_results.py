"""The committed results of a benchmark, for the tests that read them again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any


def kept_rows(benchmark: ModuleType, pattern: str) -> Iterator[dict[str, Any]]:
    """Every line of every file `pattern` in the folder `results` beside `benchmark`, of which there must be one."""
    kept = sorted((Path(str(benchmark.__file__)).parent / "results").glob(pattern))
    assert kept, pattern
    for path in kept:
        yield from map(json.loads, path.read_text().splitlines())
