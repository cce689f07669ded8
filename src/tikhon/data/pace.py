"""How long a large table takes to be read, told from the time that its first rows take."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tikhon.data.heads import Head, heads
from tikhon.data.reading import Format, Source, is_table, read
from tikhon.errors import InputError

LARGE = 64 << 20  # bytes, below which nobody waits


def reading_time(
    path: Path, use: Callable[[Source], object], format: Format | None = None
) -> float | None:
    """Seconds that reading a table and `use` of its rows will take.

    Two heads of the file are read and used: what both need is the same for the whole, what the
    longer one needs more grows with the rows. None for a file that is small or no table, and for
    one whose first rows do not tell.
    """
    try:
        if not is_table(path) or path.stat().st_size < LARGE:
            return None
        short, long = heads(path)
        _timed(path, short, use, format)  # what is imported on the way is no part of it
        less, more = _timed(path, short, use, format), _timed(path, long, use, format)
    except (OSError, ValueError, ImportError, InputError):  # the reading itself will tell
        return None
    return less + max(more - less, 0.0) / (long[1] - short[1]) * (1 - short[1])


def _timed(
    path: Path, head: Head, use: Callable[[Source], object], format: Format | None
) -> float:
    began = time.perf_counter()
    use(read(path, format, content=head[0]))
    return time.perf_counter() - began
