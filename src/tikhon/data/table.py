"""Tables: columns of any kind in, a data set of numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from tikhon.data.columns import Column, encode, infer
from tikhon.data.dataset import Dataset
from tikhon.data.reading import Format, Source, listed, read
from tikhon.errors import DataError, InputError, unknown

if TYPE_CHECKING:
    import pandas as pd

_FEW = 20  # whole numbers with no more values than this are classes
_RARE_CLASS = 0.1


@dataclass(frozen=True)
class TableOptions:
    """What the user decides about a table.

    Args:
        target: name of the column to predict.
        task: "classification", "regression", or None to infer it from the target.
        features: the columns to use; None for all.
        drop: columns to leave out.
        categorical: columns to read as categories whatever they look like.
        time: a date or number column: later rows are held out, the column stays a feature.
        group: a column whose equal values stay on one side of every split; not a feature.
        format: how the file is written.
    """

    target: str
    task: str | None = None
    features: tuple[str, ...] | None = None
    drop: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    time: str | None = None
    group: str | None = None
    format: Format | None = None

    def __post_init__(self) -> None:
        if self.task not in (None, "classification", "regression"):
            raise InputError(unknown("task", self.task, ("classification", "regression")))
        if self.features is not None and self.target in self.features:
            raise InputError(f"the target {self.target!r} is also among the features; remove it")
        if self.time is not None and self.group is not None:
            raise InputError("time and group both decide the split: give one of them")


@dataclass(frozen=True, eq=False)
class Table:
    """The columns of a data set and how it is to be split; `x` of the data set holds `encode`."""

    columns: tuple[Column, ...]  # the ones in x, in order
    dropped: tuple[Column, ...]
    target: Column
    decimal: str = "."
    groups: np.ndarray | None = None  # (rows,) a number for each group
    times: np.ndarray | None = None  # (rows,)

    def take(self, rows: np.ndarray) -> Table:
        """The same table of these rows."""
        pick = {k: None if v is None else v[rows] for k, v in self._rowwise().items()}
        return Table(self.columns, self.dropped, self.target, self.decimal, **pick)

    def _rowwise(self) -> dict[str, np.ndarray | None]:
        return {"groups": self.groups, "times": self.times}


def load_table(path: Path, options: TableOptions) -> Dataset:
    """The data set of a CSV, TSV or Parquet file.

    Raises `DataError` for a file that cannot be trained on and `InputError` for a column that it
    does not have.
    """
    return from_source(read(path, options.format), options)


def from_source(source: Source, options: TableOptions) -> Dataset:
    """The data set of a frame: kinds inferred, nothing fitted yet (that needs the split)."""
    names = [str(name) for name in source.frame.columns]
    for name in (options.target, options.time, options.group, *options.drop, *options.categorical,
                 *(options.features or ())):  # fmt: skip
        if name is not None and name not in names:
            raise InputError(f"{source.name}: {unknown('column', name, names)}")
    decimal = options.format.decimal if options.format else "."
    source, notices = _labelled_rows(source, options.target)
    target, y, task, why = _target(source, options, decimal)
    used = [n for n in (options.features or names) if n not in (options.target, *options.drop)]
    used = [n for n in used if n != options.group]
    columns = tuple(
        infer(source, n, decimal=decimal, forced="category" if n in options.categorical else None)
        for n in used
    )
    kept = tuple(c for c in columns if c.kind != "dropped")
    dropped = tuple(c for c in columns if c.kind == "dropped")
    if not kept:
        raise DataError(
            f"{source.name}: no column is left to learn from; dropped: {_said(dropped)}"
        )
    values = encode(source, kept, decimal=decimal)
    if dropped:
        notices.append(f"columns not used: {_said(dropped)}")
    notices += [*_text_na(source, options.target), *_imbalance(y, target, task)]
    notices += [*_leaks(values, kept, y, task), *_identifiers(values, kept)]
    table = Table(kept, dropped, target, decimal, *_split_columns(source, options, decimal))
    return Dataset(
        name=Path(source.name).stem,
        x=torch.from_numpy(values),
        y=torch.from_numpy(y),
        task=task,  # type: ignore[arg-type]
        classes=target.categories if task == "classification" else (),
        feature_names=tuple(c.name for c in kept),
        origin={**source.origin, "task": why, "target": options.target},
        table=table,
        notices=(*source.notices, *notices),
    )


def _labelled_rows(source: Source, target: str) -> tuple[Source, list[str]]:
    present = source.frame[target].notna().to_numpy()
    if not present.any():
        raise DataError(f"{source.name}: the target {target!r} is empty in every row")
    if present.all():
        return source, []
    lines = [line for line, there in zip(source.lines, present, strict=False) if there]
    frame = cast("pd.DataFrame", source.frame[present]).reset_index(drop=True)
    kept = Source(frame, source.name, lines, source.notices, source.origin)
    return kept, [f"{int((~present).sum())} rows without a {target!r} were left out"]


def _target(
    source: Source, options: TableOptions, decimal: str
) -> tuple[Column, np.ndarray, str, str]:
    """The target's column, its values, the task and the reason for the task."""
    series = cast("pd.Series", source.frame[options.target])
    if series.nunique() < 2:
        raise DataError(
            f"{source.name}: the target {options.target!r} is {str(series.iloc[0])!r} in all "
            f"{len(series)} rows; two or more different values are needed"
        )
    text = series.astype("string").str.strip()
    numbers, other = _as_numbers(source, options.target, decimal)
    levels = len(np.unique(numbers)) if not other else 0
    whole = not other and bool(np.all(numbers == np.floor(numbers)))
    few = levels == 2 or (whole and levels <= min(_FEW, max(2, len(series) // 5)))
    task = options.task
    if task is None:
        task = "classification" if other or few else "regression"
        why = (
            f"classification: {options.target!r} holds text"
            if other
            else f"{task}: {options.target!r} holds {levels} different numbers"
        )
    else:
        why = f"{task}: as asked for"
    if task == "regression":
        if other:
            raise DataError(
                f"{source.name}: regression needs numbers, but {options.target!r} holds "
                f"{other!r}; leave --task out or correct the target"
            )
        return Column(options.target, "number"), numbers, task, why
    if not other and levels > max(_FEW, len(series) // 2):
        raise DataError(
            f"{source.name}: {options.target!r} holds {levels} different numbers in {len(series)} "
            "rows; as classes they cannot be learnt: leave --task out"
        )
    labels = sorted(text.unique(), key=(lambda v: (float(v), v)) if whole else None)
    codes = np.array(text.map({label: code for code, label in enumerate(labels)}), np.int64)
    return Column(options.target, "category", categories=tuple(labels)), codes, task, why


def _as_numbers(source: Source, name: str, decimal: str) -> tuple[np.ndarray, str]:
    """The column as numbers, and the first text that is not one ("" if all are)."""
    import pandas as pd

    series = source.frame[name]
    if pd.api.types.is_bool_dtype(series):
        return np.zeros(0), str(series.iloc[0])
    text = series.astype("string").str.strip()
    if decimal != ".":
        text = text.str.replace(decimal, ".", regex=False)
    parsed = cast("pd.Series", pd.to_numeric(text, errors="coerce"))
    numbers = np.array(parsed.to_numpy(float, na_value=np.nan))
    if np.isnan(numbers).any():
        return numbers, str(series.iloc[int(np.argmax(np.isnan(numbers)))])
    if np.isinf(numbers).any():
        row = int(np.argmax(np.isinf(numbers)))
        raise DataError(
            f"{source.name}: the target {name!r} has {int(np.isinf(numbers).sum())} infinite "
            f"value(s), first in {source.line(row)}"
        )
    return numbers, ""


def _split_columns(
    source: Source, options: TableOptions, decimal: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    groups = times = None
    if options.group is not None:
        series = cast("pd.Series", source.frame[options.group])
        if series.isna().any():
            row = int(np.argmax(series.isna().to_numpy()))
            raise DataError(f"group column {options.group!r} is empty in {source.line(row)}")
        groups = np.unique(series.astype(str), return_inverse=True)[1]
    if options.time is not None:
        column = infer(source, options.time, decimal=decimal)
        if column.kind not in ("date", "number"):
            raise DataError(
                f"time column {options.time!r} holds neither dates nor numbers ({column.kind})"
            )
        times = encode(source, (column,), decimal=decimal)[:, 0]
        if np.isnan(times).any():
            row = int(np.argmax(np.isnan(times)))
            raise DataError(f"time column {options.time!r} is empty in {source.line(row)}")
    return groups, times


def _said(columns: Sequence[Column]) -> str:
    shown = "; ".join(f"{listed([c.name])} ({c.reason})" for c in columns[:8])
    return shown + (f" and {len(columns) - 8} more" if len(columns) > 8 else "")


def _text_na(source: Source, target: str) -> list[str]:
    text = source.frame[target].astype("string").str.strip()
    found = text[text.str.lower().isin(["na", "n/a", "nan", "null", "none"])]
    return [
        f"{count} rows hold text {word!r} in {target!r}; if it means no value, use "
        f"--na-values {word}"
        for word, count in found.value_counts().items()
    ]


def _imbalance(y: np.ndarray, target: Column, task: str) -> list[str]:
    if task != "classification":
        return []
    shares = np.bincount(y) / len(y)
    least = int(shares.argmin())
    if shares[least] >= _RARE_CLASS / (len(shares) / 2):
        return []
    return [
        f"class {target.categories[least]!r} is {shares[least]:.1%} of the rows: accuracy alone "
        f"misleads (always answering the largest class gives {shares.max():.1%})"
    ]


def _leaks(values: np.ndarray, columns: tuple[Column, ...], y: np.ndarray, task: str) -> list[str]:
    """Columns that alone tell the target: usually they were written down after it."""
    found = []
    for column, cells in zip(columns, values.T, strict=True):
        there = ~np.isnan(cells)
        if there.sum() < 10 or len(np.unique(cells[there])) < 2:
            continue
        if task == "regression":
            if len(np.unique(y[there])) > 1:
                told = abs(np.corrcoef(cells[there], y[there])[0, 1]) > 0.9999
            else:
                told = False
        else:
            levels = len(np.unique(cells[there]))
            pairs = len(np.unique(np.stack([cells[there], y[there]]), axis=1)[0])
            told = pairs == levels <= 2 * len(np.unique(y))
        if told:
            found.append(column.name)
    if not found:
        return []
    return [
        f"{listed(found)} alone tells the target: was it known beforehand? (--drop leaves it out)"
    ]


def _identifiers(values: np.ndarray, columns: tuple[Column, ...]) -> list[str]:
    found = [
        column.name
        for column, cells in zip(columns, values.T, strict=True)
        if column.kind == "number"
        and len(np.unique(cells)) == len(cells) > 20
        and bool(np.all(cells == np.floor(cells)))
    ]
    if not found:
        return []
    return [
        f"{listed(found)}: another whole number in every row; if it is an identifier, --drop it"
    ]
