"""Schedules of the learning rate, as the loop holds and moves them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    ReduceLROnPlateau,
)
from torch.utils.data import DataLoader

from tikhon.monitoring.alarms import Alarm, alarm

MIN_EPOCHS = 2  # after which what is done once an epoch has been seen
LOW, HIGH = 0.02, 0.9  # of the largest rate: next to nothing, and back (convention)
MIN_RETURN = 4  # steps of a rise that is no jump
MIN_RETURNS = 2  # times a rate has come back
OVERRUN = 3  # times its length, after which a cosine has come back
MIN_RESTARTS = 3  # times a warm-up began again
MIN_BEST = 3  # best values, one after another, of a plateau that is moved once an epoch
MIN_STEPS_PER_MOVE = 10  # steps and more between two moves of it
MIN_STEPS, USUAL_RATE = 50, 0.5  # after which a rate that never rises is low; below 1
LENGTH_TOLERANCE = 0.2  # relative: a length in steps is that of the loop


@dataclass
class Tracked:
    """A schedule, and its count and the forward passes when it was first seen."""

    name: str
    reference: weakref.ref[Any]
    count: int
    forwards: int


@dataclass
class RateHistory:
    """How the learning rate went from step to step."""

    first: float | None = None
    last: float = math.nan
    rises: int = 0
    falls: int = 0  # to anything but the first rate
    restarts: int = 0  # back to the first rate
    returns: int = 0  # from next to nothing, as slowly as it fell
    _fall: int = 0  # steps that it fell from its highest, one after another
    _rise: int = 0  # steps that it rose from next to nothing
    _largest: float = 0.0

    def add(self, rate: float) -> None:
        """That of a step, where it is another than that of the step before."""
        if self.first is None:
            self.first = rate
        self.rises += rate > self.last
        self._follow_return(rate)
        if rate < self.last:
            self.restarts += math.isclose(rate, self.first, rel_tol=1e-6)
            self.falls += not math.isclose(rate, self.first, rel_tol=1e-6)
        self.last = rate

    def _follow_return(self, rate: float) -> None:
        """Count falls to next to nothing that a rise of as many steps follows."""
        self._largest = max(self._largest, rate)
        if rate < self.last:
            self._fall, self._rise = (1 if self._rise else self._fall + 1), 0
        elif self._rise or self.last <= LOW * self._largest:
            self._rise += 1
            is_back = rate >= HIGH * self._largest and self._rise >= MIN_RETURN
            if is_back and self._fall <= 2 * self._rise <= 4 * self._fall:
                self.returns, self._fall = self.returns + 1, 0
        else:
            self._fall = 0

    def is_square_of(self, rate: float) -> bool:
        """Whether it began as a rate times itself, and never rose."""
        is_square = math.isclose(self.first or 0.0, rate * rate, rel_tol=1e-6)
        return 0 < rate < USUAL_RATE and is_square and self._largest == self.first

    def alarms(self, steps: int) -> Iterator[Alarm]:
        """A rate that rises nearly always, and goes back to where it began."""
        if self.restarts >= MIN_RESTARTS and not self.falls and self.rises >= 0.8 * steps:
            yield alarm("warmup_begins_again", first=self.first or 0.0, count=self.restarts)


class Schedules:
    """Schedules that belong to another optimizer, never move or end too early."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._schedulers: dict[int, Tracked] = {}
        self._longest_loader = 0  # its batches
        self.rates = RateHistory()
        self._first_beside = _rates_beside(optimizer)
        self._beside: float | None = None  # a rate that was written where no step reads it
        self._best_values: dict[int, list[float]] = {}  # of a plateau, by id
        self._plateau_epochs: dict[int, int] = {}  # how often that was moved

    def find(
        self,
        schedulers: Mapping[str, LRScheduler],
        loaders: Mapping[str, DataLoader[object]],
        forwards: int,
    ) -> None:
        """Look at what the loop holds."""
        for name, scheduler in schedulers.items():
            tracked = Tracked(name, weakref.ref(scheduler), scheduler.last_epoch, forwards)
            self._schedulers.setdefault(id(scheduler), tracked)
        for loader in loaders.values():
            with suppress(TypeError):  # of an iterable without a length
                self._longest_loader = max(self._longest_loader, len(loader))

    def observe(self) -> None:
        """Read the best value of each plateau, and rates that are written beside the groups."""
        used = [group.get("lr") for group in self._optimizer.param_groups]
        for first, rate in zip(self._first_beside, _rates_beside(self._optimizer)):
            if rate != first and isinstance(rate, float) and rate not in used:
                self._beside = rate
        for _, plateau in self._own_schedulers():
            if isinstance(plateau, ReduceLROnPlateau):
                best = self._best_values.setdefault(id(plateau), [])
                if math.isfinite(plateau.best) and plateau.best not in best[-1:]:
                    best.append(plateau.best)
                self._plateau_epochs[id(plateau)] = plateau.last_epoch

    def has_improved(self, steps: int) -> bool:
        """Whether several epochs, one after another, were the best of a plateau."""
        return any(
            len(best) > MIN_BEST and self._plateau_epochs[key] * MIN_STEPS_PER_MOVE <= steps
            for key, best in self._best_values.items()
        )

    def alarms(self, steps: int, forwards: int, *, ended: bool) -> Iterator[Alarm]:
        """What is wrong with them so far."""
        yield from self._find_foreign()
        yield from self.rates.alarms(steps)
        if self._beside is not None:
            used = self._optimizer.param_groups[0].get("lr", 0.0)
            yield alarm("rate_beside_groups", written=self._beside, used=float(used))
        schedulers = [*self._own_schedulers()]
        is_meant = any(isinstance(s, CyclicLR | CosineAnnealingLR) for _, s in schedulers)
        if self.rates.returns >= MIN_RETURNS and not is_meant:
            yield alarm("schedule_overrun", key="rate_returns", count=self.rates.returns)
        for tracked, scheduler in schedulers:
            where, moves = (tracked.name,), scheduler.last_epoch - tracked.count
            length = getattr(scheduler, "total_steps", None) or getattr(scheduler, "T_max", None)
            epochs = (forwards - tracked.forwards) / max(1, self._longest_loader)
            is_by_factor = isinstance(scheduler, LambdaLR) and scheduler.base_lrs
            initial = float(scheduler.base_lrs[0]) if is_by_factor else 0.0
            if ended and steps >= MIN_STEPS and self.rates.is_square_of(initial):
                yield alarm("slow_convergence", key="rate_squared", where=where, rate=initial)
            is_as_long = length and abs(length - steps) <= LENGTH_TOLERANCE * steps
            if ended and self._longest_loader and epochs > MIN_EPOCHS and not moves:
                yield alarm("schedule_never_stepped", where=where, epochs=epochs)
            elif ended and is_as_long and 0 < moves <= steps / 10:  # moved once an epoch
                made = {"length": length, "moves": moves, "steps": steps}
                yield alarm("schedule_unfinished", where=where, **made)
            elif isinstance(scheduler, CosineAnnealingLR) and moves >= OVERRUN * scheduler.T_max:
                yield alarm("schedule_overrun", where=where, length=scheduler.T_max, moves=moves)

    def _find_foreign(self) -> Iterator[Alarm]:
        """A schedule of an optimizer of the same tensors that makes no steps."""
        own_parameters = {id(p) for g in self._optimizer.param_groups for p in g["params"]}
        for tracked in self._schedulers.values():
            scheduler = tracked.reference()
            other = getattr(scheduler, "optimizer", None)
            if scheduler is None or not isinstance(other, Optimizer) or other is self._optimizer:
                continue
            other_parameters = {id(p) for g in other.param_groups for p in g["params"]}
            has_stepped = getattr(other, "_opt_called", False)
            if (
                other_parameters & own_parameters
                and not has_stepped
                and scheduler.last_epoch > tracked.count + 1
            ):
                yield alarm("schedule_of_another_optimizer", where=(tracked.name,))

    def _own_schedulers(self) -> Iterator[tuple[Tracked, Any]]:
        schedulers = [(s, s.reference()) for s in self._schedulers.values()]
        sequence_parts = {
            id(p) for _, s in schedulers for p in getattr(s, "_schedulers", ())
        }  # of a sequence
        for tracked, scheduler in schedulers:
            own = getattr(scheduler, "optimizer", None) is self._optimizer
            if scheduler is not None and own and id(scheduler) not in sequence_parts:
                yield tracked, scheduler


def _rates_beside(optimizer: Optimizer) -> tuple[object, object]:
    """Rates that no step reads: an attribute of the optimizer, and the default of new groups."""
    return vars(optimizer).get("lr"), optimizer.defaults.get("lr")
