"""Read files with typed cells: Parquet, Feather, JSON lines and Excel workbooks."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tikhon.data.fields import count_titles
from tikhon.errors import DataError, InputError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_MICROSECONDS = {"s": 1e6, "ms": 1e3, "us": 1.0, "ns": 1e-3}
Frame = tuple["pd.DataFrame", dict[str, str]]  # with the columns of non-scalar cells: name -> type


def read_arrow(path: Path, content: bytes, kind: str) -> Frame:
    """Read a Parquet or Feather file. Raises `DataError` for a damaged one."""
    try:
        import pyarrow
        from pyarrow import feather, parquet
    except ImportError as error:
        raise InputError(f"{kind} files need pyarrow: pip install 'tikhon[tables]'") from error
    reader = parquet.read_table if kind == "Parquet" else feather.read_table
    try:
        table = reader(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise DataError(
            f"{path} is not a complete {kind} file ({reason}); copy it again"
        ) from error
    names = table.column_names
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{path}: columns appear twice: {', '.join(map(repr, sorted(twice)))}")
    return from_arrow(path, table)


def from_arrow(path: Path, table: pa.Table) -> Frame:
    """Convert a table to numbers, texts, booleans and timestamps. Raises `DataError`."""
    import pandas as pd
    import pyarrow as pa

    columns: dict[str, object] = {}
    foreign: dict[str, str] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        try:
            plain, what = _to_scalars(column)
            columns[name] = plain.to_pandas(date_as_object=False, timestamp_as_object=False)
        except (pa.ArrowException, ValueError, OverflowError, TypeError) as error:
            raise DataError(f"{path}: column {name!r} cannot be read: {error}") from error
        if what:
            foreign[name] = what
    return pd.DataFrame(columns), foreign


def _to_scalars(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, str]:
    """Return the column as numbers, texts, booleans or timestamps, or the name of another type."""
    import pyarrow as pa
    from pyarrow import compute as pc, types

    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], kind.storage_type)
        kind = column.type
    if types.is_dictionary(kind):
        return _to_scalars(column.cast(kind.value_type))
    if types.is_decimal(kind) or types.is_float16(kind):
        return column.cast(pa.float64()), ""
    if types.is_date(kind):
        return column.cast(pa.timestamp("s")), ""
    if types.is_time(kind):
        return column.cast(pa.string()), ""
    if types.is_duration(kind):
        ticks = column.cast(pa.int64()).cast(pa.float64(), safe=False)
        return pc.call_function("multiply", [ticks, pa.scalar(_MICROSECONDS[kind.unit])]), ""
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        try:
            return column.cast(pa.binary()).cast(pa.string()), ""
        except pa.ArrowInvalid:
            return pa.chunked_array([pa.nulls(len(column))]), "binary data"
    if types.is_nested(kind):
        what = "lists" if "list" in str(kind) else "maps" if types.is_map(kind) else "structs"
        return pa.chunked_array([pa.nulls(len(column))]), what
    return column, ""


def read_json(path: Path, text: str) -> Frame:
    """Read one JSON object per line, or a list of objects; `attrs` tells their lines."""
    rows, inside = _json_objects(
        text, wrapped=path.name.lower().removesuffix(".gz").endswith(".json")
    )
    lines: list[int] = []
    if not rows:
        rows, lines = _json_lines(path, text)
    names = list(dict.fromkeys(name for row in rows for name in row))
    frame, foreign = build_frame({name: [row.get(name) for row in rows] for name in names})
    frame.attrs |= {"inside": inside, "lines": lines}
    return frame, foreign


def _json_objects(text: str, *, wrapped: bool) -> tuple[list[dict[str, Any]], str | None]:
    """Return the objects of a JSON document that is a list, or an object with a single list; else
    none.
    """
    if not text.lstrip().startswith(("[", "{") if wrapped else "["):
        return [], None
    found: Any
    name: str | None = None
    try:
        found = json.loads(text, object_pairs_hook=_unique_keys)
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return [], None  # the error is reported by line
    if isinstance(found, dict):
        if rows := _rows_of_columns(found):
            return rows, None
        lists = [key for key, value in found.items() if isinstance(value, list) and value]
        if len(lists) != 1:
            return [], None
        name = lists[0]
        found = found[name]
    return (found, name) if all(isinstance(row, dict) for row in found) else ([], None)


def _rows_of_columns(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of `{"a": [...], "y": [...]}` or `{"columns": [...], "data": [[...]]}`."""
    lists = [cells for cells in document.values() if isinstance(cells, list)]
    names, data = document.get("columns"), document.get("data", [0])
    if names in lists and data in lists and all(isinstance(row, list) for row in data):
        return [dict(zip(map(str, names), row)) for row in data]
    if len(lists) < max(2, len(document)) or len({len(cells) for cells in lists}) > 1:
        return []
    if any(isinstance(cell, dict) for cells in lists for cell in cells):
        return []
    return [dict(zip(document, row, strict=True)) for row in zip(*lists, strict=True)]


def _json_lines(path: Path, text: str) -> tuple[list[dict[str, object]], list[int]]:
    rows: list[dict[str, object]] = []
    lines: list[int] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique_keys)
            json.dumps(row, ensure_ascii=False).encode()  # rejects lone surrogates
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise DataError(f"{path} line {number} is not JSON ({reason})") from error
        if not isinstance(row, dict):
            raise DataError(
                f"{path} line {number} holds {type(row).__name__}, an object was expected: one "
                '{"column": value, ...} per line'
            )
        rows.append(row)
        lines.append(number)
    return rows, lines


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return found


