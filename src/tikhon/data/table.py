"""Load tables: columns of any kind in, a numeric data set out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from tikhon.data import quality_checks
from tikhon.data.column import Column
from tikhon.data.columns import infer_column
from tikhon.data.dataset import Dataset, Table
from tikhon.data.encoding import concatenate_columns, encode_column
from tikhon.data.large_tables import read_source
from tikhon.data.raw_column import RawColumn
from tikhon.data.source import Format, Source
from tikhon.data.target import read_target
from tikhon.errors import DataError, InputError, unknown_name
from tikhon.languages import Sentence, sentence

if TYPE_CHECKING:
    import pandas as pd


_TOP = 20  # rows in which the header is looked for
_WHOLE = 2**53  # from here float64 cannot represent all integers


@dataclass(frozen=True)
class TableOptions:
    """User options for a table.

    Args:
        target: name of the column to predict.
        task: "classification", "regression", or None to infer it from the target.
        features: the columns to use; None for all.
        drop: columns to leave out.
        categorical: columns to force to categories.
        time: a date or number column; later rows are held out. It stays a feature.
        group: a column whose equal values are never split. It is not a feature.
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
            raise InputError(unknown_name("task", self.task, ("classification", "regression")))
        if self.features is not None and self.target in self.features:
            raise InputError(f"the target {self.target!r} is also among the features; remove it")
        if self.target in self.drop:
            raise InputError(f"the target {self.target!r} is also to be dropped; name one of them")
        features = self.features or ()
        if twice := next((name for name in features if features.count(name) > 1), None):
            raise InputError(f"the feature {twice!r} is named twice")
        for name in self.drop:
            if name in (*features, *self.categorical):
                raise InputError(f"column {name!r} is to be used and to be dropped; say which")
        if self.group is not None and self.group in features:
            raise InputError(
                f"the group column {self.group!r} is no feature: new rows are of other groups"
            )
        for role, name in (("time", self.time), ("group", self.group)):
            if name == self.target:
                raise InputError(f"the target {name!r} cannot be the {role} column as well")
        if self.time is not None and self.group is not None:
            raise InputError("time and group both decide the split: give one of them")


def load_table(path: Path, options: TableOptions) -> Dataset:
    """Load the data set of a table file.

    Raises `DataError` for an unusable file, and `InputError` for a missing column.
    """
    return from_source(read_source(path, options.format), options)


def from_source(source: Source, options: TableOptions) -> Dataset:
    """Build the data set of a frame, inferring kinds; preprocessing is fitted after the split."""
    names = [str(name) for name in source.frame.columns]
    _check_names(source, names, options)
    target = read_target(source, options.target, options.task)
    source = target.source
    columns, values, dropped = _features(source, names, options)
    notices = [*source.notices, *target.notices, *quality_checks.report_formats(columns)]
    if dropped:
        told = quality_checks.describe_dropped(dropped)
        notices.append(sentence("notice_left_out", columns=told))
    for column in columns:
        notices += quality_checks.check_levels(column)
    if target.task == "classification":
        notices += quality_checks.find_na_labels(source, options.target)
    notices += quality_checks.find_imbalance(target.y, target.column, target.task)
    leaks = quality_checks.find_leaks(values, columns, target.y, target.task)
    notices += leaks or quality_checks.find_combined_leaks(
        values, columns, target.y, target.column, target.task
    )
    for check in quality_checks.CHECKS:
        notices += check(values, columns)
    notices += quality_checks.target_sentinels(target.y, target.column)
    notices += quality_checks.find_total_row(source, values, columns)
    notices += quality_checks.find_garbled_text(source)
    if options.time is None and options.group is None:
        notices += quality_checks.find_groups(values, columns) + quality_checks.find_sorted_dates(
            values, columns
        )
    table = Table(columns, dropped, target.column, *_split_columns(source, options))
    return Dataset(
        name=_stem(source.name),
        x=torch.from_numpy(values),
        y=torch.from_numpy(target.y),
        task=target.task,  # type: ignore[arg-type]
        classes=target.column.categories if target.task == "classification" else (),
        feature_names=tuple(c.name for c in columns for _ in range(c.width)),
        origin={**source.origin, "task": target.why, "target": options.target},
        table=table,
        notices=tuple(notices),
    )


