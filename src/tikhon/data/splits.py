"""Split rows for training, validation and test; scale by statistics of the training rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tikhon.data.dataset import Dataset, Table
from tikhon.data.preprocessing import Preprocessing
from tikhon.data.quality_checks import (
    expected_duplicates,
    find_repeated_rows,
    find_untested_classes,
    hash_rows,
)
from tikhon.errors import DataError, InputError
from tikhon.languages import Sentence, sentence
from tikhon.numbers import check_seed

Notices = Sequence[Sentence]


@dataclass(frozen=True, eq=False)
class Split:
    """Three parts of a data set and the statistics they were scaled with."""

    train: Dataset
    valid: Dataset
    test: Dataset
    scaling: Mapping[str, Any]  # mean, scale (of x), target_mean, target_scale, where used
    preprocessing: Preprocessing | None = None  # of a table, fitted on the training part


def split(
    data: Dataset, *, valid: float = 0.2, test: float = 0.2, largest: int = 5_000, seed: int = 0
) -> Split:
    """Split by rows, stratified by class; a source's own test rows stay the test part.

    A class with a single row goes to training, with a notice. A table with a time column holds out
    its latest rows for test and those before them for validation; groups are never split.
    `valid` and `test` are fractions in (0, 1) of all rows; `largest` caps each part.
    Raises `DataError` for too few rows.

    >>> from tikhon.data import load
    >>> parts = split(load("iris"))
    >>> len(parts.train.x), len(parts.valid.x), len(parts.test.x)
    (90, 30, 30)
    """
    for name, fraction in (("valid", valid), ("test", test)):
        if not 0 < fraction < 1:
            raise InputError(f"{name} must be a fraction in (0, 1), received {fraction}")
    check_seed(seed)
    rows = len(data.x)
    rest = replace(data, x=torch.arange(rows))  # draw indices, without copying cells
    held_out: tuple[Dataset, ...] = ()
    if data.test is None:
        kept, drawn = _draw_part(rest, min(round(test * rows), largest), seed)
        rest, held_out = rest.take(kept), (rest.take(drawn),)
    kept, drawn = _draw_part(rest, min(round(valid * rows), largest), (seed + 1) % (1 << 32))
    parts = [rest.take(kept), rest.take(drawn), *held_out]
    if data.table is not None:
        return _standardize(*_preprocess(data, parts))
    parts = [replace(part, x=data.x[part.x]) for part in parts]
    return _standardize(parts if data.test is None else [*parts, data.test])


def _draw_part(data: Dataset, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return indices (kept, drawn)."""
    if not 0 < count < len(data.x):
        raise DataError(f"{data.name}: {len(data.x)} rows are too few to hold out {count}")
    if data.table is not None and (data.table.times is not None or data.table.groups is not None):
        return _draw_blocks(data, data.table, count, seed)
    found = draw_rows(data.y, count, seed, classes=bool(data.classes))
    if found is None:
        sizes = torch.bincount(data.y, minlength=len(data.classes))
        least = int(sizes.argmin())
        raise DataError(
            sentence(
                "refused_class",
                data=data.name,
                name=data.classes[least],
                rows=int(sizes[least]),
                held=count,
                classes=len(data.classes),
            )
        )
    return found


def draw_rows(y: Tensor, count: int, seed: int, *, classes: bool) -> tuple[Tensor, Tensor] | None:
    """Return indices (kept, drawn), `count` of them drawn, stratified by classes y.

    A class with one row is kept; with more classes than drawn rows, one row of each is kept.
    None if too few rows remain to draw from.
    """
    from sklearn.model_selection import train_test_split

    rows, stratify = torch.arange(len(y)), None
    if classes:
        rows, stratify = _stratifiable(y, count)
    if count >= len(rows):
        return None
    kept, drawn = train_test_split(
        rows.numpy(), test_size=count, random_state=seed, stratify=stratify
    )
    if len(rows) < len(y):  # keep the rows excluded from drawing
        kept = np.setdiff1d(np.arange(len(y)), drawn)
    return torch.from_numpy(kept), torch.from_numpy(drawn)


def _stratifiable(y: Tensor, count: int) -> tuple[Tensor, object]:
    """Return the rows that may be drawn, and their classes to stratify by, or None."""
    sizes = torch.bincount(y)
    rows = torch.nonzero(sizes[y] > 1)[:, 0]
    if count < int((sizes > 1).sum()):
        first = torch.zeros(len(y), dtype=torch.bool)
        first[[int((y == code).nonzero()[0]) for code in y.unique()]] = True
        rows = torch.nonzero(~first)[:, 0]
    left = torch.bincount(y[rows])
    present = left[left > 0]
    possible = 0 < len(present) <= min(count, len(rows) - count) and int(present.min()) > 1
    return rows, y[rows].numpy() if possible else None


