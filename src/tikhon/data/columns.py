"""What the columns of a table are, and their cells as numbers."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from tikhon.data.reading import Source, listed
from tikhon.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["number", "boolean", "category", "date", "dropped"]

_TRUTH = ({"true", "false"}, {"yes", "no"}, {"t", "f"}, {"y", "n"})
_TRUE = {"true", "yes", "t", "y"}
_DATES = ("ISO8601", "%Y/%m/%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y")
_MISSPELT = 0.05  # a text column with fewer other cells than this was meant to be numeric
_UNREADABLE = {"na", "n/a", "nan", "null", "none", "?", "-", "."}
_ID_NAME = re.compile(r"(^|[_\s.-])(id|uuid|guid|key|index|rownames?)$|^unnamed|^$", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """One column: its kind, the texts behind its codes, how its dates are written."""

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()
    format: str = ""
    clock: bool = False  # its dates have a time of day
    reason: str = ""  # why it is dropped

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the inverse of `Column(**values)` up to lists."""
        return {key: value for key, value in asdict(self).items() if value not in ("", (), False)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Column:
        """The inverse of `to_dict`."""
        return cls(**{**plain, "categories": tuple(plain.get("categories", ()))})


def infer(source: Source, name: str, *, decimal: str = ".", forced: str | None = None) -> Column:
    """What the column is: constants and identifiers are dropped, with the reason.

    `forced` is "number" or "category" where the user decides. Raises `DataError` for numbers with
    a few texts among them, thousands separators and infinities.
    """
    from pandas.api import types

    series = cast("pd.Series", source.frame[name])
    present = series.dropna()
    if not len(present):
        return Column(name, "dropped", reason="no value in any row")
    if present.nunique() == 1:
        return Column(
            name, "dropped", reason=f"the same value {str(present.iloc[0])[:40]!r} in all rows"
        )
    if forced == "category":
        return _category(source, name, forced=True)
    if types.is_bool_dtype(present):
        return Column(name, "boolean", categories=("False", "True"))
    if types.is_datetime64_any_dtype(present):
        clock = bool((present.dt.normalize() != present).any())
        return Column(name, "date", format="datetime", clock=clock)
    if types.is_numeric_dtype(present):
        _finite(source, name, series.to_numpy(float))
        return _number(source, name)
    if isinstance(present.iloc[0], bool) and present.map(lambda v: isinstance(v, bool)).all():
        return Column(name, "boolean", categories=("False", "True"))
    return _text(source, name, decimal, forced)


def _text(source: Source, name: str, decimal: str, forced: str | None) -> Column:
    series = source.frame[name].astype("string").str.strip()
    present = series.dropna()
    words = set(present.str.lower().unique()) if present.nunique() <= 6 else set()
    if any(words == pair for pair in _TRUTH):
        false, true = sorted(words, key=lambda w: w in _TRUE)
        return Column(name, "boolean", categories=(false, true))
    numbers = _numbers(series, decimal)
    other = series.notna() & np.isnan(numbers)
    if not other.any():
        if forced is None and bool(present.str.match(r"^0\d").any()):
            return _category(source, name, leading_zeros=True)
        _finite(source, name, numbers)
        return _number(source, name, numbers)
    if bool(present.str.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?").any()):
        row = int(np.argmax(present.str.contains(",")))
        raise DataError(
            f"column {name!r}: {present.iloc[row]!r} ({source.line(int(present.index[row]))}) "
            "has a thousands separator; write numbers without one"
        )
    if forced == "number" or other.sum() <= _MISSPELT * len(present):
        raise DataError(_misspelt(source, name, series, other))
    if format := _date_format(present):
        return Column(name, "date", format=format, clock=bool(present.str.contains(":").any()))
    return _category(source, name)


def _misspelt(source: Source, name: str, series: pd.Series, other: pd.Series) -> str:
    row = int(np.argmax(other.to_numpy()))
    value = str(series.iloc[row])
    remedy = (
        f"if it means no value, use --na-values {value}" if value.lower() in _UNREADABLE else ""
    )
    return (
        f"column {name!r} holds numbers, but {int(other.sum())} cell(s) are text, first "
        f"{value[:40]!r} in {source.line(row)}; {remedy}"
    )


def _number(source: Source, name: str, numbers: np.ndarray | None = None) -> Column:
    values = source.frame[name].to_numpy(float) if numbers is None else numbers
    present = values[~np.isnan(values)]
    whole = bool(np.all(present == np.floor(present)))
    if whole and len(np.unique(present)) == len(values) and _ID_NAME.search(name):
        return Column(name, "dropped", reason="an identifier: another whole number in every row")
    return Column(name, "number")


def _category(
    source: Source, name: str, *, forced: bool = False, leading_zeros: bool = False
) -> Column:
    series = source.frame[name].astype("string").str.strip().dropna()
    levels = sorted(series.unique())
    distinct = len(levels) / len(series)
    if not forced and len(levels) > 20 and distinct > 0.95:
        what = "codes with leading zeros" if leading_zeros else "texts"
        return Column(name, "dropped", reason=f"an identifier: {len(levels)} different {what}")
    return Column(name, "category", categories=tuple(levels))


def _date_format(present: pd.Series) -> str:
    """The one format in which all cells are dates; "" for none, or for two that disagree."""
    import pandas as pd

    if not present.str.contains(r"\d", regex=True).all():
        return ""
    fitting = []
    for format in _DATES:
        parsed = pd.to_datetime(present, format=format, errors="coerce", utc=True)
        if parsed.notna().all():
            fitting.append((format, parsed))
    if len(fitting) > 1 and not all((p == fitting[0][1]).all() for _, p in fitting):
        return ""
    return fitting[0][0] if fitting else ""


def encode(source: Source, columns: tuple[Column, ...], *, decimal: str = ".") -> np.ndarray:
    """The cells as float64 (rows, columns): missing is NaN, a category is its code, -1 is unseen.

    Columns are found by name, in any order. Raises `DataError` that lists the missing ones, and
    for cells that are not of their column's kind.
    """
    there = set(map(str, source.frame.columns))
    if missing := [c.name for c in columns if c.name not in there]:
        extra = sorted(there - {c.name for c in columns})
        raise DataError(
            f"{source.name} lacks {len(missing)} column(s) that the model was trained on: "
            f"{listed(missing)}" + (f"; it has besides: {listed(extra)}" if extra else "")
        )
    if not columns:
        return np.zeros((len(source.frame), 0))
    return np.stack([_encode(source, column, decimal) for column in columns], axis=1)


def _encode(source: Source, column: Column, decimal: str) -> np.ndarray:
    import pandas as pd

    series = source.frame[column.name]
    if column.kind == "date":
        return _days(source, column)
    if column.kind == "number":
        if pd.api.types.is_numeric_dtype(series):
            numbers = series.to_numpy(float, na_value=np.nan)
        else:
            text = series.astype("string").str.strip()
            numbers = _numbers(text, decimal)
            if (other := text.notna() & np.isnan(numbers)).any():
                raise DataError(_misspelt(source, column.name, text, other))
        _finite(source, column.name, numbers)
        return numbers
    text = series.astype("string").str.strip()
    if column.kind == "boolean":
        text = text.str.lower()
    codes = {level.lower() if column.kind == "boolean" else level: code
             for code, level in enumerate(column.categories)}  # fmt: skip
    encoded = text.map(codes).to_numpy(float, na_value=np.nan)
    encoded[np.isnan(encoded) & series.notna().to_numpy()] = -1
    if column.kind == "boolean":
        encoded[encoded < 0] = np.nan
    return encoded


def _days(source: Source, column: Column) -> np.ndarray:
    """Days since 1970, with fractions."""
    import pandas as pd

    series = source.frame[column.name]
    if column.format == "datetime":
        parsed = pd.to_datetime(series, utc=True, errors="coerce")
    else:
        text = series.astype("string").str.strip()
        parsed = pd.to_datetime(text, format=column.format, errors="coerce", utc=True)
    if (bad := parsed.isna() & series.notna()).any():
        row = int(np.argmax(bad.to_numpy()))
        raise DataError(
            f"column {column.name!r} holds dates, but {str(series.iloc[row])[:40]!r} in "
            f"{source.line(row)} is not one ({column.format})"
        )
    return ((parsed - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)).to_numpy(float)


def _numbers(text: pd.Series, decimal: str) -> np.ndarray:
    """The texts as numbers; NaN where there is none or another text (also the word "nan")."""
    import pandas as pd

    if decimal != ".":
        text = text.str.replace(".", "\0", regex=False).str.replace(decimal, ".", regex=False)
    numbers = cast("pd.Series", pd.to_numeric(text, errors="coerce"))
    return np.array(numbers.to_numpy(float, na_value=np.nan))


def _finite(source: Source, name: str, values: np.ndarray) -> None:
    bad = np.isinf(values)
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(
            f"column {name!r} has {int(bad.sum())} infinite value(s), first in "
            f"{source.line(row)}; correct them or leave the cells empty"
        )
