"""The value that every source of data gives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

    from tikhon.data.columns import Column
    from tikhon.languages import Sentence

Task = Literal["classification", "regression"]
_BLOCK = 10_000  # rows that are copied at a time


@dataclass(frozen=True, eq=False)
class Table:
    """The columns of a data set and how it is to be split; `x` of the data set holds `encode`."""

    columns: tuple[Column, ...]  # the ones in x, in order
    dropped: tuple[Column, ...]
    target: Column
    groups: np.ndarray | None = None  # (rows,) a number for each group
    times: np.ndarray | None = None  # (rows,)

    def take(self, rows: np.ndarray) -> Table:
        """The same table of these rows."""
        groups, times = (None if v is None else v[rows] for v in (self.groups, self.times))
        return replace(self, groups=groups, times=times)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows to learn from: `x` (rows, ...) float, `y` (rows,) int64 classes or float targets.

    `scale` tells that the columns are to be standardised with figures of the training part;
    images come scaled to [0, 1]. `unit` is what 1.0 of a standardised target means. `test` holds
    the rows that the source itself keeps for testing. With a `table`, `x` holds its encoded cells
    (NaN is a missing one) until `split` fits the preprocessing on the training part. `notices`
    are what the user should be told about the data.
    """

    name: str
    x: Tensor
    y: Tensor
    task: Task
    classes: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()
    scale: bool = False
    unit: float = 1.0
    test: Dataset | None = None
    origin: Mapping[str, object] = field(default_factory=dict)
    table: Table | None = None
    notices: tuple[Sentence, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return tuple(self.x.shape[1:])

    @property
    def outputs(self) -> int:
        """How many numbers a model has to answer with: one a class, or one a target column."""
        return len(self.classes) or (self.y.shape[1] if self.y.ndim > 1 else 1)

    def take(self, rows: Tensor) -> Dataset:
        """The rows of these indices, without the source's own test part."""
        table = None if self.table is None else self.table.take(rows.numpy())
        return replace(self, x=self.x[rows], y=self.y[rows], test=None, table=table)

    def fingerprint(self) -> str:
        """SHA-256 over shapes and values: tells whether a run continues on the same data."""
        parts = [self] if self.test is None else [self, self.test]
        return fingerprint(*(values for part in parts for values in (part.x, part.y)))


def fingerprint(*tensors: Tensor) -> str:
    """SHA-256 over the types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for values in tensors:
        values = values.detach().cpu()
        digest.update(f"{values.numpy().dtype}{tuple(values.shape)}".encode())
        for block in values.split(_BLOCK) if values.ndim else (values,):
            digest.update(block.contiguous().numpy().data.cast("B") if block.numel() else b"")
    return digest.hexdigest()
