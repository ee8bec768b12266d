"""The folder of compiled kernels: the only reader of HOPPER_MOE_CACHE_DIR, and the default.

Reading the setting never creates a folder and never refuses one that is only not writable: a cache inside an image is read-only,
and most commands compile nothing. `jit.build` refuses when it has to write.
"""

from __future__ import annotations

import functools
import logging
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hopper_moe.quantization.errors import Refusal

logger = logging.getLogger("hopper_moe")

VARIABLE = "HOPPER_MOE_CACHE_DIR"


def parse(name: str, text: str) -> Path:
    """The folder in variable `name`. Raises Refusal for a value that cannot be a folder."""
    path = Path(os.path.expanduser(text))
    if text.startswith("~") and not path.is_absolute():
        raise Refusal(f"{name}={text!r} needs a home folder, which this user has not: give an absolute path or set HOME.")
    if not path.is_absolute():
        raise Refusal(f"{name}={text!r} is a relative path, which means another folder in every process: give an absolute one.")
    if os.path.exists(path) and not os.path.isdir(path):
        raise Refusal(f"{name}={text!r} is a file, but compiled kernels need a folder: give a folder or a new path.")
    return path


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """HOPPER_MOE_CACHE_DIR, or the default. Raises Refusal like `parse`."""
    environ = os.environ if environ is None else environ
    return parse(VARIABLE, environ[VARIABLE]) if VARIABLE in environ else default()


def default() -> Path:
    """The user's cache folder, or one in the temporary folder if that cannot be written (logged once). Raises nothing."""
    mine = user_dir()
    if mine is not None and can_write(mine):
        return mine
    fallback = fallback_dir()
    _log_fallback(mine, fallback)
    return fallback


def user_dir() -> Path | None:
    """`hopper_moe` in XDG_CACHE_HOME or ~/.cache; None for a user without a home folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: a relative path is ignored
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "hopper_moe" if os.path.isabs(base) else None


def fallback_dir() -> Path:
    """A folder of this user in the temporary folder."""
    try:
        base = tempfile.gettempdir()
    except FileNotFoundError:  # no temporary folder is writable; the code that needs to write reports it
        base = "/tmp"
    return Path(base) / f"hopper_moe-{os.getuid()}"


def can_write(folder: Path) -> bool:
    """Whether the folder is writable or can be created."""
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    return os.path.isdir(existing) and os.access(existing, os.W_OK | os.X_OK)


def is_trusted(folder: Path) -> bool:
    """Whether libraries in the folder may be loaded. The fallback's name is predictable for everyone who can write to the
    temporary folder, so it must belong to this user and be writable by no one else."""
    if folder != fallback_dir() or not os.path.lexists(folder):
        return True
    found = os.lstat(folder)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def make(folder: Path) -> None:
    """Create the folder for this user. Raises Refusal when it is not writable."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700 if folder == fallback_dir() else 0o777, exist_ok=True)
    except OSError as error:
        raise Refusal(f"{folder} cannot be made ({error.strerror}): set {VARIABLE} to a folder that can be written.") from None
    if not is_trusted(folder):
        raise Refusal(f"{folder} belongs to another user or can be written by others: set {VARIABLE} to a folder of your own.")
    if not can_write(folder):
        raise Refusal(f"{folder} cannot be written by this user: set {VARIABLE} to a folder that can.")


@functools.cache
def _log_fallback(mine: Path | None, fallback: Path) -> None:
    why = "this user has no home folder" if mine is None else f"{mine} cannot be written"
    logger.warning("%s: compiled kernels are kept in %s; set %s to choose another folder", why, fallback, VARIABLE)
