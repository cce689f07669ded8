"""A table as it stands in its file: the format, the cells and where they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tikhon.data.text_cells import detect_decimal_mark, stripped_texts
from tikhon.errors import InputError
from tikhon.languages import Sentence

if TYPE_CHECKING:
    import pandas as pd

_MAX_SHOWN = 8  # names and lines shown in a message at most


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
    on_disk: bool = False  # the frame's columns are in mapped files

    def line(self, row: int) -> str:
        """Name the location of a row."""
        return f"line {self.lines[row]}" if len(self.lines) else f"row {row}"

    @cached_property
    def decimal(self) -> str:
        """Decimal mark of the file, given or proved by its numbers; "" if neither."""
        from pandas.api import types

        if self.format.decimal:
            return self.format.decimal
        columns: Iterator[Any] = map(self.frame.get, self.frame.columns)
        return detect_decimal_mark(
            stripped_texts(c) for c in columns if not types.is_numeric_dtype(c)
        )


def origin_of(path: Path, content: bytes | None = None) -> dict[str, object]:
    """Return name, size, time and SHA-256 of a file, for checks that it is the same again."""
    if content is None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        size = path.stat().st_size
    else:
        digest, size = hashlib.sha256(content), len(content)
    return {
        "source": str(path),
        "bytes": size,
        "modified": path.stat().st_mtime,
        "sha256": digest.hexdigest(),
    }


def quote_names(names: Sequence[str]) -> str:
    """Quote and shorten names for a message."""
    shown = ", ".join(
        repr(name if len(name) <= 60 else name[:57] + "...") for name in names[:_MAX_SHOWN]
    )
    return shown + (f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else "")
