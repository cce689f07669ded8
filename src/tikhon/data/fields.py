"""Split a text file into fields and rows."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tikhon.errors import DataError

SEPARATORS = (",", ";", "\t", "|")
BLANKS = " "  # runs of blanks, if nothing else separates
MAX_FIELD = 1 << 24  # characters in a field; the csv module defaults to 131,072
_SAMPLE = 100  # rows used to detect the separator
_TABULAR = 0.6  # least share of the first rows with as many fields as the table
_FIRST = 1 << 20  # characters searched for a blank before quotes


class TextLines:
    """A file-like view of a text, read from its start without copying it.

    A StringIO would take four bytes per character.
    """

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def __iter__(self) -> Iterator[str]:
        """Iterate over the lines from the start."""
        start = 0
        while start < len(self._text):
            end = self._text.find("\n", start) + 1 or len(self._text)
            yield self._text[start:end]
            start = end

    def head(self, count: int) -> str:
        """Return the first `count` characters."""
        return self._text[:count]

    def read(self, count: int = -1) -> str:
        """Return the next `count` characters, or all that remain."""
        start = self._at
        self._at = len(self._text) if count < 0 else min(start + count, len(self._text))
        return self._text[start : self._at]


class FileLines(TextLines):
    """The same view of a file: its first lines are given, the others are read when needed."""

    def __init__(self, head: str, open_rest: Callable[[], TextIO]) -> None:
        super().__init__(head)
        self._open_rest = open_rest
        self._rest: TextIO | None = None

    def __iter__(self) -> Iterator[str]:
        """Iterate over the lines from the start."""
        yield from super().__iter__()
        with self._open_rest() as rest:
            yield from filter(None, (line.removesuffix("\x1a") for line in rest))  # end in DOS

    def read(self, count: int = -1) -> str:
        """Return the next `count` characters; fewer only at the end."""
        found = super().read(count)
        if self._rest is None:
            self._rest = self._open_rest()
        more = self._rest.read(count - len(found) if count >= 0 else -1)
        return found + more.removesuffix("\x1a")

    def close(self) -> None:
        """Close the file."""
        if self._rest is not None:
            self._rest.close()


def default_separator(path: Path) -> str:
    """Return the separator implied by the file name."""
    return "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","


def detect_separator(path: Path, text: TextLines) -> str:
    """Return the separator for which all first rows have as many fields as the header."""
    usual = default_separator(path)
    widths = {}
    for separator in (usual, *(s for s in SEPARATORS if s != usual)):
        first, *rest = count_fields(text, skip_blanks(text, separator))
        one_more = {first + 1} if first > 1 else set[int]()  # row names, as written by R
        alike = len(set(rest)) < 2 and set(rest) <= {first} | one_more
        widths[separator] = first if alike else 0
    if widths[usual] > 1:
        return usual
    fitting = [separator for separator, width in widths.items() if width > 1]
    if not fitting and all(count_fields(text, separator)[0] <= 1 for separator in widths):
        found = set(count_fields(text, BLANKS))
        return BLANKS if len(found) == 1 and found != {1} else usual
    if len(fitting) > 1:
        shown = " or ".join(f"--sep {separator!r}" for separator in fitting)
        raise DataError(f"{path}: the fields fit more than one separator; say {shown}")
    return fitting[0] if fitting else usual


REPAIRS = ("notice_backslashes", "notice_quoted_rows")


def repair_quotes(text: str, told: str | None, usual: str) -> tuple[str, str]:
    """Return a text with quotes as in CSV, and the key of a notice ("" if nothing was done).

    Repaired are quotes inside cells written `\\"`, and rows quoted as a whole (`"1,a"`).
    """
    mark = told or usual
    widths = set(count_fields(TextLines(text), mark))
    if widths == {0} and '\\"' in text:
        doubled = re.sub(r'(?<!\\)((?:\\\\)*)\\"', r'\1""', text)
        if count_fields(TextLines(doubled), mark) != [0]:
            return doubled, "notice_backslashes"
    if widths == {1} and text.startswith('"') and mark in text.partition("\n")[0]:
        with allow_long_fields(), suppress(csv.Error):
            rows = list(csv_rows(TextLines(text), mark))
            return "\n".join("".join(row) for row in rows) + "\n", "notice_quoted_rows"
    return text, ""


def blank_titles(text: str, told: str | None, usual: str) -> tuple[str, int]:
    """Replace title lines above the header by blank ones; return the text and their number."""
    head = TextLines(TextLines(text).head(_FIRST))
    for separator in [told] if told else [usual, *(s for s in SEPARATORS if s != usual)]:
        lines, rows = _rows_by_line(head, separator)
        if (above := count_titles(rows)) is None:
            continue
        others = set(SEPARATORS) - {separator, told}
        whole = ["".join(row) for row in rows[: above + 1]]
        if any(row.count(mark) >= len(rows[above]) - 1 for row in whole for mark in others):
            continue  # decimal commas under another separator
        start, last = 0, lines[above - 1] if above else 0
        for _ in range(last):
            start = text.find("\n", start) + 1
        return "\n" * last + text[start:], above
    return text, 0


def count_titles(rows: Sequence[Sequence[str]]) -> int | None:
    """Count the title rows above the header; None if the rows do not form a table.

    A title fills one cell or at most half of the columns; the header has a unique name for every
    column. In doubt, nothing is a title.
    """
    widths = [len(row) for row in rows]
    width = max(set(widths), key=widths.count, default=0)
    if width < 3 or widths.count(width) < _TABULAR * len(widths):
        return None
    first = next((i for i, row in enumerate(rows) if _is_header(row, width)), 0)
    return first if all(sum(map(bool, row)) <= width // 2 for row in rows[:first]) else 0


def _rows_by_line(text: TextLines, separator: str) -> tuple[list[int], list[list[str]]]:
    """Return the first rows with stripped cells, and the line number at which each ends."""
    lines: list[int] = []
    rows: list[list[str]] = []
    reader = csv_rows(text, separator)
    with allow_long_fields(), suppress(csv.Error):
        for row in islice(reader, _SAMPLE):
            if row:
                lines.append(reader.line_num)
                rows.append([cell.strip() for cell in row])
    return lines, rows


def _is_header(row: Sequence[str], width: int) -> bool:
    named = len(row) == width and all(row) and len(set(row)) == width
    return named and not any(re.fullmatch(r"[-+]?\d*[.,]?\d+(e[-+]?\d+)?", name) for name in row)


def skip_blanks(text: TextLines, separator: str) -> str:
    """Append a blank to the separator if blanks precede quotes (`1, "a, b"`) and are not cells."""
    if not re.search(rf'{re.escape(separator)} +"', text.head(_FIRST)):
        return separator
    return separator + " " if len(set(count_fields(text, separator + " "))) == 1 else separator


def count_fields(text: TextLines, separator: str) -> list[int]:
    """Count the fields of the first rows; [0] if quotes are broken."""
    widths: list[int] = []
    with allow_long_fields():
        try:
            for row in csv_rows(text, separator):
                if row:
                    widths.append(len(row))
                if len(widths) > _SAMPLE:
                    break
        except csv.Error:
            return [0]
    return widths or [0]


def csv_rows(text: TextLines, separator: str) -> Any:
    """Return a csv reader; runs of blanks count as one separator."""
    lines = (re.sub(r"[ \t]+", " ", line.strip(" \t\n")) for line in text)
    source = lines if separator == BLANKS else text
    blank_after = len(separator) > 1
    return csv.reader(source, delimiter=separator[0], skipinitialspace=blank_after, strict=True)


@contextmanager
def allow_long_fields() -> Iterator[None]:
    """Raise the field size limit of the csv module for free text."""
    before = csv.field_size_limit(MAX_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
