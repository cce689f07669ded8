"""Preprocess encoded cells to inputs, with statistics fitted on the training rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, cast

import numpy as np

from tikhon.data import memory
from tikhon.data.column import Column
from tikhon.data.dataset import Table
from tikhon.data.encoding import encode_columns, iterate_columns, matching_column
from tikhon.data.number_parsing import is_currency, parse_number
from tikhon.data.source import Source, quote_names
from tikhon.data.text_cells import FALSE, TRUE
from tikhon.errors import DataError
from tikhon.languages import sentence

_LEVELS = 50  # most columns for one category
_MANY = 20  # categories with more levels, some rare, also get target means
_CLASSES = 10  # most classes with target means: more would add too many columns
_FOLDS = 5
_OUTSIDE = 1e3  # standard deviations beyond which a new number is reported as an outlier
_CLIP = 1e6  # and at which it is clipped, so that inputs stay finite
_BLOCK = 4  # columns processed at a time, to limit copies of the table
_CELLS = 100_000  # or as many as have this many cells
_ALL = slice(None)
_NO_CODE = -2  # code of a missing category, and of a number without flag

Rows = np.ndarray | slice


@dataclass(frozen=True)
class NumberStatistics:
    """Statistics of one number: imputed value, scaling, and whether missingness is a feature.

    A scale of 0 marks a number that is constant in training; it is dropped.
    """

    fill: float
    mean: float
    scale: float
    indicator: bool


@dataclass(frozen=True)
class LevelEncoding:
    """Codes of one category with a column each; -2 stands for "missing".

    `means` are target means by code (-1 for unseen ones), in standard deviations from the overall
    mean: one for each class, or a single one.
    """

    codes: tuple[int, ...]
    rare: bool  # rare and unseen codes share a column
    means: tuple[tuple[int, tuple[float, ...]], ...] = ()

    def mean_of(self, codes: np.ndarray) -> np.ndarray:
        """Return the target means of codes (rows, targets)."""
        known = dict(self.means)
        width = len(self.means[0][1]) if self.means else 0
        unseen = known.get(-1, (0.0,) * width)
        found = {code: known.get(code, unseen) for code in np.unique(codes).tolist()}
        return np.array([found[code] for code in codes.tolist()]).reshape(len(codes), width)


@dataclass(frozen=True)
class Preprocessing:
    """The fitted preprocessing from cells to inputs, stored as plain numbers without pickle.

    Statistics match columns by position, never by name: `numbers` the numeric features in order,
    `levels` the categories and flags beside numbers, in order.
    """

    columns: tuple[Column, ...]
    numbers: tuple[NumberStatistics, ...] = ()
    levels: tuple[LevelEncoding, ...] = ()

    @classmethod
    def fit(
        cls, values: np.ndarray, table: Table, y: np.ndarray | None = None, *, rows: Rows = _ALL
    ) -> Preprocessing:
        """Fit scikit-learn's imputer, scaler and encoders on the training rows of a table.

        `rows` selects from `values`; `y` are their targets (classes or numbers), for the target
        means of large categories.
        """
        targets = None if y is None else _standardize_targets(y, len(table.target.categories))
        numbers = _number_statistics(values, table.columns, rows)
        levels = tuple(
            _flags(codes) if column.words else _levels(codes, targets)
            for column, codes in _iterate_codes(values, table.columns, rows)
        )
        return cls(table.columns, numbers, levels)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the inputs in order; for display, not necessarily unique."""
        return tuple(name for _, name in self._features())

    @property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the inputs made from each column."""
        owners = [owner for owner, _ in self._features()]
        return tuple(
            tuple(i for i, owner in enumerate(owners) if owner == column)
            for column in range(len(self.columns))
        )

    def _features(self) -> Iterator[tuple[int, str]]:
        """Yield each input's column index and name."""
        numeric = [(i, n) for i, column in enumerate(self.columns) for n in _number_names(column)]
        coded = [(i, c) for i, c in enumerate(self.columns) if c.kind == "category" or c.words]
        yield from numeric
        for (i, name), figures in zip(numeric, self.numbers, strict=True):
            if figures.indicator:
                yield i, f"{name} missing"
        for (i, column), levels in zip(coded, self.levels, strict=True):
            for name in _names_of(column, levels):
                yield i, name
        for i, column in enumerate(self.columns):
            if column.kind == "text":
                yield from ((i, f"{column.name} hash {n}") for n in range(column.width - 1))

    def apply(self, values: np.ndarray, *, rows: Rows = _ALL) -> np.ndarray:
        """Transform encoded cells (rows, widths) to inputs (rows, features), float32."""
        return self._inputs(values, rows, None)

    def apply_training(
        self, values: np.ndarray, y: np.ndarray, table: Table, *, rows: Rows = _ALL
    ) -> np.ndarray:
        """Transform the training rows: target means are computed out of fold, so that they reveal
        no more of a row's own target than for a new row.
        """
        return self._inputs(values, rows, _standardize_targets(y, len(table.target.categories)))

    def _inputs(self, values: np.ndarray, rows: Rows, targets: np.ndarray | None) -> np.ndarray:
        count = len(values) if isinstance(rows, slice) else len(rows)
        found = memory.empty(count, len(self.feature_names), np.float32)
        places = iter(range(found.shape[1]))
        absent: list[np.ndarray] = []
        numeric = _iterate_numbers(values, self.columns, rows)
        for (_, cells, _), figures in zip(numeric, self.numbers, strict=True):
            gaps = np.isnan(cells)
            found[:, next(places)] = _scaled(np.where(gaps, figures.fill, cells), figures)
            if figures.indicator:
                absent.append(gaps)
        for gaps in absent:
            found[:, next(places)] = gaps
        coded = _iterate_codes(values, self.columns, rows)
        for (column, codes), levels in zip(coded, self.levels, strict=True):
            for code in levels.codes:
                found[:, next(places)] = codes == code
            if levels.rare:
                usual = (*levels.codes, _NO_CODE) if column.words else levels.codes
                found[:, next(places)] = ~np.isin(codes, usual)
            if levels.means:
                means = levels.mean_of(codes) if targets is None else _out_of_fold(codes, targets)
                for mean in means.T:
                    found[:, next(places)] = mean
        for column, cells in iterate_columns(values, self.columns):
            for hashed in cells[:, 1:].T if column.kind == "text" else ():
                found[:, next(places)] = hashed[rows]
        return memory.by_rows(found)

    def transform(self, source: Source) -> np.ndarray:
        """Transform rows of a file; columns are matched by name, others ignored."""
        return self.apply(encode_columns(source, self.columns))

    def remarks(
        self, source: Source, values: np.ndarray, *, apart: Sequence[str] = ()
    ) -> list[str]:
        """Report what is new in these rows: columns, categories, outliers.

        `values` are the rows from `encode_columns`; columns in `apart` are used otherwise.
        """
        known = {name for column in self.columns for name in (column.name, column.name.strip())}
        known |= set(apart)
        extra = [str(name) for name in source.frame.columns if str(name) not in known]
        found: list[str] = (
            [sentence("notice_left_out", columns=quote_names(extra))] if extra else []
        )
        for column in self.columns:
            found += _remarks_on_units(source, column)
        truths = [column for column in self.columns if column.kind == "boolean"]
        unseen = {column.name: _count_unread(source, column) for column in truths}
        coded = _iterate_codes(values, self.columns)
        unseen |= {column.name: int((codes == -1).sum()) for column, codes in coded}
        found += [
            sentence("remark_unseen", name=name, count=count)
            for name, count in unseen.items()
            if count
        ]
        numeric = _iterate_numbers(values, self.columns)
        for (name, cells, first), figures in zip(numeric, self.numbers, strict=True):
            gaps = int(np.isnan(cells).sum()) - unseen.get(name, 0)
            if first and not figures.indicator and gaps > 0:
                found.append(sentence("remark_gaps", name=name, count=gaps))
            if far := int((np.abs(_scaled(cells, figures)) > _OUTSIDE).sum()):
                found.append(sentence("remark_far", name=name, count=far))
        return found

    def to_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "columns": [column.to_dict() for column in self.columns],
            "numbers": [asdict(figures) for figures in self.numbers],
            "levels": [
                {**asdict(levels), "means": {str(code): m for code, m in levels.means}}
                for levels in self.levels
            ],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Preprocessing:
        """Invert `to_dict`. Older runs store statistics by name, in the same order.

        Raises `DataError` for a document of another kind.
        """
        try:
            decimal = plain.get("decimal", ".")
            found = cls(
                tuple(Column.from_dict(column, decimal=decimal) for column in plain["columns"]),
                tuple(NumberStatistics(**figures) for figures in _listed(plain["numbers"])),
                tuple(_levels_from(levels) for levels in _listed(plain["levels"])),
            )
            found.feature_names  # noqa: B018  # raises unless the counts match the columns
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise DataError(
                f"not a table's preprocessing ({error}): its figures do not fit its columns; "
                "train again"
            ) from error
        return found