def _stem(name: str) -> str:
    """Return the file name without extensions: `sales.csv.gz` gives `sales`."""
    path = Path(name)
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def _check_names(source: Source, names: list[str], options: TableOptions) -> None:
    asked = (
        options.target,
        options.time,
        options.group,
        *options.drop,
        *options.categorical,
        *(options.features or ()),
    )
    for name in asked:
        if name is not None and name not in names:
            if len(names) == 1 and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", names[0]):
                raise InputError(
                    f"{source.name}: one column found ({names[0][:60]!r}), no {name!r}; say what "
                    "separates the fields with --sep"
                )
            shown = unknown_name("column", name, names)
            for row, cells in enumerate(source.frame.head(_TOP).to_numpy(object)):
                if any(isinstance(cell, str) and cell.strip() == name for cell in cells):
                    raise InputError(
                        f"{source.name}: the first line names no column {name!r}, "
                        f"{source.line(row)} does: remove the lines above it"
                    )
            doubt = next((f"; {n}" for n in source.notices if n.key == "notice_headless"), "")
            raise InputError(f"{source.name}: {shown}{doubt}")


def _features(
    source: Source, names: list[str], options: TableOptions
) -> tuple[tuple[Column, ...], np.ndarray, tuple[Column, ...]]:
    """Return the feature columns, their encoded cells, and the dropped columns."""
    not_used = {options.target, options.group, *options.drop}
    kept: list[Column] = []
    dropped: list[Column] = []
    parts: list[np.ndarray] = []
    for name in options.features or names:
        if name in not_used:
            continue
        raw = RawColumn(source, name)
        column = infer_column(raw, category=name in options.categorical)
        if column.kind != "dropped":
            values = encode_column(raw, column)
            if not np.all((values == values[:1]) | (np.isnan(values) & np.isnan(values[:1]))):
                kept.append(column)
                parts.append(values)
                continue
            column = Column(name, "dropped", reason=_sameness(source, name, values[0]))
        dropped.append(column)
    if not kept:
        why = f"; dropped: {quality_checks.describe_dropped(dropped)}" if dropped else ""
        raise DataError(f"{source.name}: no column is left to learn from{why}")
    return tuple(kept), concatenate_columns(parts), tuple(dropped)


def _sameness(source: Source, name: str, encoded: np.ndarray) -> Sentence:
    """Explain why a column with constant encoding is dropped."""
    cells = cast("pd.Series", source.frame[name]).dropna().astype(str)
    value = cells.iloc[0][:40]
    if len(cells.unique()) > 1 and abs(encoded[0]) >= _WHOLE:
        return sentence("reason_digits", value=value)
    return sentence("reason_same", value=value)


def _split_columns(
    source: Source, options: TableOptions
) -> tuple[np.ndarray | None, np.ndarray | None]:
    groups = times = None
    if options.group is not None:
        series = cast("pd.Series", source.frame[options.group])
        _refuse_empty(source, "group", options.group, series.isna().to_numpy(bool))
        groups = np.unique(series.astype(str), return_inverse=True)[1]
    if options.time is not None:
        raw = RawColumn(source, options.time)
        column = infer_column(raw)
        if column.kind not in ("date", "time", "number"):
            raise DataError(
                f"time column {options.time!r} holds neither dates nor numbers ({column.kind})"
            )
        times = encode_column(raw, column)[:, 0]
        _refuse_empty(source, "time", options.time, np.isnan(times))
    return groups, times


def _refuse_empty(source: Source, role: str, name: str, empty: np.ndarray) -> None:
    if empty.any():
        line = source.line(int(np.argmax(empty)))
        raise DataError(f"{role} column {name!r} is empty in {line}")