def read_workbook(path: Path, content: bytes) -> Frame:
    """Read the first sheet of an .xlsx file that holds a table: formulas as their saved values,
    merged cells each with the value of the first.

    The frame's `attrs` tell the numbers of its rows, and what was done.
    """
    try:
        import openpyxl
    except ImportError as error:
        raise InputError("Excel files need openpyxl: pip install 'tikhon[tables]'") from error
    try:
        merged, formulas = _features_of_sheets(content)
        book = openpyxl.load_workbook(io.BytesIO(content), read_only=not merged, data_only=True)
        sheets = [(sheet, _rows_of(sheet)) for sheet in book.worksheets]
    except Exception as error:  # damaged files raise anything from zipfile, XML or openpyxl
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise DataError(
            f"{path} is not a complete .xlsx file ({reason}); copy it again"
        ) from error
    sheet, rows = next((s for s in sheets if _is_tabular(s[1])), sheets[0])
    if not rows:
        raise DataError(f"{path} is empty: a header and rows are needed")
    above = count_titles([_stripped(row) for _, row in rows[:100]])
    header = _stripped(rows[above or 0][1])
    rows = [(line, row) for line, row in rows[(above or 0) + 1 :] if _stripped(row) != header]
    filled = _fill_merged(sheet, dict(rows)) if merged else set[int]()
    while (
        header
        and not header[-1]
        and all(len(r) < len(header) or r[len(header) - 1] is None for _, r in rows)
    ):
        header.pop()  # formatted but empty columns
    if twice := next((name for name in header if header.count(name) > 1), None):
        raise DataError(f"{path}: column {twice[:60]!r} appears twice; rename one of them")
    cells = {
        name: [row[i] if i < len(row) else None for _, row in rows]
        for i, name in enumerate(header)
    }
    empty = (n for n, column in cells.items() if n and all(cell is None for cell in column))
    if formulas and (name := next(empty, None)):
        raise DataError(
            f"{path}: column {name!r} holds formulas without their values: open the file in a "
            "spreadsheet program and save it, or save it as .csv"
        )
    frame, foreign = build_frame(cells)
    frame.attrs |= {
        "lines": [line for line, _ in rows],
        "titles": above,
        "filled": [name for i, name in enumerate(header) if i in filled],
        "sheet": sheet.title,
        "others": [other.title for other, _ in sheets if other is not sheet],
    }
    return frame, foreign


def _features_of_sheets(content: bytes) -> tuple[bool, bool]:
    """Return whether there are merged cells, and formulas whose values were not saved."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [name for name in archive.namelist() if name.startswith("xl/worksheets/sheet")]
        sheets = [archive.read(name) for name in names]
    merged = any(b"<mergeCell " in sheet for sheet in sheets)
    return merged, any(re.search(rb"</f>(?:<v\s*/>|<v></v>|</c>)", sheet) for sheet in sheets)


def _rows_of(sheet: Any) -> list[tuple[int, list[Any]]]:
    """Return the rows of a sheet that are not empty, with their numbers."""
    rows = enumerate(sheet.iter_rows(values_only=True), start=1)
    return [(line, list(row)) for line, row in rows if any(cell is not None for cell in row)]


def _stripped(row: Sequence[object]) -> list[str]:
    return ["" if cell is None else str(cell).strip() for cell in row]


def _is_tabular(rows: Sequence[tuple[int, list[Any]]]) -> bool:
    return len(rows) > 1 and any(sum(c is not None for c in row) > 1 for _, row in rows[1:])


def _fill_merged(sheet: Any, rows: dict[int, list[Any]]) -> set[int]:
    """Write the value of cells merged down a column into each of them; return the columns."""
    filled: set[int] = set()
    for cells in sheet.merged_cells.ranges:
        first, last, column = cells.min_row, cells.max_row, cells.min_col - 1
        if first in rows and last > first:
            filled.add(column)
            for line in rows.keys() & range(first, last + 1):
                rows[line][column] = rows[first][column]
    return filled


def build_frame(columns: Mapping[str, list[Any]]) -> Frame:
    """Build a frame of Python values: numbers, booleans, timestamps or texts in each column."""
    import numpy as np
    import pandas as pd

    found: dict[str, Any] = {}
    foreign: dict[str, str] = {}
    for name, cells in columns.items():
        kinds = {type(cell) for cell in cells if cell is not None}
        if nested := kinds & {list, dict}:
            foreign[name] = "lists" if list in nested else "objects"
            found[name] = pd.Series([None] * len(cells), dtype=object)
        elif kinds and kinds <= {int, float, Decimal}:
            found[name] = np.array([np.nan if c is None else _float(c) for c in cells])
        elif kinds and kinds <= {datetime, date}:
            found[name] = pd.to_datetime(pd.Series(cells, dtype=object), errors="coerce")
        elif kinds == {bool}:
            found[name] = pd.Series(cells, dtype="boolean")
        else:
            texts = [None if cell is None else _text(cell) for cell in cells]
            found[name] = pd.Series(texts, dtype="string").replace("", None)
    return pd.DataFrame(found), foreign


def _float(cell: float | Decimal) -> float:
    try:
        return float(cell)
    except OverflowError:
        return float("inf") if cell > 0 else float("-inf")


def _text(cell: object) -> str:
    """Format a cell of a mixed-type column as text."""
    if isinstance(cell, float) and cell.is_integer():
        return f"{cell:.0f}"
    if isinstance(cell, datetime | date | time):
        return cell.isoformat()
    return str(cell)
