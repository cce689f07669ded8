"""A stream of batches from any data, addressed by batch number so that training can resume."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from tikhon.data.batches import mix_seeds, open_data, order, pair, slices, visits_rows_once
from tikhon.data.nested import (
    Batch,
    batch_length,
    map_tensors,
    slice_rows,
    split_batch,
    take_rows,
    to_device,
)
from tikhon.errors import DataError

_MAX_SAMPLE = 2**26  # values in a sample of a loader's rows, held in memory


class Stream:
    """An endless stream of batches (inputs, targets), addressed by number or by epoch.

    Batch `k` is a function of the data, the seed and `k`. Rows in memory and data sets with a
    length are reshuffled each epoch and split by `slices`. A loader over a data set with a length
    keeps its batch size, sampler, collation and workers; its torch random numbers (order,
    augmentation) are seeded by seed and epoch. Other iterables are only read forward, restarting
    at the end; an iterator is read completely first, as it cannot restart.

    Args:
        data: anything `tikhon.data.batches.pair` takes; a loader is never read completely.
        size: batch size; a loader's own takes precedence.
        seed: of the row order.
        name: of the data, for errors.

    >>> x, y = torch.arange(6.0)[:, None], torch.arange(6)
    >>> stream = Stream((x, y), size=4)
    >>> len(stream.batch(0)[0]), torch.equal(stream.batch(7)[1], stream.batch(7)[1])
    (4, True)
    """

    def __init__(self, data: Any, *, size: int = 64, seed: int = 0, name: str = "data") -> None:
        self.seed, self.name = seed, name
        self.held: Batch | None = None  # rows in memory
        self._loader: Any = None
        self._place = (-1, -1)
        self._open: Iterator[Batch] = iter(())
        batch, source = open_data(data, name)
        self._cuts = source is not data  # a loader makes its own batches
        if batch is not None or isinstance(source, Iterator) or _is_plain_shuffle(source):
            self.held = pair(data, name=name)
            self.rows = batch_length(self.held)
        else:
            self._loader = source
            known = (
                isinstance(source, DataLoader)
                and source.batch_sampler is not None  # otherwise its items are batches
                and not isinstance(source.dataset, IterableDataset)
            )
            self.rows = len(cast(DataLoader, source).dataset) if known else 0  # type: ignore[arg-type]
        if not self._cuts:
            size = getattr(source, "batch_size", None) or size
        self.size = min(size, self.rows) if self.rows else size

    @property
    def batches(self) -> int | None:
        """Batches in an epoch; None if unknown before reading."""
        if self.held is not None or (self.rows and self._cuts):
            return self._number_of_cuts
        return len(self._loader) if self.rows else None

    @cached_property
    def _number_of_cuts(self) -> int:
        return len(self._cut(torch.empty(self.rows)))

    def _cut(self, shuffled: Tensor) -> Sequence[Tensor]:
        return slices(shuffled, self.size) if self._cuts else shuffled.split(self.size)

    def to(self, device: torch.device) -> Stream:
        """Move rows held in memory to a device; returns the stream."""
        if self.held is not None:
            self.held = to_device(self.held, device)
        return self

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of an epoch from batch `start`."""
        if self.held is None:
            return itertools.islice(self._read(number), start, None)
        shuffled = order(self.rows, seed=self.seed, epoch=number)
        shuffled = shuffled.to(cast(Tensor, self.held[1]).device)
        return (take_rows(self.held, rows) for rows in self._cut(shuffled)[start:])

    def batch(self, k: int) -> Batch:
        """Return batch number `k`, counted from 0 over all epochs."""
        count = self.batches
        if count is None:
            return self._onwards()
        epoch, place = divmod(k, count)
        if self._place != (epoch, place):
            self._open = self.epoch(epoch, place)
        self._place = divmod(k + 1, count)
        found = next(self._open)
        if self._place[0] != epoch:
            self._place = (-1, -1)  # end of the epoch: reopen for the next
        return found

    def first(self) -> Batch:
        """Return batch 0; it is put back where batches are only read forward."""
        found = self.batch(0)
        if self.batches is None:
            self._open = itertools.chain((found,), self._open)
        return found

    def sample(self, most: int) -> tuple[Any, Tensor]:
        """Return at most `most` evenly spaced rows, for a loader from its data set."""
        if self.held is not None:
            every = 1 + (self.rows - 1) // most
            return cast("tuple[Any, Tensor]", slice_rows(self.held, slice(None, None, every)))
        assert self.rows
        rows = self._loader.dataset
        probe = pair(self._gathered(rows, range(min(2, self.rows))), name=self.name)
        cells: list[int] = []
        map_tensors(probe, lambda part: cells.append(part[0].numel()) or part)
        most = max(2, min(most, _MAX_SAMPLE // max(1, sum(cells))))
        every = 1 + (self.rows - 1) // most
        return pair(self._gathered(rows, range(0, self.rows, every)), name=self.name)

    def _gathered(self, rows: Any, chosen: range) -> DataLoader[object]:
        return DataLoader(
            Subset(rows, chosen),
            self._loader.batch_size or 64,
            collate_fn=self._loader.collate_fn,
            num_workers=self._loader.num_workers,
        )

    def _read(self, epoch: int) -> Iterator[Batch]:
        """Iterate over the loader's batches, seeding its random numbers by (seed, epoch)."""
        state = torch.Generator().manual_seed(mix_seeds(self.seed, epoch)).get_state()
        loader = self._loader
        if self._cuts:
            shuffled = order(self.rows, seed=self.seed, epoch=epoch)
            cuts = [rows.tolist() for rows in self._cut(shuffled)]
            loader = DataLoader(loader.dataset, batch_sampler=cuts)
        cutter = getattr(loader, "batch_sampler", None)
        parts: list[Any] = [loader, getattr(loader, "sampler", None), cutter]
        parts.append(getattr(cutter, "sampler", None))
        for part in parts:
            if getattr(part, "generator", None) is not None:
                part.generator.manual_seed(mix_seeds(self.seed, epoch))
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        batches = None
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(state)
                batches = iter(loader) if batches is None else batches
                batch = next(batches, None)
                state = torch.get_rng_state()
            if batch is None:
                return
            yield self._whole(batch)

    def _onwards(self) -> Batch:
        batch = next(self._open, None)
        if batch is None:
            self._open = map(self._whole, iter(self._loader))
            batch = next(self._open, None)
        if batch is None:
            raise DataError(f"{self.name}: the loader gave no batch")
        return batch

    def _whole(self, batch: Any) -> Batch:
        inputs, target = split_batch(batch, self.name)
        if not isinstance(target, Tensor):
            raise DataError(f"{self.name}: batches of (inputs, target) are needed")
        return inputs, target


def _is_plain_shuffle(source: object) -> bool:
    """Return whether indexing a loader's tensors in shuffled order equals reading the loader."""
    return (
        isinstance(source, DataLoader)
        and type(source.dataset) is TensorDataset
        and type(source.sampler) is RandomSampler
        and source.collate_fn is default_collate
        and visits_rows_once(source)
        and not (source.drop_last or source.generator or source.sampler.generator)
    )
