"""Estimate the time to read a large table from its first rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tikhon.data.file_heads import Head, read_heads
from tikhon.data.reading import is_table, read_table
from tikhon.data.source import Format, Source
from tikhon.errors import InputError

LARGE = 64 << 20  # bytes below which no estimate is needed


def estimate_reading_time(
    path: Path, use: Callable[[Source], object], format: Format | None = None
) -> float | None:
    """Estimate the seconds to read a table and `use` its rows.

    Times two heads of the file: their common cost is constant, their difference grows with the
    rows. None for a small file, for one that is not a table, and where the heads do not tell.
    """
    try:
        if not is_table(path) or path.stat().st_size < LARGE:
            return None
        short, long = read_heads(path)
        less, more = (_time_reading(path, head, use, format) for head in (short, long))
    except (OSError, ValueError, ImportError, InputError):  # reading will report it
        return None
    return less + max(more - less, 0.0) / (long[1] - short[1]) * (1 - short[1])


def _time_reading(
    path: Path, head: Head, use: Callable[[Source], object], format: Format | None
) -> float:
    """Return the shortest of three: the first imports modules, another may have had to wait."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        use(read_table(path, format, content=head[0]))
        seconds.append(time.perf_counter() - began)
    return min(seconds)
