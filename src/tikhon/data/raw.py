"""One column as it stands in its file, read in each way once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np

from tikhon.data import dates, numerals
from tikhon.data.cells import Cells, is_plain, iso_days, parsed, texts_of
from tikhon.data.reading import Source

if TYPE_CHECKING:
    import pandas as pd


_FEW_CELLS = 2_000
_SIMPLE = re.compile(r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,18})?")
_PROOF = re.compile(r"-?(?:0\.[0-9]+|[0-9]+\.(?:[0-9]{1,2}|[0-9]{4,})|[0-9]{4,}\.[0-9]{3})")


@dataclass(frozen=True, eq=False)
class RawColumn:
    """One column of a source; inferring its kind and encoding its cells share each reading."""

    source: Source
    name: str

    @property
    def foreign(self) -> str | None:
        """What its cells hold, where that is not one value a cell."""
        return self.source.foreign.get(self.name)

    @property
    def series(self) -> pd.Series:
        """Its cells as the frame has them."""
        return cast("pd.Series", self.source.frame[self.name])

    @cached_property
    def texts(self) -> pd.Series:
        """Its cells as `texts_of` writes them."""
        return texts_of(self.series)

    @cached_property
    def cells(self) -> Cells:
        """Its different texts."""
        return Cells.of(self.texts)

    @cached_property
    def _parsed(self) -> np.ndarray | None:
        return parsed(self.texts)

    @cached_property
    def _short(self) -> np.ndarray | None:
        """Its numbers, where few cells hold nothing else and all are as plain as can be.

        What pandas does for a column costs milliseconds, whatever its length: tables of thousands
        of columns are read by this.
        """
        cells = self.series.to_numpy(object) if len(self.series) <= _FEW_CELLS else [None]
        texts = [cell for cell in cells if isinstance(cell, str)]
        if not texts or not all(map(_SIMPLE.fullmatch, texts)):
            return None
        if not all(isinstance(cell, str) or cell != cell for cell in cells):
            return None
        if any("." in text for text in texts) and not any(map(_PROOF.fullmatch, texts)):
            return None
        return np.array(cells, float)

    @property
    def is_simple(self) -> bool:
        """Whether it is a short column of numbers that can be read in one way alone."""
        return self.source.format.decimal != "," and self._short is not None

    def plain_numbers(self, decimal: str) -> np.ndarray | None:
        """Its numbers if all texts are plain ones (`12`, `-0.5`, `1e-3`) and nothing about them
        is in doubt; None if they have to be read one by one.

        `decimal` is the mark that is known for it, "" for none.
        """
        if decimal != "," and self._short is not None:
            return self._short
        if decimal == "," or self._parsed is None:
            return None
        return self._parsed if is_plain(self.texts, decimal) else None

    @cached_property
    def iso_days(self) -> np.ndarray | None:
        """Days since 1970 if all texts are dates as ISO 8601 writes them."""
        return iso_days(self.texts)

    @cached_property
    def numerals(self) -> list[numerals.Numeral | None]:
        """The number that each different text is."""
        return [numerals.numeral(text) for text in self.cells.texts]

    @cached_property
    def moments(self) -> list[dates.Moment | None]:
        """The date that each different text is."""
        return [dates.moment(text) for text in self.cells.texts]

    @cached_property
    def with_serials(self) -> list[dates.Moment | None]:
        """`moments`, and the numbers of days of a spreadsheet as the dates that they are."""
        return [one or dates.serial(text) for one, text in zip(self.moments, self.cells.texts)]

    @cached_property
    def has_serials(self) -> bool:
        """Whether all cells are dates but some that are days of a spreadsheet about as late."""
        told = zip(self.moments, self.with_serials, self.cells.is_missing)
        if any(one is None and not none for _, one, none in told):
            return False
        days = [day for one in self.moments if one is not None for day in one.days.values()]
        told = zip(self.moments, self.with_serials)
        found = [one.days["ymd"] for known, one in told if known is None and one is not None]
        if not days or not found:
            return False
        reach = max(max(days) - min(days), 366.0)
        return min(days) - reach <= min(found) and max(found) <= max(days) + reach

    @cached_property
    def times(self) -> np.ndarray:
        """The time of day that each different text is, NaN for none."""
        found = (dates.clock_time(text) for text in self.cells.texts)
        return np.array([np.nan if value is None else value for value in found], float)
