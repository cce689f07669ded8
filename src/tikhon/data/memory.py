"""Estimate from its first rows whether a table fits into memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tikhon.data.file_heads import read_heads
from tikhon.data.reading import Format, is_table, read_table
from tikhon.errors import DataError, InputError

_CELL = 8  # bytes of an encoded cell
_PACKED = 60  # highest ratio of memory to file size: smaller files always fit
_GIGA = 1e9
_GROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def refuse_too_large(path: Path, format: Format | None = None) -> None:
    """Raise `DataError` with the numbers for a table that needs more than the free memory.

    Files that cannot be cut by rows (Excel workbooks) are let through, as is everything if the
    free memory is unknown.
    """
    free = free_memory()
    try:
        if free is None or not is_table(path) or path.stat().st_size * _PACKED < free:
            return
        needed, rows, columns = estimate_memory(path, format)
    except (OSError, ValueError, ImportError, InputError):  # reading will report it
        return
    if needed <= free:
        return
    fitting = int(rows * free / needed / 1.1)
    raise DataError(
        f"{path} does not fit into memory: about {rows:,} rows of {columns} columns need "
        f"{needed / _GIGA:.1f} GB to be read and {free / _GIGA:.1f} GB are free; end other "
        f"programs, or give a file of fewer columns or of at most {fitting:,} such rows"
    )


def estimate_memory(path: Path, format: Format | None = None) -> tuple[float, int, int]:
    """Estimate the peak bytes to read and split a table, its rows and its columns.

    Factors measured on CSV and Parquet files of 30 and 100 columns: text is held beside its cells,
    encoded cells twice for a moment, and freed memory is not returned at once. Raises `ValueError`
    for a file that cannot be cut by rows.
    """
    content, share = read_heads(path)[0]
    source = read_table(path, format, content=content)
    rows, columns = len(source.frame) / share, len(source.frame.columns)
    cells = float(source.frame.memory_usage(deep=True).sum()) / share
    if content.startswith(b"PAR1"):
        return 3.5 * cells, round(rows), columns
    text = len(content) / share
    return 1.6 * cells + max(text, 2 * _CELL * rows * columns), round(rows), columns


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
