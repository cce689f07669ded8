"""Temporary files beside the one that each becomes, and those that a kill has left."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

_RANDOM = "?" * 8  # what `mkstemp` puts between prefix and suffix
_AS_IT_IS = getattr(os, "O_NOFOLLOW", 0) | os.O_RDONLY


@contextmanager
def beside(path: Path) -> Iterator[tuple[int, str]]:
    """An open file in the folder of `path` and its name; gone at the end, unless it was renamed.

    Files that killed writers of `path` left are removed first. One that a living writer holds
    stays, and so does this one while the block runs.
    """
    sweep(path.parent, path.name)
    handle, name = _locked(path)
    held = os.dup(handle) if can_lock() else None  # the lock outlives the file's closing
    try:
        yield handle, name
    finally:
        with suppress(OSError):
            os.unlink(name)
        if held is not None:
            os.close(held)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed writers of `name`, or of any file, left in a folder."""
    if not can_lock():
        return  # nothing tells a dead writer from a living one
    shown = "*" if name is None else glob.escape(name)
    for leftover in folder.glob(f".{shown}.{_RANDOM}.tmp"):
        with suppress(OSError):  # not ours to remove
            handle = os.open(leftover, _AS_IT_IS)
            try:
                if lock(handle):
                    leftover.unlink()
            finally:
                os.close(handle)


def can_lock() -> bool:
    """Whether this system has locks on files."""
    return find_spec("fcntl") is not None


def lock(handle: int) -> bool:
    """Lock an open file for this process; False where another one holds it.

    Raises `OSError` where the file system has no locks.
    """
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_open_under(handle: int, path: str | Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        there, ours = os.stat(path), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)


def _locked(path: Path) -> tuple[int, str]:
    """A new file that is ours before anybody could sweep it."""
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        try:
            if not can_lock() or (lock(handle) and is_open_under(handle, name)):
                return handle, name
        except OSError:
            return handle, name  # without locks nobody sweeps
        os.close(handle)
