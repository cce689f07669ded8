"""Schedules of the learning rate and orders of the rows, as the loop holds and moves them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from tikhon.monitoring.laws import Alarm

EPOCHS = 2  # after which what is done once an epoch has been seen
OVER = 3  # times its length, after which a cosine has come back
AGAIN = 3  # times a warm-up began again
BETTER = 3  # best values, one after another, of a plateau that is moved once an epoch
EVERY = 10  # steps and more between two moves of it
NEAR = 0.2  # relative: a length in steps is that of the loop


@dataclass
class Seen:
    """A schedule or a sampler with its count when it was first seen, and the forwards before."""

    name: str
    what: weakref.ref[Any]
    count: int
    forwards: int


@dataclass
class Rates:
    """How the learning rate went from step to step."""

    first: float | None = None
    last: float = math.nan
    rises: int = 0
    falls: int = 0  # to anything but the first rate
    again: int = 0  # back to the first rate

    def add(self, rate: float) -> None:
        """That of a step, where it is another than that of the step before."""
        if self.first is None:
            self.first = rate
        self.rises += rate > self.last
        if rate < self.last:
            self.again += math.isclose(rate, self.first, rel_tol=1e-6)
            self.falls += not math.isclose(rate, self.first, rel_tol=1e-6)
        self.last = rate

    def alarms(self, steps: int) -> Iterator[Alarm]:
        """A rate that rises nearly always, and goes back to where it began."""
        if self.again >= AGAIN and not self.falls and self.rises >= 0.8 * steps:
            yield Alarm(
                "warmup_begins_again",
                0,
                f"the learning rate rises in nearly every step and went back to its first value, "
                f"{self.first:.2g}, {self.again} times: no step gets beyond the warm-up",
                "count the steps of all epochs: epoch * len(loader) + step",
            )


class Schedules:
    """Schedules that belong to another optimizer, never move or end too early; equal epochs."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._schedulers: dict[int, Seen] = {}
        self._samplers: dict[int, Seen] = {}
        self._epoch: dict[int, int] = {}  # batches of a loader by id of the sampler
        self._batches = 0  # of the longest loader
        self._warm = Rates()
        self._best: dict[int, list[float]] = {}  # of a plateau, by id
        self._moved: dict[int, int] = {}  # how often that was moved

    def find(
        self,
        schedulers: Mapping[str, LRScheduler],
        loaders: Mapping[str, DataLoader[object]],
        forwards: int,
    ) -> None:
        """Look at what the loop holds."""
        for name, scheduler in schedulers.items():
            new = Seen(name, weakref.ref(scheduler), scheduler.last_epoch, forwards)
            self._schedulers.setdefault(id(scheduler), new)
        for name, loader in loaders.items():
            try:
                length = len(loader)
            except TypeError:  # of an iterable without a length
                continue
            self._batches = max(self._batches, length)
            sampler = loader.sampler
            if isinstance(sampler, DistributedSampler) and sampler.shuffle:
                self._samplers.setdefault(
                    id(sampler), Seen(name, weakref.ref(sampler), sampler.epoch, forwards)
                )
                self._epoch[id(sampler)] = length

    def rated(self, rate: float) -> None:
        """The learning rate of the first group is another now."""
        self._warm.add(rate)

    def look(self) -> None:
        """Read the best value of each plateau."""
        for _, plateau in self._mine():
            if isinstance(plateau, ReduceLROnPlateau):
                seen = self._best.setdefault(id(plateau), [])
                if math.isfinite(plateau.best) and plateau.best not in seen[-1:]:
                    seen.append(plateau.best)
                self._moved[id(plateau)] = plateau.last_epoch

    def learned(self, steps: int) -> bool:
        """Whether several epochs, one after another, were the best of a plateau."""
        return any(
            len(seen) > BETTER and self._moved[key] * EVERY <= steps
            for key, seen in self._best.items()
        )

    def alarms(self, steps: int, forwards: int, *, ended: bool) -> list[Alarm]:
        """What is wrong with them so far."""
        return [
            *self._foreign(),
            *self._idle(forwards, ended),
            *self._slow(steps, ended),
            *self._overrun(),
            *self._equal(forwards),
            *self._warm.alarms(steps),
        ]

    def _foreign(self) -> Iterator[Alarm]:
        """A schedule of an optimizer of the same tensors that makes no steps."""
        mine = {id(p) for g in self._optimizer.param_groups for p in g["params"]}
        for seen in self._schedulers.values():
            scheduler = seen.what()
            other = getattr(scheduler, "optimizer", None)
            if scheduler is None or not isinstance(other, Optimizer) or other is self._optimizer:
                continue
            theirs = {id(p) for g in other.param_groups for p in g["params"]}
            stepped = getattr(other, "_opt_called", False)
            if theirs & mine and not stepped and scheduler.last_epoch > seen.count + 1:
                yield Alarm(
                    "schedule_of_another_optimizer",
                    0,
                    "it sets the learning rate of an older optimizer, which makes no steps; that "
                    "of this one stays as it is",
                    "build the schedule from the optimizer that steps, after the last line that "
                    "makes one",
                    (seen.name,),
                )

    def _idle(self, forwards: int, ended: bool) -> Iterator[Alarm]:
        """A schedule that is never stepped in several epochs."""
        for seen, scheduler in self._mine():
            epochs = (forwards - seen.forwards) / self._batches if self._batches else 0
            if ended and epochs > EPOCHS and scheduler.last_epoch == seen.count:
                yield Alarm(
                    "schedule_never_stepped",
                    0,
                    f"the schedule was not moved in {epochs:.0f} epochs: the learning rate stays "
                    "where it began",
                    "call scheduler.step(), once an epoch or once a step as its lengths say",
                    (seen.name,),
                )

    def _slow(self, steps: int, ended: bool) -> Iterator[Alarm]:
        """A schedule of as many steps as the loop has, moved once an epoch."""
        for seen, scheduler in self._mine():
            made = scheduler.last_epoch - seen.count
            length = getattr(scheduler, "total_steps", None) or getattr(scheduler, "T_max", None)
            if not ended or not length or not 0 < made <= steps / 10:
                continue
            if abs(length - steps) <= NEAR * steps:
                yield Alarm(
                    "schedule_unfinished",
                    0,
                    f"the schedule has {length} steps and made {made} of them while the optimizer "
                    f"made {steps}: it is moved once an epoch, but counts batches",
                    "call scheduler.step() after every optimizer.step(), or give it its length "
                    "in epochs",
                    (seen.name,),
                )

    def _overrun(self) -> Iterator[Alarm]:
        """A cosine that is moved far beyond its length, and comes back."""
        for seen, scheduler in self._mine():
            length = getattr(scheduler, "T_max", None)
            made = scheduler.last_epoch - seen.count
            if isinstance(scheduler, CosineAnnealingLR) and length and made >= OVER * length:
                yield Alarm(
                    "schedule_overrun",
                    0,
                    f"the schedule has {length} steps and made {made}: the learning rate falls "
                    "and rises again and again",
                    "give it its length in steps of the optimizer, or move it once an epoch",
                    (seen.name,),
                )

    def _mine(self) -> Iterator[tuple[Seen, Any]]:
        known = [(s, s.what()) for s in self._schedulers.values()]
        parts = {id(p) for _, s in known for p in getattr(s, "_schedulers", ())}  # of a sequence
        for seen, scheduler in known:
            own = getattr(scheduler, "optimizer", None) is self._optimizer
            if scheduler is not None and own and id(scheduler) not in parts:
                yield seen, scheduler

    def _equal(self, forwards: int) -> Iterator[Alarm]:
        """A distributed sampler that is not told the number of the epoch."""
        for key, seen in self._samplers.items():
            sampler = seen.what()
            if sampler is None or sampler.epoch != seen.count:
                continue
            if forwards - seen.forwards > EPOCHS * self._epoch[key]:
                yield Alarm(
                    "same_order_every_epoch",
                    0,
                    "the sampler is not told the epoch: it shuffles the rows alike in every one",
                    "call loader.sampler.set_epoch(epoch) at the start of each epoch",
                    (seen.name,),
                )