def assign_parts(y: Tensor, parts: int, *, seed: int | None = None) -> Tensor:
    """Assign rows to parts of similar targets; return the part of each row, (rows,).

    Rows sorted by their (first) target are dealt in turn: classes stay in proportion, numbers
    cover their range. Ties keep their order, or are shuffled by `seed`.

    >>> assign_parts(torch.tensor([0, 0, 1, 1]), 2).tolist()
    [0, 1, 0, 1]
    """
    first = y.reshape(len(y), -1)[:, 0].cpu()
    order = torch.arange(len(y))
    if seed is not None:
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    part = torch.empty(len(y), dtype=torch.long)
    part[order[first[order].argsort(stable=True)]] = torch.arange(len(y)) % parts
    return part


def _draw_blocks(data: Dataset, table: Table, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the latest rows, or whole groups."""
    from sklearn.model_selection import GroupShuffleSplit

    if table.times is not None:
        order = np.argsort(table.times, kind="stable")
        kept, drawn = np.sort(order[:-count]), np.sort(order[-count:])
    else:
        assert table.groups is not None
        if (groups := len(np.unique(table.groups))) < 2:
            raise DataError(f"{data.name}: {groups} group cannot be split; give more groups")
        splitter = GroupShuffleSplit(1, test_size=count / len(data.x), random_state=seed)
        kept, drawn = next(splitter.split(np.zeros(len(data.x)), groups=table.groups))
    kept, drawn = torch.from_numpy(kept), torch.from_numpy(drawn)
    absent = set(range(len(data.classes))) - set(data.y[kept].tolist())
    if absent:
        raise DataError(
            f"{data.name}: class {data.classes[min(absent)]!r} is not in the training rows of "
            "this split; split by rows, or give more data"
        )
    return kept, drawn


def _preprocess(
    data: Dataset, parts: list[Dataset]
) -> tuple[list[Dataset], Preprocessing, Notices]:
    """Preprocess the parts of a table (given as row indices); return notices on rows that occur in
    two parts.
    """
    assert data.table is not None
    values, y, table = data.x.numpy(), parts[0].y.numpy(), data.table
    rows = [part.x.numpy() for part in parts]
    known = set(hash_rows(values, data.y.numpy(), rows[0]))
    notices = []
    twice = len(rows[0]) - len(known)
    told_of = twice <= len(known) or expected_duplicates(values, rows[0]) < twice / 2
    for drawn, name in zip(rows[1:], ("validation", "test"), strict=True):
        told = list(hash_rows(values, data.y.numpy(), drawn))
        notices += find_repeated_rows(known, told, name) if told_of else []
    del known  # as large as a column or two
    fitted = Preprocessing.fit(values, table, y, rows=rows[0])
    inputs = [
        fitted.apply_training(values, y, table, rows=rows[0]),
        *(fitted.apply(values, rows=drawn) for drawn in rows[1:]),
    ]
    names = fitted.feature_names
    parts = [
        replace(part, x=torch.from_numpy(x), feature_names=names, table=None)
        for part, x in zip(parts, inputs, strict=True)
    ]
    return parts, fitted, notices


def _standardize(
    parts: list[Dataset], preprocessing: Preprocessing | None = None, repeats: Notices = ()
) -> Split:
    train, classes = parts[0], parts[0].classes
    counts = [np.bincount(p.y.numpy(), minlength=len(classes)) for p in parts if classes]
    rare = find_untested_classes(classes, counts[0], counts[1:]) if classes else []
    notices = (*train.notices, *rare, *repeats)
    parts = [replace(part, test=None, notices=notices) for part in parts]
    scaling: dict[str, object] = {}
    if train.scale:
        mean, scale = _moments(train.x)
        parts = [replace(part, x=((part.x.double() - mean) / scale).float()) for part in parts]
        scaling = {"mean": mean.tolist(), "scale": scale.tolist()}
    if train.task == "regression":
        mean, scale = _moments(train.y)
        unit = float(scale.mean())
        parts = [replace(p, y=((p.y.double() - mean) / scale).float(), unit=unit) for p in parts]
        scaling |= {"target_mean": mean.tolist(), "target_scale": scale.tolist()}
    return Split(parts[0], parts[1], parts[2], scaling, preprocessing)


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column; 1 for constant columns."""
    wide = values.double()  # float32 sums of squares are inexact for nearly constant columns
    mean, scale = wide.mean(0), wide.std(0, correction=0)
    return mean, torch.where(scale > 1e-9 * mean.abs(), scale, 1.0)