def _remarks_on_units(source: Source, column: Column) -> list[str]:
    """Report numbers without the unit that those of training have."""
    if not column.unit or is_currency(column.unit):
        return []
    cells = matching_column(source, column).cells
    texts = [text for text, none in zip(cells.texts, cells.is_missing) if not none]
    parsed = [one for text in texts if (one := parse_number(text)) is not None]
    bare = parsed and not any(one.unit for one in parsed)
    return [sentence("remark_no_unit", name=column.name, unit=column.unit)] if bare else []


def _count_unread(source: Source, column: Column) -> int:
    """Return how many cells of a column of truth values are neither true nor false."""
    cells = matching_column(source, column).cells
    other = np.array([text.lower() not in TRUE | FALSE for text in cells.texts], bool)
    return int(cells.counts[other & ~cells.is_missing].sum())


def _names_of(column: Column, levels: LevelEncoding) -> list[str]:
    """Names of the inputs made from a category, or from the flags beside numbers."""
    texts = column.words or column.categories
    join = " " if column.words else "="
    shown = ["(missing)" if c == _NO_CODE else texts[c] for c in levels.codes]
    names = [f"{column.name}{join}{text}" for text in shown]
    names += [f"{column.name}{join}(rare)"] if levels.rare else []
    width = len(levels.means[0][1]) if levels.means else 0
    return names + [f"{column.name}: mean target" + f" {i}" * (width > 1) for i in range(width)]


