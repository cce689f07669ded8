"""Read tables of any size: those that do not fit into memory through files on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tikhon.data import memory, typed_files
from tikhon.data.csv_files import read_csv_in_pieces
from tikhon.data.file_heads import read_heads
from tikhon.data.on_disk import gather_columns, gather_texts, has_mapped_strings
from tikhon.data.reading import is_table, read_table
from tikhon.data.source import Format, Source, origin_of
from tikhon.errors import DataError, InputError
from tikhon.languages import sentence

if TYPE_CHECKING:
    import pandas as pd

_CELL = 8  # bytes of an encoded cell
_INPUT = 12  # of the inputs made from it: float32 by column and by row, and a flag
_ROW = 300  # bytes of memory a row takes on disk too: its texts in one column, target, hash
_PACKED = 60  # highest ratio of memory to file size: smaller files always fit
_GIGA = 1e9


@dataclass(frozen=True)
class Size:
    """The estimated size of a table.

    Attributes:
        needed: peak bytes of memory to read and split it.
        cells: bytes of its cells.
        start: its first bytes, unpacked.
    """

    needed: float
    cells: float
    rows: int
    columns: int
    start: bytes


def read_source(path: Path, format: Format | None = None) -> Source:
    """Read a table as `read_table` does; one that needs more than the free memory through files.

    CSV (gzipped or not) and Parquet files can be read in that way, with the same cells. Raises
    `DataError` with the figures where another one does not fit, or one fits neither into memory
    nor on the disk.
    """
    free = memory.free_memory()
    size = None if free is None else _large_size(path, format, free)
    if free is None or size is None or size.needed <= free:
        return read_table(path, format)
    if why := _find_obstacle(path, size, free):
        raise DataError(
            f"{path} does not fit into memory: about {size.rows:,} rows of {size.columns} columns "
            f"need {size.needed / _GIGA:.1f} GB to be read and {free / _GIGA:.1f} GB are free; "
            f"{why}; end other programs, or give a file of fewer columns or of at most "
            f"{int(size.rows * free / size.needed / 1.1):,} such rows"
        )
    source = (
        read_parquet_by_columns(path, format)
        if size.start.startswith(b"PAR1")
        else read_csv_in_pieces(path, format, gather_texts)
    )
    notice = sentence(
        "notice_on_disk", needed=f"{size.needed / _GIGA:.1f}", free=f"{free / _GIGA:.1f}"
    )
    return replace(source, notices=(*source.notices, notice), on_disk=True)


def _large_size(path: Path, format: Format | None, free: int) -> Size | None:
    """Estimate the size of a table; None if it is small, or if reading will report what it is."""
    with suppress(OSError, ValueError, ImportError, InputError):
        if is_table(path) and path.stat().st_size * _PACKED >= free:
            return estimate_size(path, format)
    return None


def _find_obstacle(path: Path, size: Size, free: int) -> str:
    """Explain why a table cannot be read through files on disk; "" if it can."""
    start = size.start
    if start.lstrip().startswith((b"{", b"[")) or start.startswith((b"ARROW1", b"FEA1")):
        return "only CSV and Parquet files are read in pieces"
    if not has_mapped_strings():
        return "to read it in pieces install pandas 3 and pyarrow (pip install 'tikhon[tables]')"
    if size.rows * _ROW > free:
        return f"in pieces it would still take {size.rows * _ROW / _GIGA:.1f} GB"
    room = shutil.disk_usage(memory.temporary_directory()).free
    disk = size.cells + (_CELL + _INPUT) * size.rows * size.columns
    if disk > room:
        return (
            f"read in pieces it takes {disk / _GIGA:.1f} GB of disk in "
            f"{memory.temporary_directory()}, where {room / _GIGA:.1f} GB are free (set TMPDIR to "
            "another disk)"
        )
    return ""


def estimate_size(path: Path, format: Format | None = None) -> Size:
    """Estimate the size of a table from its first rows.

    Factors measured on CSV and Parquet files of 30 and 100 columns: text is held beside its cells,
    encoded cells twice for a moment, and freed memory is not returned at once. Raises `ValueError`
    for a file that cannot be cut by rows.
    """
    content, share = read_heads(path)[0]
    source = read_table(path, format, content=content)
    rows, columns = len(source.frame) / share, len(source.frame.columns)
    cells = float(source.frame.memory_usage(deep=True).sum()) / share
    if content.startswith(b"PAR1"):
        return Size(3.5 * cells, cells, round(rows), columns, content[:8])
    text = len(content) / share
    needed = 1.6 * cells + max(text, 2 * _CELL * rows * columns)
    return Size(needed, cells, round(rows), columns, content[:8])


def read_parquet_by_columns(path: Path, format: Format | None = None) -> Source:
    """Read a Parquet file, holding one column in memory at a time."""
    from pyarrow import parquet

    format = format or Format()
    file: Any = parquet.ParquetFile(path)
    foreign: dict[str, str] = {}

    def columns() -> Iterator[tuple[str, pd.Series]]:
        for name in file.schema_arrow.names:
            frame, kinds = typed_files.from_arrow(path, file.read(columns=[name]))
            if list(frame.columns) != [name]:
                raise DataError(f"{path}: column {name!r} cannot be told from others: rename it")
            foreign.update(kinds)
            cells: Any = frame[name]
            yield name, cells.replace(list(format.missing), None) if format.missing else cells

    frame = gather_columns(columns())
    return Source(frame, path.name, (), (), origin_of(path), format, foreign)
