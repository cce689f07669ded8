"""Batch number k of any data, so that whoever reads it can stop and continue anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from tikhon.data.batches import order, pair


class Stream:
    """An endless, shuffled stream of batches (inputs, targets), addressed by number.

    Data in memory (tensors, arrays, a path) and loaders over an indexable data set are read by
    index, so batch `k` is the same whenever it is asked for. A loader over an iterable data set
    can only be read onwards, again and again from its start.

    Args:
        data: whatever `tikhon.data.batches.pair` takes, or a DataLoader (never read whole).
        size: rows of a batch; a loader's own batch size goes first.
        seed: of the order of the rows.

    >>> x, y = torch.arange(6.0)[:, None], torch.arange(6)
    >>> stream = Stream((x, y), size=4)
    >>> len(stream.batch(0)[0]), torch.equal(stream.batch(7)[1], stream.batch(7)[1])
    (4, True)
    """

    def __init__(self, data: Any, *, size: int = 64, seed: int = 0) -> None:
        self._loader: DataLoader[Any] | None = None
        self._pair: tuple[Tensor, Tensor] | None = None
        self._onwards: Iterator[Any] | None = None
        self.rows = 0
        if not isinstance(data, DataLoader):
            self._pair = pair(data, name="valid")
            self.rows = len(self._pair[0])
        else:
            self._loader = data
            if not isinstance(data.dataset, IterableDataset):
                self.rows = len(data.dataset)  # type: ignore[arg-type]
                size = data.batch_size or size
        self.size = min(size, self.rows) if self.rows else size
        self.seed = seed
        self._order = (-1, torch.empty(0, dtype=torch.long))

    def batch(self, k: int) -> tuple[Any, Any]:
        """Batch number `k`, counted from 0."""
        if not self.rows:
            return self._read_onwards()
        if self._pair is not None and self.size == self.rows:
            return self._pair  # one batch holds all rows: their order says nothing
        rows = self._rows(k)
        if self._pair is not None:
            return self._pair[0][rows], self._pair[1][rows]
        assert self._loader is not None and self._loader.collate_fn is not None
        items = [self._loader.dataset[i] for i in rows.tolist()]
        return cast("tuple[Any, Any]", self._loader.collate_fn(items))

    def _rows(self, k: int) -> Tensor:
        each = max(1, self.rows // self.size)
        epoch, place = divmod(k, each)
        if self._order[0] != epoch:
            self._order = (epoch, order(self.rows, seed=self.seed, epoch=epoch))
        return self._order[1][place * self.size : (place + 1) * self.size]

    def _read_onwards(self) -> tuple[Any, Any]:
        assert self._loader is not None
        if self._onwards is None:
            self._onwards = iter(self._loader)
        batch = next(self._onwards, None)
        if batch is None:
            self._onwards = iter(self._loader)
            batch = next(self._onwards)
        return batch[0], batch[1]
