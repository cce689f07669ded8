"""From encoded cells to inputs: fitted on training rows, kept as figures for new rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import numpy as np

from tikhon.data.columns import Column, encode, listed
from tikhon.data.reading import Source
from tikhon.data.table import Table
from tikhon.errors import DataError

_LEVELS = 50  # columns that one category becomes at most


@dataclass(frozen=True)
class Numbers:
    """Figures of one number: its fill value, its scaling, whether its absence is a feature."""

    fill: float
    mean: float
    scale: float
    indicator: bool


@dataclass(frozen=True)
class Levels:
    """Codes of one category that have a column of their own; -2 stands for "missing"."""

    codes: tuple[int, ...]
    rare: bool  # the others, and unseen ones, share a column


@dataclass(frozen=True)
class Preprocessing:
    """The fitted steps from cells to inputs, as figures: no pickle, the same for new rows."""

    columns: tuple[Column, ...]
    numbers: Mapping[str, Numbers] = field(default_factory=dict)  # feature -> figures
    levels: Mapping[str, Levels] = field(default_factory=dict)
    decimal: str = "."

    @classmethod
    def fit(cls, values: np.ndarray, table: Table) -> Preprocessing:
        """Fit scikit-learn's imputer, scaler and encoder on the training rows of a table."""
        from sklearn.impute import SimpleImputer
        from sklearn.preprocessing import OneHotEncoder, StandardScaler

        numeric, names = _numeric(values, table.columns)
        imputer = cast("Any", SimpleImputer(strategy="median", keep_empty_features=True))
        numbers: dict[str, Numbers] = {}
        if names:
            scaler = cast("Any", StandardScaler().fit(imputer.fit_transform(numeric)))
            absent = [bool(np.isnan(cells).any()) for cells in numeric.T]
            numbers = {
                name: Numbers(float(fill), float(mean), float(scale), bool(gaps))
                for name, fill, mean, scale, gaps in zip(
                    names, imputer.statistics_, scaler.mean_, scaler.scale_, absent, strict=True
                )
            }
        levels: dict[str, Levels] = {}
        for column, cells in zip(table.columns, values.T, strict=True):
            if column.kind == "category":
                codes = np.where(np.isnan(cells), -2, cells).astype(int)
                encoder = OneHotEncoder(
                    min_frequency=rare_below(len(cells)),
                    max_categories=_LEVELS,
                    handle_unknown="infrequent_if_exist",
                    sparse_output=False,
                ).fit(codes[:, None])
                rare = encoder.infrequent_categories_[0]
                rare = set() if rare is None else {int(code) for code in rare}
                own = [int(code) for code in encoder.categories_[0] if int(code) not in rare]
                levels[column.name] = Levels(tuple(own), bool(rare))
        return cls(table.columns, numbers, levels, table.decimal)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        names = [*self.numbers, *(f"{n} missing" for n, f in self.numbers.items() if f.indicator)]
        for column in self.columns:
            if column.kind == "category":
                levels = self.levels[column.name]
                texts = ["(missing)" if c == -2 else column.categories[c] for c in levels.codes]
                names += [f"{column.name}={text}" for text in texts]
                names += [f"{column.name}=(rare)"] if levels.rare else []
        return tuple(names)

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Encoded cells (rows, columns) to inputs (rows, features), float32."""
        parts: list[np.ndarray] = []
        numeric, names = _numeric(values, self.columns)
        if names:
            figures = [self.numbers[name] for name in names]
            fill, mean, scale = (
                np.array([getattr(f, key) for f in figures]) for key in ("fill", "mean", "scale")
            )
            absent = np.isnan(numeric)
            parts.append((np.where(absent, fill, numeric) - mean) / scale)
            parts.append(absent[:, [f.indicator for f in figures]].astype(float))
        for column, cells in zip(self.columns, values.T, strict=True):
            if column.kind == "category":
                levels = self.levels[column.name]
                codes = np.where(np.isnan(cells), -2, cells).astype(int)
                hot = (codes[:, None] == np.array(levels.codes, int)[None]).astype(float)
                parts.append(hot)
                if levels.rare:
                    parts.append(1.0 - hot.sum(1, keepdims=True))
        return np.concatenate(parts, axis=1).astype(np.float32)

    def transform(self, source: Source) -> np.ndarray:
        """Rows of a file to inputs; columns by name, extra ones are ignored."""
        return self.apply(encode(source, self.columns, decimal=self.decimal))

    def remarks(self, source: Source) -> list[str]:
        """What new rows hold that the training rows did not: columns, and values of categories."""
        known = {column.name for column in self.columns}
        extra = [str(name) for name in source.frame.columns if str(name) not in known]
        found = [f"columns not used: {listed(extra)}"] if extra else []
        codes = encode(source, self.columns, decimal=self.decimal)
        for column, cells in zip(self.columns, codes.T, strict=True):
            if column.kind == "category" and (unseen := int((cells == -1).sum())):
                found.append(f"{column.name!r}: {unseen} value(s) that training never saw")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "columns": [column.to_dict() for column in self.columns],
            "numbers": {name: asdict(figures) for name, figures in self.numbers.items()},
            "levels": {name: asdict(levels) for name, levels in self.levels.items()},
            "decimal": self.decimal,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`. Raises `DataError` for a document of another kind."""
        try:
            return cls(
                tuple(Column.from_dict(column) for column in plain["columns"]),
                {name: Numbers(**figures) for name, figures in plain["numbers"].items()},
                {
                    name: Levels(tuple(levels["codes"]), levels["rare"])
                    for name, levels in plain["levels"].items()
                },
                plain["decimal"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not a table's preprocessing: {error!r}") from error


def rare_below(rows: int) -> int:
    """A category in fewer training rows than this shares a column with the other rare ones."""
    return max(2, min(10, rows // 100))


def _numeric(values: np.ndarray, columns: tuple[Column, ...]) -> tuple[np.ndarray, list[str]]:
    """Numbers, truth values and the parts of dates, with their names."""
    parts: list[np.ndarray] = []
    names: list[str] = []
    for column, cells in zip(columns, values.T, strict=True):
        if column.kind in ("number", "boolean"):
            parts.append(cells)
            names.append(column.name)
        elif column.kind == "date":
            for name, part in _date_parts(cells, column.clock):
                parts.append(part)
                names.append(f"{column.name} {name}")
    return (np.stack(parts, axis=1) if parts else np.zeros((len(values), 0))), names


def _date_parts(days: np.ndarray, clock: bool) -> list[tuple[str, np.ndarray]]:
    """A date as days, and where it is in its year, week and day, on a circle."""
    parts = [("days", days)]
    cycles = [("year", days / 365.2425), ("week", (days + 3) / 7), ("day", days)]
    for name, turns in cycles if clock else cycles[:2]:
        angle = 2 * np.pi * (turns - np.floor(turns))
        parts += [(f"{name} sin", np.sin(angle)), (f"{name} cos", np.cos(angle))]
    return parts