def _listed(figures: Any) -> list[Any]:
    return list(figures.values()) if isinstance(figures, Mapping) else list(figures)


def _levels_from(plain: Mapping[str, Any]) -> LevelEncoding:
    means = tuple((int(code), tuple(m)) for code, m in plain.get("means", {}).items())
    return LevelEncoding(tuple(plain["codes"]), plain["rare"], means)


def _scaled(cells: np.ndarray, figures: NumberStatistics) -> np.ndarray:
    if not figures.scale:
        return np.zeros(len(cells))
    return np.clip((cells - figures.mean) / figures.scale, -_CLIP, _CLIP)


def rare_threshold(rows: int) -> int:
    """Row count below which categories share one column for rare ones."""
    return max(2, min(10, rows // 100))


def _number_statistics(
    values: np.ndarray, columns: tuple[Column, ...], rows: Rows
) -> tuple[NumberStatistics, ...]:
    """Imputed value, mean and scale of all numbers, a block of columns at a time."""
    count = sum(len(_number_names(column)) for column in columns)
    numeric = _iterate_numbers(values, columns, rows)
    found: list[NumberStatistics] = []
    size = max(_BLOCK, _CELLS // max(1, len(values)))
    for block in np.array_split(np.arange(count), -(-count // size) or 1):
        found += _statistics_of(
            [(cells, first) for _, cells, first in islice(numeric, len(block))]
        )
    return tuple(found)


def _statistics_of(numeric: Sequence[tuple[np.ndarray, bool]]) -> list[NumberStatistics]:
    """Imputed value, mean and scale of numbers. Computed relative to the imputed value, to keep
    precision where large numbers differ little. Only a column's first number flags missingness.
    """
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import StandardScaler

    if not numeric:
        return []
    cells = np.stack([column for column, _ in numeric], axis=1)
    absent = np.isnan(cells).any(axis=0) & np.array([first for _, first in numeric])
    imputer = cast("Any", SimpleImputer(strategy="median", keep_empty_features=True, copy=False))
    filled = imputer.fit_transform(cells)
    fill = np.nan_to_num(imputer.statistics_)
    rounding = 4 * np.spacing(np.abs(filled).max(axis=0))
    around = filled - fill
    scaler = cast("Any", StandardScaler().fit(around))
    scale = np.where(np.ptp(around, axis=0) > rounding, scaler.scale_, 0.0)
    mean = fill + np.where(scale > 0, scaler.mean_, 0.0)
    figures = zip(fill.tolist(), mean.tolist(), scale.tolist(), absent.tolist(), strict=True)
    return [NumberStatistics(*each) for each in figures]


def _levels(codes: np.ndarray, targets: np.ndarray | None) -> LevelEncoding:
    from sklearn.preprocessing import OneHotEncoder

    encoder = OneHotEncoder(
        min_frequency=rare_threshold(len(codes)),
        max_categories=_LEVELS,
        handle_unknown="infrequent_if_exist",
        sparse_output=False,
    ).fit(codes[:, None])
    rare = encoder.infrequent_categories_[0]
    rare = set() if rare is None else {int(code) for code in rare}
    seen = [int(code) for code in encoder.categories_[0]]
    own = tuple(code for code in seen if code not in rare)
    if targets is None or not rare or len(seen) <= _MANY:
        return LevelEncoding(own, bool(rare))
    means = _target_means(codes, targets, np.array([*seen, -1]))
    return LevelEncoding(
        own, True, tuple(zip((*seen, -1), map(tuple, means.tolist()), strict=True))
    )


def _flags(codes: np.ndarray) -> LevelEncoding:
    """Levels of the flags beside numbers; none for plain numbers, which other inputs represent."""
    found = _levels(codes, None)
    return replace(found, codes=tuple(code for code in found.codes if code != _NO_CODE))


def _standardize_targets(y: np.ndarray, classes: int) -> np.ndarray | None:
    """Return standardised targets (rows, 1 or classes); None for too many."""
    if classes > _CLASSES or y.ndim > 1:
        return None
    wide = np.eye(classes)[y.astype(int)] if classes > 2 else y.astype(float)[:, None]
    scale = wide.std(axis=0)
    return (wide - wide.mean(axis=0)) / np.where(scale > 0, scale, 1.0)


def _target_means(codes: np.ndarray, targets: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return target means of the given codes, shrunk towards the overall mean."""
    from sklearn.preprocessing import TargetEncoder

    means = []
    for target in targets.T:
        encoder = TargetEncoder(target_type="continuous").fit(codes[:, None], target)
        means.append(cast("np.ndarray", encoder.transform(asked[:, None]))[:, 0])
    return np.stack(means, axis=1)


def _out_of_fold(codes: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return each row's target means computed on the other folds."""
    from sklearn.model_selection import KFold

    found = np.zeros((len(codes), targets.shape[1]))
    folds = KFold(min(_FOLDS, len(codes)), shuffle=True, random_state=0)
    for others, fold in folds.split(codes):
        found[fold] = _target_means(codes[others], targets[others], codes[fold])
    return found


def _iterate_codes(
    values: np.ndarray, columns: tuple[Column, ...], rows: Rows = _ALL
) -> Iterator[tuple[Column, np.ndarray]]:
    """Yield codes of categories and of flags beside numbers; -2 if missing or without flag."""
    for column, cells in iterate_columns(values, columns):
        if column.kind == "category" or column.words:
            codes = cells[rows, -1]
            yield column, np.where(np.isnan(codes), _NO_CODE, codes).astype(int)


def _iterate_numbers(
    values: np.ndarray, columns: tuple[Column, ...], rows: Rows = _ALL
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Yield numbers, truth values, text lengths and date parts: name, cells, and whether it is the
    first of its column.
    """
    for column, cells in iterate_columns(values, columns):
        if names := _number_names(column):
            numbers = cells[rows, 0]
            yield names[0], numbers, True
            for name, part in zip(names[1:], _cyclic_parts(numbers, column), strict=True):
                yield name, part, False


_CYCLES = {
    "year": (0.0, 365.2425),
    "week": (3.0, 7.0),
    "day": (0.0, 1.0),
}  # offset, length in days


def _cycles(column: Column) -> tuple[str, ...]:
    if column.kind == "time":
        return ("day",) if column.format in ("", "hours") else ()  # a duration has no time of day
    if column.kind == "date":
        return ("year", "week", "day") if column.clock else ("year", "week")
    return ()


def _number_names(column: Column) -> tuple[str, ...]:
    """Names of the numeric values of a column; for a date days, and its phases of year, week and
    day.
    """
    if column.kind == "category":
        return ()
    said = {"text": " length", "date": " days", "time": " time"}.get(column.kind, "")
    circles = (f"{name} {part}" for name in _cycles(column) for part in ("sin", "cos"))
    return (f"{column.name}{said}", *(f"{column.name} {name}" for name in circles))


def _cyclic_parts(days: np.ndarray, column: Column) -> Iterator[np.ndarray]:
    """Yield sine and cosine of dates in the cycles of their column."""
    for offset, length in (_CYCLES[name] for name in _cycles(column)):
        turns = (days + offset) / length
        angle = 2 * np.pi * (turns - np.floor(turns))
        yield np.sin(angle)
        yield np.cos(angle)
