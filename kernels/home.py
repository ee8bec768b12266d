"""A home folder and a user name for processes that have none they can use: a container's arbitrary user id, an empty environment,
a read-only root file system.

`Path.home()` and `getpass.getuser()` raise there, or name a folder that cannot be written; torch, FlashInfer and SGLang call them
and make their caches when they are imported.
"""

from __future__ import annotations

import getpass
import logging
import os
from pathlib import Path

from hopper_moe.kernels import cache_dir
from hopper_moe.quantization.errors import Refusal

logger = logging.getLogger("hopper_moe")

# What is read from the old home folder all the same: models, and the keys to fetch them.
_KEPT = (("HF_HOME", ".cache/huggingface"), ("MODELSCOPE_CACHE", ".cache/modelscope/hub"))


def ensure_home() -> None:
    """Sets HOME and USER for this process and its children where the system knows none that can be used. Raises nothing."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"
    old = _home()
    if old is not None and old.is_dir() and cache_dir.can_write(old):
        return
    home = cache_dir.fallback_dir() / "home"
    try:
        cache_dir.make(home.parent)
        home.mkdir(exist_ok=True)
    except (Refusal, OSError):
        if old is not None:
            return  # nothing can be written: whoever has to write says so
        home = Path("/")
    for variable, folder in _KEPT:
        if old is not None and variable not in os.environ and (old / folder).is_dir():
            os.environ[variable] = str(old / folder)
    os.environ["HOME"] = str(home)
    why = "has no home folder" if old is None else f"cannot write its home folder {old}"
    logger.warning("user id %d %s: HOME is %s for this process; set HOME to choose another", os.getuid(), why, home)


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:
        return None
