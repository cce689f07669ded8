"""Free memory, and arrays in files for what does not fit into it."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

_LARGE = 1 / 4  # share of the free memory from which an array is put into a file
_BLOCK = 1 << 24  # bytes of rows transposed at a time
_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def empty(rows: int, width: int, dtype: Any = float, *, by_column: bool = False) -> np.ndarray:
    """Return an uninitialised array (rows, width), to be filled column by column.

    If it would take more than a quarter of the free memory it is in a file without a name, which
    is gone with the array, in column-major order (see `by_rows`); otherwise in row-major order
    unless `by_column`.
    """
    free = free_memory()
    if free is not None and rows * width * np.dtype(dtype).itemsize > _LARGE * free:
        with suppress(OSError):  # no room on the disk: memory may be enough
            return file_array((width, rows), dtype).T
    return np.empty((width, rows), dtype).T if by_column else np.empty((rows, width), dtype)


def by_rows(array: np.ndarray) -> np.ndarray:
    """Return a result of `empty` in row-major order; one in a file is copied to another file."""
    if array.flags.c_contiguous:
        return array
    found = file_array(array.shape, array.dtype)
    step = max(1, _BLOCK // max(1, array.shape[1] * array.itemsize))
    for start in range(0, len(array), step):
        found[start : start + step] = array[start : start + step]
    return found


def move_to_file(array: np.ndarray) -> np.ndarray:
    """Return a copy of an array in a file without a name."""
    found = file_array(array.shape, array.dtype)
    found[:] = array
    return found


def file_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array in a file without a name, in row-major order.

    Raises OSError if the disk has no room for it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size:
        return np.empty(shape, dtype)
    with temporary_file() as file:
        if hasattr(os, "posix_fallocate"):  # a full disk would end the process at a later write
            os.posix_fallocate(file.fileno(), 0, size)
        return np.asarray(np.memmap(file, dtype, "w+", shape=shape))


def temporary_file() -> IO[bytes]:
    """Open a file without a name in `temporary_directory`."""
    return tempfile.TemporaryFile(dir=temporary_directory())


def temporary_directory() -> str:
    """Return `$TMPDIR`, or /var/tmp, which unlike /tmp is on disk, or the system's choice."""
    named = any(os.environ.get(name) for name in ("TMPDIR", "TEMP", "TMP"))
    return "/var/tmp" if not named and os.access("/var/tmp", os.W_OK) else tempfile.gettempdir()


def free_memory() -> int | None:
    """Bytes this process may still allocate, by the machine and its control groups."""
    found = [_machine_memory(), *_cgroup_memory(_GROUPS, _OWN)]
    return min((left for left in found if left is not None), default=None)


def _machine_memory() -> int | None:
    with suppress(OSError, KeyError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        told = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        return told["MemAvailable"] + told.get("SwapFree", 0)
    with suppress(AttributeError, OSError, ValueError):  # elsewhere: physical memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cgroup_memory(root: Path, own: Path) -> Iterator[int]:
    """Yield the memory left under Linux control groups, versions 1 and 2."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            number, controllers, name = line.split(":", 2)
            if number == "0" and not controllers:
                yield from _group_memory(
                    root, name, ("memory.max", "memory.current", "inactive_file")
                )
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield from _group_memory(root / "memory", name, names)


def _group_memory(root: Path, name: str, names: tuple[str, str, str]) -> Iterator[int]:
    """Yield limit minus use of a group and its parents; file cache is reclaimable."""
    limit, used, pages = names
    own = root / name.lstrip("/")
    for group in (own, *own.parents):
        if not group.is_relative_to(root):
            return
        with suppress(OSError, ValueError, IndexError):  # "max", or no limit
            lines = (group / "memory.stat").read_text().splitlines()
            cached = next((int(line.split()[1]) for line in lines if line.startswith(pages)), 0)
            yield int((group / limit).read_text()) - int((group / used).read_text()) + cached
