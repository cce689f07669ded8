"""Select the rows of each batch in a search: shuffled, or as the user's loader draws them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

from tikhon.data.batches import pair, visits_rows_once
from tikhon.data.stream import Stream
from tikhon.errors import DataError
from tikhon.regularizer.audit import warn

_READ = 256  # batch size for reading a whole data set


@dataclass(frozen=True, eq=False)
class Draws:
    """A stream of batches of row indices.

    `loader` draws indices as the user's own draws rows; `positions` has the position of each index
    among the training rows, -1 if held out.
    """

    rows: int
    size: int
    seed: int
    loader: DataLoader[Any] | None = None
    positions: Tensor | None = None

    @property
    def batches(self) -> int:
        """Batches in an epoch."""
        count = self._stream().batches
        assert count is not None
        return count

    def epoch(self, number: int) -> list[Tensor]:
        """Return the row indices of each batch of an epoch."""
        found = [rows for rows, _ in self._stream().epoch(number)]
        if self.positions is None:
            return found
        drawn = (self.positions[rows] for rows in found)
        batches = [rows[rows >= 0] for rows in drawn]  # without those held out
        return [rows for rows in batches if len(rows) > 1]  # batch normalisation needs two rows

    def _stream(self) -> Stream:
        indices = torch.arange(self.rows)
        data = (indices, indices) if self.loader is None else self.loader
        return Stream(data, size=self.size, seed=self.seed)


def read(train: Any, *, name: str = "train") -> tuple[Any, Tensor, DataLoader[Any] | None]:
    """Read any supported form of data; return (inputs, targets, loader of row indices).

    The loader is None if rows are only shuffled. Warns of a data set whose rows vary between
    reads; raises `DataError` for a custom sampler where the collation multiplies rows.
    """
    _warn_of_random_rows(train)
    if not isinstance(train, DataLoader) or isinstance(train.dataset, IterableDataset):
        return (*pair(train, name=name), None)
    if _shuffles(train) or train.batch_sampler is None:
        return (*pair(train, name=name), None)
    rows: Any = train.dataset
    loader = DataLoader(rows, _READ, collate_fn=train.collate_fn, num_workers=train.num_workers)
    x, y = pair(loader, name=name)
    if len(y) != len(rows):
        if visits_rows_once(train):
            return x, y, None
        kind = type(train.sampler).__name__
        raise DataError(
            f"{name}: the loader draws {len(rows)} rows by {kind}, but its collate_fn makes "
            f"{len(y)} of them: give the rows, or a loader that shuffles"
        )
    return x, y, _index_loader(train, len(y))


def batch_size_of(train: Any) -> int | None:
    """Return the batch size of a loader."""
    if not isinstance(train, DataLoader):
        return None
    if train.batch_size is not None:
        return train.batch_size
    size = getattr(train.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) else None


def _shuffles(loader: DataLoader[object]) -> bool:
    """Return whether a loader visits every row once in unseeded random order."""
    sampler = loader.sampler
    seeded = loader.generator is not None or getattr(sampler, "generator", None) is not None
    return (
        visits_rows_once(loader)
        and type(sampler) is RandomSampler
        and not loader.drop_last
        and not seeded
    )


def _index_loader(loader: DataLoader[object], rows: int) -> DataLoader[Any]:
    """Return a loader of row indices that draws as `loader` does."""
    indices = TensorDataset(torch.arange(rows), torch.arange(rows))
    if type(loader.batch_sampler) is BatchSampler and loader.batch_size is not None:
        return DataLoader(
            indices,
            loader.batch_size,
            sampler=loader.sampler,
            drop_last=loader.drop_last,
            generator=loader.generator,
        )
    return DataLoader(indices, batch_sampler=loader.batch_sampler, generator=loader.generator)


def _warn_of_random_rows(train: Any) -> None:
    """Warn of random augmentation, as rows are read only once."""
    data = train.dataset if isinstance(train, DataLoader) else train
    if not isinstance(data, Dataset) or isinstance(data, IterableDataset | TensorDataset):
        return
    with torch.random.fork_rng(devices=[]):
        first, second = _first_row(data), _first_row(data)
    if first is not None and second is not None and not torch.equal(first, second):
        warn(
            f"tune reads its rows once, and those of {type(data).__name__} differ each time they "
            "are read: every epoch sees the same draw of that augmentation; augment in the model, "
            "or search without it"
        )


def _first_row(data: Any) -> Tensor | None:
    try:
        item = data[0]
        value = next(iter(item.values())) if isinstance(item, dict) else item[0]
        return torch.as_tensor(value)
    except (TypeError, ValueError, IndexError, KeyError, StopIteration):
        return None
