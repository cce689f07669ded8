"""Whether a table fits into memory, told from its first rows before it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tikhon.data.heads import heads
from tikhon.data.reading import Format, is_table, read
from tikhon.errors import DataError, InputError

_CELL = 8  # bytes of an encoded cell
_PACKED = 60  # times its size that a file needs at most: no smaller one can be too large
_GIGA = 1e9
_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def refuse_too_large(path: Path, format: Format | None = None) -> None:
    """Raise `DataError` for a table that needs more memory than is free, with the figures.

    A file that does not tell its rows from its beginning (an Excel workbook) is let through, and
    so is everything where the free memory is unknown.
    """
    free = free_memory()
    try:
        if free is None or not is_table(path) or path.stat().st_size * _PACKED < free:
            return
        needed, rows, columns = memory_of(path, format)
    except (OSError, ValueError, ImportError, InputError):  # the reading itself will tell
        return
    if needed <= free:
        return
    fitting = int(rows * free / needed / 1.1)
    raise DataError(
        f"{path} does not fit into memory: about {rows:,} rows of {columns} columns need "
        f"{needed / _GIGA:.1f} GB to be read and {free / _GIGA:.1f} GB are free; end other "
        f"programs, or give a file of fewer columns or of at most {fitting:,} such rows"
    )


def memory_of(path: Path, format: Format | None = None) -> tuple[float, int, int]:
    """Bytes that a table needs at most while it is read and split, its rows and its columns.

    Measured of CSV and Parquet files of 30 and 100 columns: a text is held beside its cells, an
    encoded cell twice for a moment, and what is let go does not come back at once. Raises
    `ValueError` for a file whose first rows cannot be cut off.
    """
    content, share = heads(path)[0]
    source = read(path, format, content=content)
    rows, columns = len(source.frame) / share, len(source.frame.columns)
    cells = float(source.frame.memory_usage(deep=True).sum()) / share
    if content.startswith(b"PAR1"):
        return 3.5 * cells, round(rows), columns
    text = len(content) / share
    return 1.6 * cells + max(text, 2 * _CELL * rows * columns), round(rows), columns


def free_memory() -> int | None:
    """Bytes that this process may still take: of the machine, or of its control group."""
    found = [_of_machine(), *_of_groups(_GROUPS, _OWN)]
    return min((left for left in found if left is not None), default=None)


def _of_machine() -> int | None:
    with suppress(OSError, KeyError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        told = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
        return told["MemAvailable"] + told.get("SwapFree", 0)
    with suppress(AttributeError, OSError, ValueError):  # elsewhere: all that there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _of_groups(root: Path, own: Path) -> Iterator[int]:
    """What is left of the limits of Linux' control groups, of version 2 and of version 1."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            number, controllers, name = line.split(":", 2)
            if number == "0" and not controllers:
                yield from _left(root, name, ("memory.max", "memory.current", "inactive_file"))
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                yield from _left(root / "memory", name, names)


def _left(root: Path, name: str, names: tuple[str, str, str]) -> Iterator[int]:
    """The limit of a group less what it uses; pages of files are given up when they are needed."""
    limit, used, pages = names
    own = root / name.lstrip("/")
    for group in (own, *own.parents):
        if not group.is_relative_to(root):
            return
        with suppress(OSError, ValueError, IndexError):  # "max", or none
            lines = (group / "memory.stat").read_text().splitlines()
            cached = next((int(line.split()[1]) for line in lines if line.startswith(pages)), 0)
            yield int((group / limit).read_text()) - int((group / used).read_text()) + cached
