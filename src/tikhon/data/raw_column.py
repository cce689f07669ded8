"""A column as stored in its file, with each interpretation computed once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np

from tikhon.data import dates, number_parsing
from tikhon.data.source import Source
from tikhon.data.text_cells import (
    TextCells,
    is_point_decimal,
    parse_iso_days,
    parse_plain_numbers,
    stripped_texts,
)

if TYPE_CHECKING:
    import pandas as pd


_FEW_CELLS = 2_000
_SIMPLE = re.compile(r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,18})?")
_PROOF = re.compile(r"-?(?:0\.[0-9]+|[0-9]+\.(?:[0-9]{1,2}|[0-9]{4,})|[0-9]{4,}\.[0-9]{3})")


@dataclass(frozen=True, eq=False)
class RawColumn:
    """A column of a source; kind inference and encoding share its cached interpretations."""

    source: Source
    name: str

    @property
    def foreign(self) -> str | None:
        """What the cells hold if they are not scalars, else None."""
        return self.source.foreign.get(self.name)

    @property
    def series(self) -> pd.Series:
        """The cells as stored in the frame."""
        return cast("pd.Series", self.source.frame[self.name])

    @cached_property
    def texts(self) -> pd.Series:
        """The cells as returned by `stripped_texts`."""
        return stripped_texts(self.series)

    @cached_property
    def cells(self) -> TextCells:
        """The distinct texts."""
        return TextCells.of(self.texts)

    @cached_property
    def _parsed(self) -> np.ndarray | None:
        return parse_plain_numbers(self.texts)

    @cached_property
    def short_numbers(self) -> np.ndarray | None:
        """The numbers of a short column, if all are plain and unambiguous, else None.

        Parsed without pandas, of which each call costs milliseconds whatever the length, which
        adds up over thousands of columns.
        """
        if self.source.format.decimal == ",":
            return None
        cells = self.series.to_numpy(object) if len(self.series) <= _FEW_CELLS else [None]
        texts = [cell for cell in cells if isinstance(cell, str)]
        if not texts or not all(map(_SIMPLE.fullmatch, texts)):
            return None
        if not all(isinstance(cell, str) or cell != cell for cell in cells):
            return None
        if any("." in text for text in texts) and not any(map(_PROOF.fullmatch, texts)):
            return None
        return np.array(cells, float)

    def plain_numbers(self, decimal: str) -> np.ndarray | None:
        """Return the numbers if all texts are plain (`12`, `-0.5`, `1e-3`) and unambiguous, else
        None.

        `decimal` is the known decimal mark, or "".
        """
        if decimal != "," and self.short_numbers is not None:
            return self.short_numbers
        if decimal == "," or self._parsed is None:
            return None
        return self._parsed if is_point_decimal(self.texts, decimal) else None

    @cached_property
    def iso_days(self) -> np.ndarray | None:
        """Days since 1970 if all texts are ISO 8601 dates."""
        return parse_iso_days(self.texts)

    @cached_property
    def parsed_numbers(self) -> list[number_parsing.ParsedNumber | None]:
        """The number parsed from each distinct text."""
        return [number_parsing.parse_number(text) for text in self.cells.texts]

    @cached_property
    def parsed_dates(self) -> list[dates.ParsedDate | None]:
        """The date parsed from each distinct text."""
        return [dates.parse_date(text) for text in self.cells.texts]

    @cached_property
    def dates_with_serials(self) -> list[dates.ParsedDate | None]:
        """`parsed_dates`, with spreadsheet day numbers parsed as dates."""
        return [
            one or dates.parse_serial_date(text)
            for one, text in zip(self.parsed_dates, self.cells.texts)
        ]

    @cached_property
    def has_serial_dates(self) -> bool:
        """Whether all cells are dates, some of them spreadsheet day numbers of similar range."""
        told = zip(self.parsed_dates, self.dates_with_serials, self.cells.is_missing)
        if any(one is None and not none for _, one, none in told):
            return False
        days = [day for one in self.parsed_dates if one is not None for day in one.days.values()]
        told = zip(self.parsed_dates, self.dates_with_serials)
        found = [one.days["ymd"] for known, one in told if known is None and one is not None]
        if not days or not found:
            return False
        reach = max(max(days) - min(days), 366.0)
        return min(days) - reach <= min(found) and max(found) <= max(days) + reach

    @cached_property
    def times(self) -> np.ndarray:
        """The time of day parsed from each distinct text, NaN for none."""
        return self.parse_times()

    def parse_times(self, *, minutes: bool = False) -> np.ndarray:
        """Return `times`; with `minutes`, `12:30` is minutes and seconds."""
        found = (dates.parse_time(text, minutes=minutes) for text in self.cells.texts)
        return np.array([np.nan if value is None else value for value in found], float)
