"""The texts of one column, with each distinct text parsed once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from tikhon.data import number_parsing

if TYPE_CHECKING:
    import pandas as pd

_SAMPLE = 1_000  # distinct texts checked before all of them are
TRUE = frozenset({"true", "yes", "t", "y", "on", "1"})
FALSE = frozenset({"false", "no", "f", "n", "off", "0"})
_AMBIGUOUS = r"[-+]?[1-9]\d{0,2}\.\d{3}"
# text wrapped by a spreadsheet: ="5.29", '5.29, and numbers in quotes
_WRAPPED = re.compile(r"^(?:=\"(.*)\"|'([-+]?[\d.,]*\d)'?|\"([-+]?[\d.,]*\d)\")$", re.DOTALL)


@dataclass(frozen=True, eq=False)
class TextCells:
    """The distinct texts of a column and their positions; code -1 is an empty cell."""

    codes: np.ndarray  # (rows,)
    texts: list[str]
    counts: np.ndarray  # (texts,)
    is_missing: np.ndarray  # (texts,) True for those meaning "no value" in a numeric column

    @classmethod
    def of(cls, texts: pd.Series) -> TextCells:
        """Build from the texts of a column, as `stripped_texts` returns them."""
        import pandas as pd

        codes, levels = pd.factorize(texts.to_numpy(object))
        found = [str(level) for level in levels]
        counts = np.bincount(codes[codes >= 0], minlength=len(found))
        none = [
            text.lower() in number_parsing.MISSING
            or (len(text) >= 8 and not text.strip("0-/.: "))  # 0000-00-00
            for text in found
        ]
        return cls(codes, found, counts, np.array(none, bool))

    @property
    def missing(self) -> tuple[str, ...]:
        """The texts that mean "no value"."""
        return tuple(sorted(text for text, none in zip(self.texts, self.is_missing) if none))

    def share(self, which: np.ndarray) -> float:
        """Return the share of non-missing cells that hold the selected texts."""
        total = self.counts[~self.is_missing].sum()
        return float(self.counts[which & ~self.is_missing].sum() / total) if total else 0.0

    def expand_to_rows(self, values: np.ndarray) -> np.ndarray:
        """Expand one number for each text to one for each row, NaN for empty cells."""
        return np.append(np.asarray(values, float), np.nan)[self.codes]

    def first(self, which: Sequence[bool] | np.ndarray) -> int:
        """Return the first row that holds one of the selected texts."""
        return int(np.argmax(np.append(np.asarray(which, bool), False)[self.codes]))


def normalize_label(text: str) -> str:
    """Return the key under which spellings are one level: case (beyond one letter) and inner
    blanks are ignored.

    >>> [normalize_label(text) for text in ("Basic", "BASIC", "a", "A")]
    ['basic', 'basic', 'a', 'A']
    """
    spaced = " ".join(number_parsing.normalize_text(text).split())
    return spaced.lower() if len(spaced) > 1 else spaced


def are_truth_values(texts: Sequence[str]) -> bool:
    """Return whether the texts are truth values, with both true and false present."""
    lower = {text.lower() for text in texts}
    both = bool(lower & TRUE) and bool(lower & FALSE)
    return both and lower <= TRUE | FALSE and lower != {"0", "1"}


def stripped_texts(series: pd.Series) -> pd.Series:
    """Return the cells as stripped texts, without quotes added by a spreadsheet.

    Blank cells become missing; whole floats lose ".0".
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


def parse_plain_numbers(texts: pd.Series) -> np.ndarray | None:
    """Parse the column with "." as decimal mark; None if any text is not a plain number."""
    import pandas as pd

    try:
        found = cast("pd.Series", pd.to_numeric(texts, errors="coerce"))
    except (OverflowError, ValueError):
        return None
    values = np.array(found.to_numpy(float, na_value=np.nan))
    return None if np.isnan(values).any(where=texts.notna().to_numpy()) else values


def is_point_decimal(texts: pd.Series, decimal: str) -> bool:
    """Return whether "." is the decimal mark: given, proved by one number, or irrelevant."""
    if decimal == "." or _proves_point(texts.head(_SAMPLE)) or _proves_point(texts):
        return True
    return not bool(texts.str.contains(".", regex=False).any())


def _proves_point(texts: pd.Series) -> bool:
    """Return whether any number admits only "." as decimal mark: `0.5`, not `1.036`."""
    pointed = cast(
        "pd.Series", texts[texts.str.contains(".", regex=False).fillna(False).to_numpy(bool)]
    )
    return not bool(pointed.str.fullmatch(_AMBIGUOUS).all())


def parse_iso_days(texts: pd.Series) -> np.ndarray | None:
    """Return days since 1970 if all texts are ISO 8601 dates, else None."""
    import pandas as pd

    present = texts.notna().to_numpy(bool)
    if not bool(texts.head(_SAMPLE).dropna().str.match(r"\d{4}-\d\d").all()):
        return None
    parsed = pd.to_datetime(texts, format="ISO8601", errors="coerce", utc=True)
    days = days_since_1970(cast("pd.Series", parsed))
    return None if np.isnan(days[present]).any() else days


def days_since_1970(series: pd.Series) -> np.ndarray:
    """Convert datetimes of any unit to days since 1970, NaN for missing."""
    if getattr(series.dtype, "tz", None) is not None:
        series = series.dt.tz_convert("UTC").dt.tz_localize(None)
    parsed_dates = series.to_numpy("datetime64[us]")
    return np.where(np.isnat(parsed_dates), np.nan, parsed_dates.astype(np.int64) / 86_400e6)


def detect_decimal_mark(columns: Iterable[pd.Series]) -> str:
    """Return the decimal mark proved by a file's numbers, "." or ","; "" for none or both."""
    found: set[str] = set()
    for texts in columns:
        different = texts.dropna().unique()[:_SAMPLE]
        numbers = [
            one
            for text in different
            if (one := number_parsing.parse_number(str(text))) is not None
        ]
        if len(numbers) > len(different) / 2:
            found |= number_parsing.proved_marks(numbers) - {"?"}
    return next(iter(found)) if len(found) == 1 else ""
