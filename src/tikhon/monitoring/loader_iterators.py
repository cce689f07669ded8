"""Iterators over a loader that a loop holds: batches kept for good, epochs that begin again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from tikhon.monitoring.alarms import Alarm, alarm

MIN_EPOCHS = 2  # after which a cycle has gone round
MIN_ENDED = 3  # iterators that were followed to their end
MAX_SHARE = 0.5  # of the batches of a loader: the others are never read


@dataclass
class ShuffledCycle:
    """A cycle over a loader that shuffles, and the forwards when it was first seen."""

    name: str
    batches: int
    is_fixed: bool  # its rows are tensors: only their order is kept
    forwards: int
    repeats: bool = False  # it has come to its end, and gives what it has kept


@dataclass
class OrderedIterator:
    """An iterator over a loader in order, which gives one batch a step."""

    name: str
    reference: weakref.ref[Any]
    batches: int
    yielded: int


class LoaderIterators:
    """Cycles that keep what a loader gave them, and iterators that are left after few batches."""

    def __init__(self) -> None:
        self._cycles: dict[int, ShuffledCycle] = {}
        self._current: OrderedIterator | None = None
        self._abandoned: list[OrderedIterator] = []  # in a row, each after as many batches

    def find(self, cycles: Mapping[str, Any], iterators: Mapping[str, Any], forwards: int) -> None:
        """Look at what the loop holds."""
        for name, cycle in cycles.items():
            referents = gc.get_referents(cycle)
            source = next((r for r in referents if isinstance(r, _BaseDataLoaderIter)), None)
            known = self._cycles.get(id(cycle))
            if source is None and known is not None:
                lengths = [len(r) for r in referents if type(r) is list]
                has_ended = forwards - known.forwards > MIN_EPOCHS * known.batches
                known.repeats = has_ended and lengths == [known.batches]
            elif source is not None and known is None and _shuffles(source):
                is_fixed = isinstance(source._dataset, TensorDataset)
                new = ShuffledCycle(name, _batches(source), is_fixed, forwards)
                self._cycles[id(cycle)] = new
        if self._current is None:
            self._current = next(_sequential_iterators(iterators), None)

    @property
    def is_counting(self) -> bool:
        """Whether there is an iterator to follow."""
        return self._current is not None

    def count_batch(self) -> bool:
        """Follow the iterator by one more batch, if there is one; whether there still is."""
        current = self._current
        if current is None:
            return False
        iterator = current.reference()
        if iterator is None:
            is_equal = self._abandoned and self._abandoned[-1].yielded == current.yielded
            self._abandoned = [*(self._abandoned if is_equal else ()), current][-MIN_ENDED:]
            self._current = None
        elif iterator._num_yielded == current.yielded + 1:
            current.yielded += 1
        else:  # it is read by something else, or starts again
            self._current, self._abandoned = None, []
        return self.is_counting

    def alarms(self) -> Iterator[Alarm]:
        """What is read again and again."""
        for cycle in self._cycles.values():
            if cycle.repeats and cycle.batches > 1:
                severity, names = "info" if cycle.is_fixed else "warning", (cycle.name,)
                code, count = "same_order_every_epoch", cycle.batches
                yield alarm(code, key="cycle", where=names, severity=severity, count=count)
        last = self._abandoned[-1] if len(self._abandoned) == MIN_ENDED else None
        if last is not None and last.yielded <= MAX_SHARE * last.batches:
            read, count = last.yielded, last.batches
            yield alarm("same_rows_every_epoch", where=(last.name,), read=read, count=count)


def _sequential_iterators(iterators: Mapping[str, Any]) -> Iterator[OrderedIterator]:
    for name, iterator in iterators.items():
        if type(_sampler(iterator)) is SequentialSampler:
            reference = weakref.ref(iterator)
            yield OrderedIterator(name, reference, _batches(iterator), iterator._num_yielded)


def _sampler(iterator: Any) -> Any:
    """What gives the numbers of the rows; none of a stream."""
    return getattr(getattr(iterator, "_index_sampler", None), "sampler", None)


def _batches(iterator: Any) -> int:
    return len(iterator._index_sampler)


def _shuffles(iterator: Any) -> bool:
    return isinstance(_sampler(iterator), RandomSampler)
