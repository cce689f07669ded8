"""Temporary files next to their targets, and cleanup of those left by killed processes."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

_RANDOM = "?" * 8  # the random part of `mkstemp` names
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | os.O_RDONLY


@contextmanager
def temporary_file(path: Path) -> Iterator[tuple[int, str]]:
    """Yield an open temporary file next to `path` and its name; deleted unless renamed.

    Files left by killed writers of `path` are removed first. Those of live writers are locked and
    kept, as is this one within the block.
    """
    remove_leftovers(path.parent, path.name)
    handle, name = _create_locked(path)
    held = os.dup(handle) if can_lock() else None  # a lock that survives closing the file
    try:
        yield handle, name
    finally:
        with suppress(OSError):
            os.unlink(name)
        if held is not None:
            os.close(held)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files left by killed writers of `name`, or of any file."""
    if not can_lock():
        return  # cannot tell dead writers from live ones
    shown = "*" if name is None else glob.escape(name)
    for leftover in folder.glob(f".{shown}.{_RANDOM}.tmp"):
        with suppress(OSError):  # not ours
            handle = os.open(leftover, _NO_FOLLOW)
            try:
                if try_lock(handle):
                    leftover.unlink()
            finally:
                os.close(handle)


def can_lock() -> bool:
    """Return whether the system supports file locks."""
    return find_spec("fcntl") is not None


def try_lock(handle: int) -> bool:
    """Lock an open file for this process; return False if another process holds it.

    Raises `OSError` if the file system has no locks.
    """
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_open_under(handle: int, path: str | Path) -> bool:
    """Return whether `path` still names the open file."""
    try:
        there, ours = os.stat(path), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _create_locked(path: Path) -> tuple[int, str]:
    """Create a temporary file, locked before any sweep."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            if not can_lock() or (try_lock(handle) and is_open_under(handle, name)):
                return handle, name
        except OSError:
            return handle, name  # without locks nothing is swept
        os.close(handle)
