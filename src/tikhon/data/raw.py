"""One column as it stands in its file, read in each way once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np

from tikhon.data import dates, numerals
from tikhon.data.cells import Cells, is_plain, iso_days, parsed, texts_of
from tikhon.data.reading import Source

if TYPE_CHECKING:
    import pandas as pd


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

    def plain_numbers(self, decimal: str) -> np.ndarray | None:
        """Its numbers if all texts are plain ones (`12`, `-0.5`, `1e-3`) and nothing about them
        is in doubt; None if they have to be read one by one.

        `decimal` is the mark that is known for it, "" for none.
        """
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
    def times(self) -> np.ndarray:
        """The time of day that each different text is, NaN for none."""
        found = (dates.clock_time(text) for text in self.cells.texts)
        return np.array([np.nan if value is None else value for value in found], float)
