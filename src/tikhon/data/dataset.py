"""The data set returned by every source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

    from tikhon.data.column import Column
    from tikhon.languages import Sentence

Task = Literal["classification", "regression"]
_BLOCK = 10_000  # rows hashed at a time


@dataclass(frozen=True, eq=False)
class Table:
    """The columns of a table and how to split it; the data set's `x` holds their encoded cells."""

    columns: tuple[Column, ...]  # those in x, in order
    dropped: tuple[Column, ...]
    target: Column
    groups: np.ndarray | None = None  # (rows,) group index
    times: np.ndarray | None = None  # (rows,)

    def take(self, rows: np.ndarray) -> Table:
        """Return the table restricted to these rows."""
        groups, times = (None if v is None else v[rows] for v in (self.groups, self.times))
        return replace(self, groups=groups, times=times)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows to learn from: `x` (rows, ...) float, `y` (rows,) int64 classes or float targets.

    `scale` asks for standardisation with statistics of the training part; images are already in
    [0, 1]. `unit` is the standard deviation of a standardised target. `test` holds the source's
    own test rows. With a `table`, `x` holds encoded cells (NaN where missing) until `split` fits
    the preprocessing on the training part. `notices` are messages for the user about the data.
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
        """Number of model outputs: one for each class or target column."""
        return len(self.classes) or (self.y.shape[1] if self.y.ndim > 1 else 1)

    def take(self, rows: Tensor) -> Dataset:
        """Return the rows at these indices, without the source's test part."""
        table = None if self.table is None else self.table.take(rows.numpy())
        return replace(self, x=self.x[rows], y=self.y[rows], test=None, table=table)

    def fingerprint(self) -> str:
        """Return the SHA-256 of shapes and values, to check that a run resumes on its data."""
        parts = [self] if self.test is None else [self, self.test]
        return fingerprint(*(values for part in parts for values in (part.x, part.y)))


def fingerprint(*tensors: Tensor) -> str:
    """Return the SHA-256 of the dtypes, shapes and values of tensors."""
    digest = hashlib.sha256()
    for values in tensors:
        values = values.detach().cpu()
        digest.update(f"{values.numpy().dtype}{tuple(values.shape)}".encode())
        for block in values.split(_BLOCK) if values.ndim else (values,):
            digest.update(block.contiguous().numpy().data.cast("B") if block.numel() else b"")
    return digest.hexdigest()
