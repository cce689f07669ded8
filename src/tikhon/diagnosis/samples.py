"""Batches of the user's data, unchanged, and one fixed batch to measure on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.data.batches import count_rows, open_data, order, slices
from tikhon.data.nested import (
    TARGET_NAMES,
    Batch,
    NamedInputs,
    batch_length,
    concatenate,
    split_batch,
    take_rows,
    tensors,
)
from tikhon.errors import DataError, InputError

MAX_SEARCHED = 500  # batches of a loader read in search of another target value


@dataclass(frozen=True)
class Samples:
    """A source of training batches, and one fixed batch to measure on."""

    probe: Batch
    source: Any  # (inputs, target) to index, or an iterable of batches
    rows: int
    indexed: bool
    batch: int | None = None  # rows per batch of a loader

    def stream(self, size: int, seed: int) -> Iterator[Batch]:
        """Yield batches endlessly: shuffled epochs of a pair, or repeated passes of the loader.

        In the order of `Stream`, which itself rejects data that a diagnosis has to handle:
        non-finite numbers, inputs without targets.
        """
        if not self.indexed:
            while True:
                for batch in self.source:
                    yield split_batch(batch)
        for epoch in itertools.count():
            shuffled = order(self.rows, seed=seed, epoch=epoch)
            for rows in slices(shuffled, min(size, self.rows)):
                yield take_rows(self.source, rows)

    def with_rows(self, limit: int) -> Samples | None:
        """Return the same with rows to index: the first ones of a loader; None if they differ."""
        if self.indexed:
            return self
        batches: list[Batch] = []
        for batch in self.source:
            batches.append(split_batch(batch))
            if sum(map(batch_length, batches)) >= limit:
                break
        try:
            rows = concatenate(batches)
        except (RuntimeError, TypeError):  # batches of unequal shapes
            return None
        return Samples(self.probe, rows, batch_length(rows), True, self.batch)


def samples(data: object, *, rows: int = 256, name: str = "data") -> Samples:
    """Open a pair, a loader, one batch, a path or a source name.

    Raises:
        DataError: if there are no rows, or inputs and targets differ in number.
    """
    source, batches = open_data(data, name)
    if batches is not None:
        return _from_loader(batches, rows, name)
    assert source is not None
    count = count_rows(source, name)
    some = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:rows]
    return Samples(take_rows(source, some.sort().values), source, count, True)


def _from_loader(loader: Iterable[object], rows: int, name: str) -> Samples:
    parts: list[Batch] = []
    count = 0
    iterator = iter(loader)
    for batch in iterator:
        parts.append(split_batch(batch, name))
        count += batch_length(parts[-1])
        if count >= rows:
            break
    if not parts:
        raise DataError(f"{name}: the loader gave no batch")
    if iterator is not loader:
        parts += read_other_targets(iterator, parts)
    if iterator is loader:
        # an iterator is exhausted after one pass: train on what was read
        return Samples(concatenate(parts), concatenate(parts), count, True, batch_length(parts[0]))
    try:
        joined = concatenate(parts)
    except (RuntimeError, TypeError):  # batches of unequal shapes: sequences without padding
        joined = parts[0]
    return Samples(joined, loader, count, False, batch_length(parts[0]))


def read_other_targets(iterator: Iterator[object], parts: Sequence[Batch]) -> list[Batch]:
    """Read as many batches again from the next other target on, if all targets so far are equal.

    Rows may be sorted. Returns nothing if no other target occurs within `MAX_SEARCHED` batches.
    """
    if not _has_one_target(parts):
        return []
    following = map(split_batch, itertools.islice(iterator, MAX_SEARCHED))
    others = itertools.dropwhile(lambda batch: _has_one_target([parts[0], batch]), following)
    return list(itertools.islice(others, len(parts)))


def _has_one_target(parts: Sequence[Batch]) -> bool:
    targets = [target for _, target in parts]
    if not all(isinstance(target, Tensor) and target.numel() for target in targets):
        return False
    return all(bool((target == targets[0].flatten()[0]).all()) for target in targets)


def check_target(batch: Batch) -> None:
    """Raise `DataError` if a batch has no target for `loss(output, target)`."""
    inputs, target = batch
    if target is None:
        found = f"names {', '.join(inputs)}" if isinstance(inputs, NamedInputs) else "inputs alone"
        raise DataError(
            f"data: (inputs, target) is needed, or names with one of {', '.join(TARGET_NAMES)}, "
            f"received {found}; a loss that needs no target is given as loss(model, batch)"
        )


def check_devices(model: nn.Module, batch: Batch) -> None:
    """Raise `InputError` if model and batch are on different devices."""
    devices = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    for tensor in tensors(batch):
        if devices and tensor.device not in devices:
            raise InputError(
                f"the model is on {', '.join(sorted(map(str, devices)))} but the data on "
                f"{tensor.device}; move one of them with .to(device)"
            )
