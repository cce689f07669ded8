"""Read files as data frames, with checks that pandas omits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tikhon.data import typed_files
from tikhon.data.csv_files import (
    MAX_UNPACKED,
    decode,
    open_gzip,
    read_csv,
    refuse_unpacked,
    split_preamble,
)
from tikhon.data.source import Format, Source, origin_of, quote_names
from tikhon.errors import DataError
from tikhon.languages import sentence

if TYPE_CHECKING:
    pass

_NAMED = {
    **dict.fromkeys((".csv", ".tsv", ".txt", ".data", ".dat"), "csv"),
    **dict.fromkeys((".parquet", ".pq"), "Parquet"),
    **dict.fromkeys((".feather", ".arrow"), "Feather"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    ".xlsx": "xlsx",
}  # file type by name
SUFFIXES = tuple(_NAMED)
_HEAD_SIZE = 1 << 20  # bytes searched for the end of a first line with a JSON object


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
        origin = origin_of(path, content)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    name = path.name.lower()
    if content.startswith(b"\x1f\x8b"):  # a server may have unpacked a .gz file
        with open_gzip(path, content) as stream:
            content = stream.read(MAX_UNPACKED + 1)
        if len(content) > MAX_UNPACKED:
            refuse_unpacked(path)
    name = name.removesuffix(".gz")
    kind = _detect_type(path, name, content)
    if kind == "csv":
        if not content or content.isspace():
            raise DataError(f"{path} is empty: a header and rows are needed")
        text = decode(path, content, format)
        del content  # frees memory: a large table is held as bytes, text and cells in turn
        return read_csv(path, *split_preamble(path, text, format.separator), format, origin)
    if kind == "json":
        frame, foreign = typed_files.read_json(path, decode(path, content, format))
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
