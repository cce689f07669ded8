"""Read files as data frames, with checks that pandas omits."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tikhon.data import typed_files
from tikhon.data.fields import (
    BLANKS,
    MAX_FIELD,
    SEPARATORS,
    TextLines,
    allow_long_fields,
    blank_titles,
    csv_rows,
    default_separator,
    detect_separator,
    repair_quotes,
    skip_blanks,
)
from tikhon.data.text_cells import detect_decimal_mark, stripped_texts
from tikhon.errors import DataError, InputError
from tikhon.languages import Sentence, sentence

if TYPE_CHECKING:
    import pandas as pd

_NAMED = {
    **dict.fromkeys((".csv", ".tsv", ".txt", ".data", ".dat"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "Parquet"),
    **dict.fromkeys((".feather", ".arrow"), "Feather"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    ".xlsx": "xlsx",
}  # file type by name
SUFFIXES = tuple(_NAMED)
_MAX_SHOWN = 8  # names and lines shown in a message at most
_LIMIT = 1 << 34  # bytes a compressed file may unpack to
_HEAD_SIZE = 1 << 20  # bytes searched for the end of a first line with a JSON object


@dataclass(frozen=True)
class Format:
    """The format of a text file.

    Args:
        separator: the character between fields; None to detect it.
        decimal: "." or "," in numbers; None to infer it from the numbers.
        encoding: of the text; a byte order mark is removed.
        missing: texts that mean "no value", besides the empty field.
        bad_rows: "error", or "skip" to drop and count rows of the wrong length.
        dates: "dmy", "mdy" or "ymd", the order of day, month and year, or a strptime format;
            None to infer the order from the dates.

    Raises `InputError` for anything else.
    """

    separator: str | None = None
    decimal: str | None = None
    encoding: str = "utf-8"
    missing: tuple[str, ...] = ()
    bad_rows: str = "error"
    dates: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "missing", tuple(self.missing))
        if self.separator is not None and len(self.separator) != 1:
            raise InputError(f"separator must be one character, received {self.separator!r}")
        if self.decimal not in (None, ".", ","):
            raise InputError(f"decimal must be '.' or ',', received {self.decimal!r}")
        if self.bad_rows not in ("error", "skip"):
            raise InputError(f"bad_rows must be 'error' or 'skip', received {self.bad_rows!r}")
        if self.dates is not None and self.dates not in ("dmy", "mdy", "ymd"):
            if "%" not in self.dates:
                raise InputError(
                    "dates must be dmy, mdy, ymd or a format such as '%d/%m/%Y', received "
                    f"{self.dates!r}"
                )


@dataclass(frozen=True, eq=False)
class Source:
    """A data frame with its origin; cells of a CSV are text, empty ones missing."""

    frame: pd.DataFrame
    name: str
    lines: Sequence[int] = ()  # line in the file of each row, if it has lines
    notices: tuple[Sentence, ...] = ()
    origin: dict[str, object] = field(default_factory=dict)
    format: Format = Format()
    foreign: dict[str, str] = field(default_factory=dict)  # columns of lists and other non-scalars

    def line(self, row: int) -> str:
        """Name the location of a row."""
        return f"line {self.lines[row]}" if len(self.lines) else f"row {row}"

    @cached_property
    def decimal(self) -> str:
        """Decimal mark of the file, given or proved by its numbers; "" if neither."""
        from pandas.api import types

        if self.format.decimal:
            return self.format.decimal
        columns: list[Any] = [self.frame[name] for name in self.frame.columns]
        return detect_decimal_mark(
            [stripped_texts(c) for c in columns if not types.is_numeric_dtype(c)]
        )


def is_table(path: Path) -> bool:
    """Return whether a path is named as a table: `.csv`, `.CSV`, `.csv.gz`, `.parquet`, ..."""
    name = path.name.lower().removesuffix(".gz")
    return name.endswith(SUFFIXES)


def read_table(
    path: Path, format: Format | None = None, *, content: bytes | None = None
) -> Source:
    """Read the rows of a CSV, TSV, JSON lines, Excel, Feather or Parquet file, gzipped or not.

    The type is detected by content, then by name; `content` replaces that of the file. Raises
    `DataError`, with the line and the remedy, for ambiguous or damaged files: duplicate columns,
    rows longer or shorter than the header, another encoding, NUL bytes, no rows, an open quote.
    """
    format = format or Format()
    try:
        content = path.read_bytes() if content is None else content
        modified = path.stat().st_mtime
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    origin = {
        "source": str(path),
        "bytes": len(content),
        "modified": modified,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    name = path.name.lower()
    if content.startswith(b"\x1f\x8b"):  # a server may have unpacked a .gz file
        content = _unzipped(path, content)
    name = name.removesuffix(".gz")
    kind = _detect_type(path, name, content)
    if kind == "csv":
        if not content or content.isspace():
            raise DataError(f"{path} is empty: a header and rows are needed")
        text = _decode(path, content, format)
        del content  # frees memory: a large table is held as bytes, text and cells in turn
        return _csv(path, *_preamble(path, text, format.separator), format, origin)
    if kind == "json":
        frame, foreign = typed_files.read_json(path, _decode(path, content, format))
    elif kind == "xlsx":
        frame, foreign = typed_files.read_workbook(path, content)
    else:
        frame, foreign = typed_files.read_arrow(path, content, kind)
    if not len(frame):
        raise DataError(f"no data rows in {path}")
    told, frame.attrs = frame.attrs, {}
    if format.missing:
        frame = frame.replace(list(format.missing), None)
    notices = [sentence("notice_inside", name=told["inside"])] if told.get("inside") else []
    notices += [sentence("notice_titles", count=told["titles"])] if told.get("titles") else []
    if told.get("filled"):
        notices.append(sentence("notice_filled", columns=quote_names(told["filled"])))
    if told.get("others"):
        others = quote_names(told["others"])
        notices.append(sentence("notice_sheet", name=told["sheet"], others=others))
    lines = told.get("lines", ())
    return Source(frame, path.name, lines, tuple(notices), origin, format, foreign)


def refuse_other_types(path: Path) -> None:
    """Raise `DataError` for a file not named as a table, if its first bytes tell another type."""
    if path.is_file():
        with path.open("rb") as file:
            _detect_type(path, path.name.lower(), file.read(_HEAD_SIZE))


def _detect_type(path: Path, name: str, content: bytes) -> str:
    """Detect the file type by its first bytes, then by its name."""
    if content.startswith(b"PK\3\4") and b"xl/" in content:
        return "xlsx"
    for place, sign, kind in _SIGNS:
        if content.startswith(sign, place):
            return kind
    for place, sign, what in _OTHERS:
        if content.startswith(sign, place):
            raise DataError(f"{path} is {what}, not a table: save it as .csv, .xlsx or .parquet")
    if content[:512].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{path} is a web page, not a table: download the file itself")
    if _ARFF.match(content[:_HEAD_SIZE]):
        raise DataError(
            f"{path} is an ARFF file: save it as .csv, with the names of its attributes as header"
        )
    named = next((kind for suffix, kind in _NAMED.items() if name.endswith(suffix)), "csv")
    return "json" if named == "csv" and _is_json(content) else named


_SIGNS = ((0, b"PAR1", "Parquet"), (0, b"ARROW1", "Feather"), (0, b"FEA1", "Feather"))
_OTHERS = (
    (30, b"mimetypeapplication/vnd.oasis.opendocument", "an OpenDocument file"),
    (0, b"PK\3\4", "a zip archive (unpack it first)"),
    (0, b"\xd0\xcf\x11\xe0", "an old Excel workbook (.xls)"),
    (0, b"\x1f\x8b", "compressed twice (unpack it first)"),
    (0, b"BZh", "compressed with bzip2 (unpack it first)"),
    (0, b"\xfd7zXZ", "compressed with xz (unpack it first)"),
    (0, b"\x28\xb5\x2f\xfd", "compressed with zstd (unpack it first)"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\x89PNG", "a picture"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x93NUMPY", "an array of NumPy (load it as .npy)"),
    (0, b"\x80\x04", "a pickle, which is never opened"),
    (0, b"\x80\x05", "a pickle, which is never opened"),
    (0, b"Obj\x01", "an Avro file"),
    (0, b"ORC", "an ORC file"),
    (0, b"<stata_dta>", "a Stata file (.dta)"),
    (0, b"$FL2", "an SPSS file (.sav)"),
    (12, b"\xc2\xea\x81\x60", "a SAS file (.sas7bdat)"),
    (0, b"X\n\0\0", "an R file (.rds)"),
    (0, b"RDX", "an R file (.RData)"),
    (0, b"<?xml", "an XML document"),
    (0, b"{\\rtf", "an RTF document"),
    (0, b"SQLite format 3", "a SQLite database"),
    (0, b"version https://git-lfs", "a pointer of Git LFS (fetch the file with: git lfs pull)"),
    (257, b"ustar", "a tar archive (unpack it first)"),
)  # offset, magic bytes, type


_ARFF = re.compile(rb"(?:\s|%[^\n]*\n)*@relation\b", re.IGNORECASE)


def _is_json(content: bytes) -> bool:
    """Return whether the first line is a JSON object, or a list begins with one, which a CSV row
    never is.
    """
    if re.match(rb'\s*\[\s*\{\s*"', content[:_HEAD_SIZE]):
        return True
    line = content[:_HEAD_SIZE].lstrip().partition(b"\n")[0]
    try:
        return line.startswith(b"{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _unzipped(path: Path, content: bytes) -> bytes:
    try:
        with gzip.open(io.BytesIO(content)) as stream:
            found = stream.read(_LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file ({error}); copy it again") from error
    if len(found) > _LIMIT:
        raise DataError(f"{path} unpacks to more than {_LIMIT:,} bytes, the limit")
    return found


def _preamble(
    path: Path, text: str, separator: str | None
) -> tuple[TextLines, str | None, tuple[Sentence, ...]]:
    """Blank out what precedes the header; return the text, a declared separator and notices.

    `sep=;` is written by spreadsheets; lines with a # are comments unless they have as many fields
    as the header; titles are those detected by `blank_titles`.
    """
    if found := re.match(r'"?sep=(.)"?\n', text, re.IGNORECASE):
        return TextLines("\n" + text[found.end() :]), separator or found[1], ()
    notices: list[Sentence] = []
    text, repaired = repair_quotes(text, separator, default_separator(path))
    if repaired:
        notices.append(sentence(repaired))
    if comments := re.match(r"(?:#[^\n]*\n)+", text):
        header = text[comments.end() :].partition("\n")[0]
        marks = [separator] if separator else SEPARATORS
        lines = comments[0].splitlines()
        if any(0 < line.count(mark) == header.count(mark) for line in lines for mark in marks):
            return TextLines(text), separator, tuple(notices)
        notices.append(sentence("notice_comments", count=len(lines)))
        text = "\n" * len(lines) + text[comments.end() :]
    text, titles = blank_titles(text, separator, default_separator(path))
    if titles:
        notices.append(sentence("notice_titles", count=titles))
    if rule := _RULE.match(text):
        notices.append(sentence("notice_rule", line=text.count("\n", 0, rule.start(1)) + 1))
        text = text[: rule.start(1)] + text[rule.end(1) :]
    return TextLines(text), separator, tuple(notices)


# dashes below the header, as in Markdown and in the output of databases
_RULE = re.compile(r"\s*[^\n]+\n([ \t|+:]*-{3,}[-:= \t]*[|+][-|+:= \t]*)(?=\n)")


def _csv(
    path: Path,
    text: TextLines,
    told: str | None,
    above: tuple[Sentence, ...],
    format: Format,
    origin: dict[str, object],
) -> Source:
    import pandas as pd

    separator = skip_blanks(text, told or detect_separator(path, text))
    header, rows, lines, skipped = _scan(path, text, separator, keep=format.bad_rows == "skip")
    if not lines and len(header) > 1 and {width for _, width in skipped} == {len(header) + 1}:
        if more := _extend_header(text, separator, header):
            header, above = more[0], (*above, more[1])
            lines, skipped = [line for line, _ in skipped], []
    empty = _find_nameless(text, separator, header)
    header = _check_header(path, header, separator[0], empty)
    if skipped and format.bad_rows == "error":
        raise DataError(_wrong_length(path, header, lines, skipped))
    if not lines:
        raise DataError(f"no data rows in {path}: it holds the header alone")
    missing = ["", *format.missing]
    try:
        frame = (
            pd.DataFrame(rows, columns=header, dtype=str)
            if skipped
            else pd.read_csv(
                cast("Any", text),
                sep=r"\s+" if separator == BLANKS else separator[0],
                skipinitialspace=len(separator) > 1,
                dtype=str,
                keep_default_na=False,
                na_values=missing,
                header=0,
                names=header,
                index_col=False,
            )
        )
    except (ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if skipped:
        frame = frame.mask(frame.isin(missing))
    notices = [*above, *_find_missing_header(header)]
    if again := _find_repeated_headers(frame):
        frame = frame.drop(index=again).reset_index(drop=True)
        notices.append(sentence("notice_headers", count=len(again), line=lines[again[0]]))
        lines = [line for row, line in enumerate(lines) if row not in set(again)]
    if empty:
        frame = frame.drop(columns=[header[i] for i in empty])
        notices.append(sentence("notice_nameless", count=len(empty)))
    if skipped:
        notices.append(sentence("notice_wrong_length", count=len(skipped)))
    if told is None and separator[0] != default_separator(path):
        notices.append(sentence("notice_separator", mark=separator[0]))
    return Source(frame, path.name, lines, tuple(notices), origin, format)


def _find_repeated_headers(frame: pd.DataFrame) -> list[int]:
    """Return the rows that hold the names of the columns, as in files joined end to end."""
    names = list(frame.columns)
    like = np.flatnonzero((frame[names[0]] == names[0]).to_numpy(bool)) if len(names) > 1 else ()
    return [int(row) for row in like if [str(c).strip() for c in frame.iloc[row]] == names]


def _extend_header(
    text: TextLines, separator: str, header: list[str]
) -> tuple[list[str], Sentence] | None:
    """Extend the header if every row has one field more: row names, or an empty last field.

    None if the header may lack a name instead.
    """
    with allow_long_fields():
        rows = [row for row in csv_rows(text, separator) if row][1:]
    if not any(row[-1].strip() for row in rows):
        return [*header, ""], sentence("notice_row_ends")
    first = [row[0] for row in rows]
    counted = first == [str(i) for i in range(1, len(rows) + 1)]
    named = len(set(first)) == len(rows) and not any(re.match(r"[-+.\d\s]|$", t) for t in first)
    if len(rows) < 2 or not (counted or named):
        return None
    return ["", *header], sentence("notice_row_names")


def _wrong_length(
    path: Path, header: list[str], lines: list[int], skipped: list[tuple[int, int]]
) -> str:
    """Explain rows with a different number of fields than the header."""
    line, width = skipped[0]
    widths = [width for _, width in skipped]
    least = len(header) + (2 if line == 2 else 1)  # with one more, a name may be missing
    if len(skipped) > len(lines) and (width := max(widths, key=widths.count)) >= least:
        return (
            f"{path} line {line}: {width} fields{_more_rows(len(skipped) - 1)}, what stands for "
            f"the header has {len(header)} ({quote_names(header)}): remove the lines above the "
            "header"
        )
    return (
        f"{path} line {line}: {width} fields, the header has {len(header)} columns"
        f"{_more_rows(len(skipped) - 1)}; correct the rows, or leave them out with "
        "--on-bad-row skip"
    )


_MARKS = {
    **dict.fromkeys((b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "utf-32"),
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "utf-16"),
}


def _decode(path: Path, content: bytes, format: Format) -> str:
    """Decode the text and normalise line ends; a byte order mark sets the encoding."""
    encoding = "utf-8-sig" if format.encoding.lower() in ("utf-8", "utf8") else format.encoding
    marked = next((found for mark, found in _MARKS.items() if content.startswith(mark)), None)
    if marked is not None and marked[-2:] not in encoding:
        encoding = marked
    try:
        text = content.decode(encoding)
    except LookupError as error:
        raise InputError(f"unknown encoding {format.encoding!r}; try utf-8 or cp1252") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        hint = _suggest_encodings(content, error.start)
        raise DataError(
            f"{path} line {line}: byte 0x{content[error.start]:02x} is not "
            f"{encoding.removesuffix('-sig')} text; give the file's encoding{hint}"
        ) from error
    except UnicodeError as error:
        raise DataError(f"{path} is not {encoding} text: {error}") from error
    if "\0" in text:
        if not marked and text[1:200:2].count("\0") + text[:200:2].count("\0") > 60:
            order = "le" if text[1] == "\0" else "be"
            raise DataError(f"{path} is UTF-16 without a mark: say --encoding utf-16-{order}")
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path} line {line} holds a NUL byte: the file is damaged or not text")
    text = text.removesuffix("\x1a")  # DOS end of file
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _suggest_encodings(content: bytes, place: int) -> str:
    """Show the bytes around an offset in each plausible encoding.

    Letters of two bytes leave runs of even length, accents stand within words of ASCII letters.
    """
    start = max(content.rfind(mark, 0, place) for mark in b"\n,;\t") + 1
    piece = re.split(rb"[\n,;\t]", content[start : start + 60])[0].strip(b'\r"')
    runs = re.findall(rb"[\x80-\xff]+", content)
    even = sum(len(run) % 2 == 0 for run in runs)
    accents = len(re.findall(rb"(?i)[a-z][\x80-\xff]{1,2}(?=[a-z])", content))
    pairs = even > 0.8 * len(runs) and accents < len(runs) / 2
    found: dict[str, str] = {}
    for encoding in _OF_PAIRS if pairs else _ENCODINGS:
        with suppress(UnicodeDecodeError):
            text = piece.decode(encoding)
            if text.isprintable() and not _HALF_WIDTH.search(text):
                found.setdefault(text, f"--encoding {encoding} reads {text!r}")
    return ": " + ", ".join(found.values()) if found else ", for example --encoding latin-1"


_OF_PAIRS = ("gb18030", "big5", "shift_jis", "euc_kr", "cp1252", "cp1251")
_ENCODINGS = ("shift_jis", "cp1252", "cp1250", "cp1251")
_HALF_WIDTH = re.compile("[\uff61-\uff9f]")  # accented letters decoded as shift_jis


def _find_missing_header(header: Sequence[str]) -> list[Sentence]:
    """Report a first line that looks like a row: numbers other than column indices as names."""
    numbers = [name for name in header if re.fullmatch(r"[-+]?\d*[.,]?\d+(e[-+]?\d+)?", name)]
    counts = [str(i) for i in range(len(header) + 1)]
    years = all(re.fullmatch(r"(19|20)\d\d", name) for name in numbers)
    if len(numbers) < 2 or set(numbers) <= set(counts) or years:
        return []
    return [sentence("notice_headless", cells=quote_names(numbers))]


def _scan(
    path: Path, text: TextLines, separator: str, *, keep: bool
) -> tuple[list[str], list[list[str]], list[int], list[tuple[int, int]]]:
    """Return header, rows (if kept), their line numbers, and rows of the wrong length."""
    reader = csv_rows(text, separator)
    rows: list[list[str]] = []
    lines: list[int] = []
    bad: list[tuple[int, int]] = []
    header: list[str] | None = None
    start = 1
    try:
        with allow_long_fields():
            for row in reader:
                start = reader.line_num + 1
                if not row:
                    continue
                if header is None:
                    header = row
                elif len(row) != len(header):
                    bad.append((reader.line_num, len(row)))
                else:
                    lines.append(reader.line_num)
                    if keep:
                        rows.append(row)
    except csv.Error as error:
        raise DataError(
            _describe_csv_error(path, error, start, reader.line_num, separator)
        ) from error
    return header or [], rows, lines, bad


def _describe_csv_error(
    path: Path, error: csv.Error, start: int, line: int, separator: str
) -> str:
    """Explain an error of the csv module."""
    if "unexpected end of data" in str(error):
        return f"{path} line {start}: a quote is opened and never closed, up to line {line}"
    if "expected after" in str(error):
        return (
            f"{path} line {line}: a quoted field goes on after its closing quote; double the "
            f"quotes inside it, or put {separator!r} after it"
        )
    if "field larger" in str(error):
        return (
            f"{path} line {start}: a field of more than {MAX_FIELD:,} characters; most likely a "
            "quote is opened there and never closed"
        )
    return f"{path} line {line}: {error}"


def _find_nameless(text: TextLines, separator: str, header: Sequence[str]) -> list[int]:
    """Return the columns without name or values, if there are several."""
    found = [i for i, name in enumerate(header) if not name.strip()]
    if len(found) < 2:
        return []
    with allow_long_fields():
        rows = iter([row for row in csv_rows(text, separator) if row])
    next(rows)
    return [] if any(row[i].strip() for row in rows for i in found if i < len(row)) else found


def _check_header(
    path: Path, header: list[str], separator: str, empty: Sequence[int] = ()
) -> list[str]:
    """Strip the names where they stay unique; name the `empty` columns by index.

    Raises `DataError` for a wrong separator or duplicate names.
    """
    header = [f"\0{i}" if i in empty else name for i, name in enumerate(header)]
    stripped = [name.strip() for name in header]
    header = stripped if len(set(stripped)) == len(set(header)) else header
    if len(header) == 1:
        for other in (c for c in SEPARATORS if c != separator and c in header[0]):
            shown = "'\\t'" if other == "\t" else f"'{other}'"
            raise DataError(
                f"{path}: one column found ({header[0][:60]!r}); the file looks like it is "
                f"separated by {shown}: use --sep {shown}"
            )
    first: dict[str, int] = {}
    for position, name in enumerate(header, start=1):
        if name in first and not name:
            raise DataError(
                f"{path}: columns {first[name]} and {position} of the header have no name; name "
                "them, or remove the lines above the header"
            )
        if name in first:
            raise DataError(
                f"{path}: column {name[:60]!r} appears twice, as column {first[name]} and column "
                f"{position}; rename one of them"
            )
        first[name] = position
    return header


def _more_rows(count: int) -> str:
    return f" (and {count} more such rows)" if count > 0 else ""


def quote_names(names: Sequence[str]) -> str:
    """Quote and shorten names for a message."""
    shown = ", ".join(
        repr(name if len(name) <= 60 else name[:57] + "...") for name in names[:_MAX_SHOWN]
    )
    return shown + (f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else "")
