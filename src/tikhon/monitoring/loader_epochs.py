"""Epochs of the loaders that a loop reads: cut short, in the same order, or kept for good."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torch.utils.data.distributed import DistributedSampler

from tikhon.monitoring.alarms import Alarm, alarm
from tikhon.monitoring.hooks import CallHook

MIN_EPOCHS = 2  # after which a cycle has gone round
MIN_ALIKE = 3  # epochs in a row that ended or began alike
MAX_LOADERS = 16  # that are followed, the newest ones
MAX_SHARE = 0.9  # of the batches of a loader: the others are never read

# every new iterator, and those of workers that stay for the next epoch
_HOOKS = (
    CallHook(_BaseDataLoaderIter, "__init__", "begin_epoch"),
    CallHook(_BaseDataLoaderIter, "_reset", "begin_epoch_again"),
)


@dataclass
class LoaderEpochs:
    """Epochs of one loader: how many batches were read, and from which state rows are drawn."""

    sampler: Any
    batches: int
    reads: list[int] = field(default_factory=list)  # of the last epochs
    orders: list[object] = field(default_factory=list)  # equal where the order is
    count: int = 0  # epochs that are over
    is_trained_on: bool = False  # batches are read between steps
    # attributes of the open iterator, which outlive it and do not keep its workers
    iterator: Mapping[str, Any] = field(default_factory=dict)
    first_seen: int = 0  # batches read at its first sampled step

    def observe(self) -> None:
        """A step is sampled."""
        self.first_seen = self.first_seen or self.iterator.get("_num_yielded", 0)

    def begin(self, iterator: Mapping[str, Any], order: object) -> None:
        """The epoch before is over."""
        if self.iterator:
            self.end()
        self.iterator, self.first_seen = iterator, 0
        self.orders = [*self.orders, order][-MIN_ALIKE:]

    def end(self) -> None:
        """No more is read in this epoch."""
        read = self.iterator.get("_num_yielded", 0)
        self.is_trained_on = self.is_trained_on or 0 < self.first_seen < read
        self.reads, self.iterator = [*self.reads, read][-MIN_ALIKE:], {}
        self.count += 1

    def alarms(self, name: str) -> Iterator[Alarm]:
        """What is the same in the last epochs."""
        if not self.is_trained_on or self.batches < 2:
            return
        where = (name,) if name else ()
        is_cut = len(self.reads) == MIN_ALIKE and self.reads[0] <= MAX_SHARE * self.batches
        if type(self.sampler) is SequentialSampler and is_cut and len({*self.reads}) == 1:
            read, count = self.reads[0], self.batches
            yield alarm("same_rows_every_epoch", where=where, read=read, count=count)
        if len(self.orders) == MIN_ALIKE and None not in self.orders and len({*self.orders}) == 1:
            is_split = isinstance(self.sampler, DistributedSampler)
            key = "epoch_not_set" if is_split else "shuffle_rewound"
            yield alarm("same_order_every_epoch", key=key, where=where)


@dataclass
class ShuffledCycle:
    """A cycle over a loader that shuffles, and the forwards when it was first seen."""

    name: str
    batches: int
    is_fixed: bool  # its rows are tensors: only their order is kept
    forwards: int
    repeats: bool = False  # it has come to its end, and gives what it has kept


class Loaders:
    """The loaders that are read while this is open, and the cycles that a loop holds."""

    def __init__(self) -> None:
        self._cycles: dict[int, ShuffledCycle] = {}
        self._epochs: dict[int, LoaderEpochs] = {}  # by identity of the sampler
        self._names: dict[int, str] = {}
        for hook in _HOOKS:
            hook.add(self)

    @property
    def epochs(self) -> int:
        """Epochs that are over, of the loader that is trained on."""
        return max((e.count for e in self._epochs.values() if e.is_trained_on), default=0)

    def close(self) -> None:
        """Take the hooks off."""
        for hook in _HOOKS:
            hook.remove(self)
        for epochs in self._epochs.values():
            if epochs.iterator:
                epochs.end()

    def begin_epoch(self, iterator: Any, loader: DataLoader[object], *rest: object) -> None:
        """A loader is read from its beginning."""
        sampler, count = loader.sampler, 0
        with suppress(TypeError):  # a stream has no length
            count = len(loader)
        if count:
            epochs = self._epochs.setdefault(id(sampler), LoaderEpochs(sampler, count))
            epochs.begin(vars(iterator), _order(loader))
            if len(self._epochs) > MAX_LOADERS:
                del self._epochs[next(iter(self._epochs))]

    def begin_epoch_again(self, iterator: Any, loader: DataLoader[object], *first: bool) -> None:
        """The same iterator starts again; also called while it is made."""
        if not any(first):
            self.begin_epoch(iterator, loader)

    def find(
        self, loaders: Mapping[str, DataLoader[object]], cycles: Mapping[str, Any], forwards: int
    ) -> None:
        """Look at what the loop holds."""
        self._names |= {id(v.sampler): name for name, v in loaders.items()}
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
                count = len(source._index_sampler)  # pyright: ignore[reportArgumentType]
                self._cycles[id(cycle)] = ShuffledCycle(name, count, is_fixed, forwards)

    def observe(self) -> None:
        """A step is sampled."""
        for epochs in self._epochs.values():
            epochs.observe()

    def alarms(self) -> Iterator[Alarm]:
        """What is read again and again."""
        for cycle in self._cycles.values():
            if cycle.repeats and cycle.batches > 1:
                severity, names = "info" if cycle.is_fixed else "warning", (cycle.name,)
                code, count = "same_order_every_epoch", cycle.batches
                yield alarm(code, key="cycle", where=names, severity=severity, count=count)
        for key, epochs in self._epochs.items():
            yield from epochs.alarms(self._names.get(key, ""))


def _order(loader: DataLoader[object]) -> object:
    """The state from which the order of the rows is drawn; None where they are not shuffled."""
    sampler = loader.sampler
    if isinstance(sampler, DistributedSampler):
        return sampler.epoch if sampler.shuffle else None
    if not isinstance(sampler, RandomSampler):
        return None
    generator = sampler.generator or torch.default_generator
    return hash(generator.get_state().numpy().tobytes())


def _shuffles(iterator: Any) -> bool:
    return isinstance(getattr(iterator._index_sampler, "sampler", None), RandomSampler)
