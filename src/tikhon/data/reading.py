"""CSV and Parquet files as frames, after checks that pandas does not make."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tikhon.errors import DataError, InputError

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".tsv", ".txt", ".parquet", ".pq")
_MANY = 8  # names and lines that a message shows at most


@dataclass(frozen=True)
class Format:
    """How a text file is written.

    Args:
        separator: one character between fields.
        decimal: "." or "," in numbers.
        encoding: of the text; a byte order mark is dropped.
        missing: texts that mean "no value", besides the empty field.
        bad_rows: "error", or "skip" to leave out rows of the wrong length and count them.

    Raises `InputError` for anything else.
    """

    separator: str = ","
    decimal: str = "."
    encoding: str = "utf-8"
    missing: tuple[str, ...] = ()
    bad_rows: str = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "missing", tuple(self.missing))
        if len(self.separator) != 1:
            raise InputError(f"separator must be one character, received {self.separator!r}")
        if self.decimal not in (".", ","):
            raise InputError(f"decimal must be '.' or ',', received {self.decimal!r}")
        if self.bad_rows not in ("error", "skip"):
            raise InputError(f"bad_rows must be 'error' or 'skip', received {self.bad_rows!r}")


@dataclass(frozen=True, eq=False)
class Source:
    """A frame and where it came from; cells of a CSV are text, an empty one is missing."""

    frame: pd.DataFrame
    name: str
    lines: Sequence[int] = ()  # line of the file for each row, where it has lines
    notices: tuple[str, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict)

    def line(self, row: int) -> str:
        """Where a row is, in words."""
        return f"line {self.lines[row]}" if len(self.lines) else f"row {row}"


def read(path: Path, format: Format | None = None) -> Source:
    """The rows of a CSV, TSV or Parquet file.

    Raises `DataError` for what cannot be read without a guess, with the line and the remedy:
    duplicate columns, rows longer or shorter than the header, another separator, another encoding,
    NUL bytes, no rows, a damaged Parquet file.
    """
    format = format or Format(separator="\t" if path.suffix == ".tsv" else ",")
    try:
        content = path.read_bytes()
        modified = path.stat().st_mtime
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    origin = {
        "source": str(path),
        "bytes": len(content),
        "modified": modified,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    if path.suffix in (".parquet", ".pq"):
        return Source(_parquet(path, content), path.name, origin=origin)
    return _csv(path, content, format, origin)


def _csv(path: Path, content: bytes, format: Format, origin: dict[str, Any]) -> Source:
    import pandas as pd

    if not content.strip():
        raise DataError(f"{path} is empty: a header and rows are needed")
    text = _decode(path, content, format)
    header, rows, lines, skipped = _scan(path, text, format)
    _check_header(path, header, format)
    if skipped and format.bad_rows == "error":
        line, width = skipped[0]
        raise DataError(
            f"{path} line {line}: {width} fields, the header has {len(header)} columns"
            f"{_others(len(skipped) - 1)}; correct the rows, or leave them out with "
            "--on-bad-row skip"
        )
    if not lines:
        raise DataError(f"no data rows in {path}: it holds the header alone")
    if skipped:
        text = _joined([header, *rows], format)
    frame = pd.read_csv(
        io.StringIO(text),
        sep=format.separator,
        dtype=str,
        keep_default_na=False,
        na_values=["", *format.missing],
        header=0,
        names=header,
        index_col=False,
    )
    notices = (f"{len(skipped)} rows of the wrong length were left out",) if skipped else ()
    return Source(frame, path.name, lines, notices, origin)


def _decode(path: Path, content: bytes, format: Format) -> str:
    for mark, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if content.startswith(mark) and "16" not in format.encoding:
            raise DataError(f"{path} is {encoding} text; read it with --encoding {encoding}")
    encoding = "utf-8-sig" if format.encoding.lower() in ("utf-8", "utf8") else format.encoding
    try:
        text = content.decode(encoding)
    except LookupError as error:
        raise InputError(f"unknown encoding {format.encoding!r}; try utf-8 or latin-1") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {line}: byte 0x{content[error.start]:02x} is not {format.encoding} "
            "text; give the file's encoding, for example --encoding latin-1"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path} line {line} holds a NUL byte: the file is damaged or not text")
    return text


def _scan(
    path: Path, text: str, format: Format
) -> tuple[list[str], list[list[str]], list[int], list[tuple[int, int]]]:
    """Header, rows (kept only where they may be written again), their lines, the bad ones."""
    reader = csv.reader(io.StringIO(text), delimiter=format.separator, strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    bad: list[tuple[int, int]] = []
    header: list[str] | None = None
    try:
        for row in reader:
            if not row:
                continue
            if header is None:
                header = row
            elif len(row) != len(header):
                bad.append((reader.line_num, len(row)))
            else:
                lines.append(reader.line_num)
                if format.bad_rows == "skip":
                    rows.append(row)
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from error
    return header or [], rows, lines, bad


def _check_header(path: Path, header: list[str], format: Format) -> None:
    if len(header) == 1:
        for other in (c for c in ";\t|," if c != format.separator and c in header[0]):
            decimal = " --decimal ," if other == ";" else ""
            shown = "'\\t'" if other == "\t" else f"'{other}'"
            raise DataError(
                f"{path}: one column found ({header[0][:60]!r}); the file looks like it is "
                f"separated by {shown}: use --sep {shown}{decimal}"
            )
    first: dict[str, int] = {}
    for position, name in enumerate(header, start=1):
        if name in first:
            raise DataError(
                f"{path}: column {name[:60]!r} appears twice, as column {first[name]} and column "
                f"{position}; rename one of them"
            )
        first[name] = position


def _joined(rows: list[list[str]], format: Format) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=format.separator).writerows(rows)
    return out.getvalue()


def _parquet(path: Path, content: bytes) -> pd.DataFrame:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'tikhon[tables]'") from error
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:120]
        raise DataError(
            f"{path} is not a complete Parquet file ({reason}); copy it again"
        ) from error
    names = table.column_names
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"{path}: columns appear twice: {', '.join(map(repr, sorted(twice)))}")
    if not table.num_rows:
        raise DataError(f"no data rows in {path}")
    return table.to_pandas().reset_index(drop=True)


def _others(count: int) -> str:
    return f" (and {count} more such rows)" if count > 0 else ""


def listed(names: Sequence[str]) -> str:
    """Some names, quoted and shortened, for a message."""
    shown = ", ".join(
        repr(name if len(name) <= 60 else name[:57] + "...") for name in names[:_MANY]
    )
    return shown + (f" and {len(names) - _MANY} more" if len(names) > _MANY else "")
