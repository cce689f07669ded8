"""How long a large table takes to be read, told from the time that its first rows take."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tikhon.data.reading import Format, Source, is_table, read
from tikhon.errors import InputError

LARGE = 64 << 20  # bytes, below which nobody waits
_HEADS = (1 << 20, 4 << 20)  # bytes whose reading is timed

Head = tuple[bytes, float]  # a file of the first rows, and their share of the whole


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
        short, long = _heads(path)
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


def _heads(path: Path) -> list[Head]:
    """Raises `ValueError` for a file whose first rows cannot be cut off."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_HEADS[1])
    if start.startswith(b"PAR1"):
        return _of_parquet(path, size)
    if b"\0" in start or b"\n" not in start[: _HEADS[0]]:
        raise ValueError(f"{path} has no lines")
    texts = [start[:length] for length in _HEADS]
    texts = [text[: text.rindex(b"\n") + 1] for text in texts]
    return [(text, len(text) / size) for text in texts]


def _of_parquet(path: Path, size: int) -> list[Head]:
    import pyarrow as pa
    from pyarrow import parquet

    file: Any = parquet.ParquetFile(path)
    rows = file.metadata.num_rows
    wanted = [max(500, rows * length // size) for length in _HEADS]
    table = pa.Table.from_batches([next(file.iter_batches(batch_size=wanted[1]))])
    found = []
    for count in wanted:
        out = io.BytesIO()
        parquet.write_table(table.slice(0, count), out)
        found.append((out.getvalue(), min(count, len(table)) / rows))
    if found[0][1] == found[1][1]:
        raise ValueError(f"{path} begins with too few rows")
    return found
