"""Iterators over a loader that a loop holds: batches kept for good, epochs that begin again."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter

from tikhon.monitoring.laws import Alarm

EPOCHS = 2  # after which a cycle has gone round
ENDED = 3  # iterators that were followed to their end
FEW = 0.5  # of the batches of a loader: the others are never read


@dataclass
class Cycle:
    """A cycle over a loader that shuffles, and the forwards when it was first seen."""

    name: str
    batches: int
    fixed: bool  # its rows are tensors: only their order is kept
    forwards: int
    round: bool = False  # it has come to its end, and gives what it has kept


@dataclass
class Reader:
    """An iterator over a loader in order, which gives one batch a step."""

    name: str
    what: weakref.ref[Any]
    batches: int
    given: int


class Readers:
    """Cycles that keep what a loader gave them, and iterators that are left after few batches."""

    def __init__(self) -> None:
        self._cycles: dict[int, Cycle] = {}
        self._followed: Reader | None = None
        self._ended: list[Reader] = []  # in a row, each after as many batches

    def find(self, cycles: Mapping[str, Any], iterators: Mapping[str, Any], forwards: int) -> None:
        """Look at what the loop holds."""
        for name, cycle in cycles.items():
            held = gc.get_referents(cycle)
            inside = next((h for h in held if isinstance(h, _BaseDataLoaderIter)), None)
            known = self._cycles.get(id(cycle))
            if inside is not None and isinstance(_sampler(inside), RandomSampler):
                fixed = isinstance(inside._dataset, TensorDataset)
                if known is None:
                    new = Cycle(name, _batches(inside), fixed, forwards)
                    self._cycles[id(cycle)] = new
            elif inside is None and known is not None:
                kept = [h for h in held if type(h) is list]
                over = forwards - known.forwards > EPOCHS * known.batches
                known.round = over and [len(k) for k in kept] == [known.batches]
        if self._followed is None:
            self._followed = next(_in_order(iterators), None)

    @property
    def follows(self) -> bool:
        """Whether there is an iterator to follow."""
        return self._followed is not None

    def follow(self) -> bool:
        """Follow the iterator by one more batch, if there is one; whether there still is."""
        followed = self._followed
        if followed is None:
            return False
        reader = followed.what()
        if reader is None:
            same = self._ended and self._ended[-1].given == followed.given
            self._ended = [*(self._ended if same else ()), followed][-ENDED:]
            self._followed = None
        elif reader._num_yielded == followed.given + 1:
            followed.given += 1
        else:  # it is read by something else, or starts again
            self._followed, self._ended = None, []
        return self.follows

    def alarms(self) -> Iterator[Alarm]:
        """What is read again and again."""
        for cycle in self._cycles.values():
            if cycle.round and cycle.batches > 1:
                lost = "in one order" if cycle.fixed else "as they were drawn in the first epoch"
                yield Alarm(
                    "same_order_every_epoch",
                    0,
                    f"the cycle keeps the {cycle.batches} batches of a loader that shuffles: they "
                    f"come again {lost}",
                    "draw anew: `while True: yield from loader` in a function",
                    (cycle.name,),
                    "info" if cycle.fixed else "warning",
                )
        if len(self._ended) == ENDED and self._ended[-1].given <= FEW * self._ended[-1].batches:
            last = self._ended[-1]
            yield Alarm(
                "same_rows_every_epoch",
                0,
                f"the iterator is made anew after {last.given} of {last.batches} batches, and the "
                "loader does not shuffle: the other rows are never read",
                "keep the iterator until it ends, or give the loader shuffle=True",
                (last.name,),
            )


def _in_order(iterators: Mapping[str, Any]) -> Iterator[Reader]:
    for name, reader in iterators.items():
        if type(_sampler(reader)) is SequentialSampler:
            yield Reader(name, weakref.ref(reader), _batches(reader), reader._num_yielded)


def _sampler(reader: Any) -> Any:
    """What gives the numbers of the rows; none of a stream."""
    return getattr(getattr(reader, "_index_sampler", None), "sampler", None)


def _batches(reader: Any) -> int:
    return len(reader._index_sampler)
