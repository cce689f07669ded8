"""The texts of one column, each different one read once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from tikhon.data import numerals

if TYPE_CHECKING:
    import pandas as pd

_SAMPLE = 1_000  # different texts that are looked at before all are
TRUE = frozenset({"true", "yes", "t", "y", "on", "1"})
FALSE = frozenset({"false", "no", "f", "n", "off", "0"})
_AMBIGUOUS = r"[-+]?[1-9]\d{0,2}\.\d{3}"
# a spreadsheet's ways to say that a cell is text: ="5.29", '5.29; and numbers in quotes
_WRAPPED = re.compile(r"^(?:=\"(.*)\"|'([-+]?[\d.,]*\d)'?|\"([-+]?[\d.,]*\d)\")$", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Cells:
    """The different texts of a column and where they are; code -1 is an empty cell."""

    codes: np.ndarray  # (rows,)
    texts: list[str]
    counts: np.ndarray  # (texts,)
    is_missing: np.ndarray  # (texts,) the ones that say "no value" among numbers

    @classmethod
    def of(cls, texts: pd.Series) -> Cells:
        """The cells of a column of `texts_of`."""
        import pandas as pd

        codes, levels = pd.factorize(texts.to_numpy(object))
        found = [str(level) for level in levels]
        counts = np.bincount(codes[codes >= 0], minlength=len(found))
        none = [text.lower() in numerals.MISSING or _no_date(text) for text in found]
        return cls(codes, found, counts, np.array(none, bool))

    @property
    def missing(self) -> tuple[str, ...]:
        """The texts that say "no value"."""
        return tuple(sorted(text for text, none in zip(self.texts, self.is_missing) if none))

    def share(self, which: np.ndarray) -> float:
        """Which share of the cells with a value these texts are."""
        total = self.counts[~self.is_missing].sum()
        return float(self.counts[which & ~self.is_missing].sum() / total) if total else 0.0

    def spread(self, values: np.ndarray) -> np.ndarray:
        """A number for each text as a number for each row, NaN for an empty cell."""
        return np.append(np.asarray(values, float), np.nan)[self.codes]

    def first(self, which: Sequence[bool] | np.ndarray) -> int:
        """The first row that holds one of these texts."""
        return int(np.argmax(np.append(np.asarray(which, bool), False)[self.codes]))


def level_of(text: str) -> str:
    """What makes two texts one level: inner blanks, and capitals in words of two letters or more.

    >>> [level_of(text) for text in ("Basic", "BASIC", "a", "A")]
    ['basic', 'basic', 'a', 'A']
    """
    spaced = " ".join(numerals.tidy(text).split())
    return spaced.lower() if len(spaced) > 1 else spaced


def truths(texts: Sequence[str]) -> bool:
    """Whether texts are truth values: both of them, in words or in letters."""
    lower = {text.lower() for text in texts}
    both = bool(lower & TRUE) and bool(lower & FALSE)
    return both and lower <= TRUE | FALSE and lower != {"0", "1"}


def _no_date(text: str) -> bool:
    """0000-00-00 and its like."""
    return len(text) >= 8 and not text.strip("0-/.: ")


def texts_of(series: pd.Series) -> pd.Series:
    """The cells as texts without outer blanks and what a spreadsheet wraps around a text.

    Blank ones are missing, whole floats lose ".0".
    """
    from pandas.api import types

    if types.is_float_dtype(series.dtype):
        present = series.dropna()
        if len(present) and bool(
            (present == np.floor(present)).all() & np.isfinite(present).all()
        ):
            series = series.map(lambda value: f"{value:.0f}", na_action="ignore")
    texts = series.astype("string").str.strip()
    if bool(texts.str.startswith(("'", '"', "=")).any()):
        texts = texts.str.replace(_WRAPPED, lambda found: found[found.lastindex or 0], regex=True)
    blank = (texts == "").fillna(False).to_numpy(bool)
    return cast("pd.Series", texts.mask(blank) if blank.any() else texts)


def parsed(texts: pd.Series) -> np.ndarray | None:
    """The column as numbers with "." as their decimal mark; None if one text is no plain one."""
    import pandas as pd

    try:
        found = cast("pd.Series", pd.to_numeric(texts, errors="coerce"))
    except (OverflowError, ValueError):
        return None
    values = np.array(found.to_numpy(float, na_value=np.nan))
    return None if np.isnan(values).any(where=texts.notna().to_numpy()) else values


def is_plain(texts: pd.Series, decimal: str) -> bool:
    """Whether "." is the decimal mark of numbers: known, proved by one of them, or not needed."""
    if decimal == "." or _proves_the_point(texts.head(_SAMPLE)) or _proves_the_point(texts):
        return True
    return not bool(texts.str.contains(".", regex=False).any())


def _proves_the_point(texts: pd.Series) -> bool:
    """Whether some number can only have "." as its decimal mark: `0.5`, not `1.036`."""
    pointed = cast(
        "pd.Series", texts[texts.str.contains(".", regex=False).fillna(False).to_numpy(bool)]
    )
    return not bool(pointed.str.fullmatch(_AMBIGUOUS).all())


def iso_days(texts: pd.Series) -> np.ndarray | None:
    """Days since 1970 if all texts are dates as ISO 8601 writes them; None if one is not."""
    import pandas as pd

    present = texts.notna().to_numpy(bool)
    if not bool(texts.head(_SAMPLE).dropna().str.match(r"\d{4}-\d\d").all()):
        return None
    parsed = pd.to_datetime(texts, format="ISO8601", errors="coerce", utc=True)
    days = days_of(cast("pd.Series", parsed))
    return None if np.isnan(days[present]).any() else days


def days_of(series: pd.Series) -> np.ndarray:
    """Days since 1970 of datetimes of any unit, NaN for none."""
    if getattr(series.dtype, "tz", None) is not None:
        series = series.dt.tz_convert("UTC").dt.tz_localize(None)
    moments = series.to_numpy("datetime64[us]")
    return np.where(np.isnat(moments), np.nan, moments.astype(np.int64) / 86_400e6)


def decimal_of(columns: Sequence[pd.Series]) -> str:
    """The decimal mark that the numbers of a file prove: "." or ",", "" for none or both."""
    found: set[str] = set()
    for texts in columns:
        different = texts.dropna().unique()[:_SAMPLE]
        numbers = [one for text in different if (one := numerals.numeral(str(text))) is not None]
        if len(numbers) > len(different) / 2:
            found |= numerals.votes(numbers) - {"?"}
    return next(iter(found)) if len(found) == 1 else ""
