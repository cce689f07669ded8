"""Choose the next trials: pure functions of the history; standard library only.

The engine is `while trials := search.next(history): history =
history.extended(runner.run(trials))`, so replaying a journal resumes a search.
"""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tikhon.errors import InputError
from tikhon.tuning.space import Choice, Int, Space, simplifies
from tikhon.tuning.trials import History, Outcome, Trial, Value


@dataclass(frozen=True)
class Search(ABC):
    """A strategy that maps a history to the next trials."""

    space: Space

    @abstractmethod
    def next(self, history: History) -> list[Trial]:
        """Return the next trials, [] when finished; deterministic in the history."""

    def collect(self, history: History) -> History:
        """Return the history extended by results of other processes."""
        return history


@dataclass(frozen=True)
class Design(Search):
    """A search whose configurations are all fixed in advance."""

    budget: int = 1

    @abstractmethod
    def configs(self) -> list[dict[str, Value]]:
        """Return every configuration, in order."""

    def next(self, history: History) -> list[Trial]:
        """Return all trials without an outcome."""
        return history.missing(
            Trial(i, config, self.budget) for i, config in enumerate(self.configs())
        )


@dataclass(frozen=True)
class Grid(Design):
    """A full grid: `points` values of each range, every value of a choice.

    >>> from tikhon.tuning.space import Log
    >>> grid = Grid(Space(lr=Log(0.01, 1.0)), points=2)
    >>> [round(trial.config["lr"], 6) for trial in grid.next(History())]
    [0.01, 1.0]
    """

    points: int = 8

    def configs(self) -> list[dict[str, Value]]:
        """Return every configuration once, the last entry varying fastest."""
        space, fixed = self.space, self.space.fixed
        axes = [[fixed[n]] if n in fixed else space.range(n).grid(self.points) for n in space]
        found = [space.resolved(dict(zip(space, v))) for v in itertools.product(*axes)]
        return list({repr(config): config for config in found}.values())


@dataclass(frozen=True)
class Random(Design):
    """`count` independent draws (Bergstra and Bengio, 2012)."""

    count: int = 16
    seed: int = 0

    def configs(self) -> list[dict[str, Value]]:
        """Return the draws; the first `k` do not depend on `count`."""
        draw = random.Random(self.seed).random
        return [self.space.at([draw() for _ in self.space.varying]) for _ in range(self.count)]


@dataclass(frozen=True)
class SpaceFilling(Design):
    """`count` points of a scrambled Sobol sequence, more even than random ones (Owen, 1998).

    The configurations in `first` precede them and count.
    """

    count: int = 16
    seed: int = 0
    first: tuple[dict[str, Value], ...] = ()

    def configs(self) -> list[dict[str, Value]]:
        """Return the points; the first `k` do not depend on `count`."""
        import torch

        if not (dimensions := len(self.space.varying)):
            return [self.space.at([])]
        engine = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=self.seed)
        points = engine.draw(self.count, dtype=torch.float64).tolist()
        return [*self.first, *map(self.space.at, points)][: self.count]


@dataclass(frozen=True)
class RoundSearch(Search):
    """A search in rounds up to `full` epochs, each based on the previous outcomes."""

    design: Design
    full: int

    def next(self, history: History) -> list[Trial]:
        """Return the unfinished part of the newest round, or the next round."""
        configs = self.design.configs()
        trials = [Trial(i, config, self._begun()) for i, config in enumerate(configs)]
        for number in itertools.count(1):
            if not trials:
                break
            if missing := history.missing(trials):
                return missing
            if trials[0].budget >= self.full:
                break
            trials = self._after([history.of(trial.id) for trial in trials], number)
        return []

    @abstractmethod
    def _begun(self) -> int:
        """Epochs of the first round."""

    @abstractmethod
    def _after(self, outcomes: list[Outcome], number: int) -> list[Trial]:
        """Return the round after these outcomes, `number` after the first; [] at the end."""


@dataclass(frozen=True)
class Halving(RoundSearch):
    """Successive halving that protects strong regularization.

    Every member trains `first` epochs; each rung keeps the best `1/factor` and gives them `factor`
    times the epochs, until `full`. As strong regularization starts slowly, (a) `first` is at least
    an eighth of `full`; (b) a rung is postponed, up to half of `full`, until the validation loss
    of the least regularized member rises; (c) each more regularized third keeps its best member,
    beside the best overall, if its loss is still falling.

    Reference: Jamieson and Talwalkar (2016), Non-stochastic best arm identification.
    """

    first: int = 0
    factor: int = 3
    guarded: bool = True

    def __post_init__(self) -> None:
        least = math.ceil(self.full / 8) if self.guarded else 1
        if self.factor < 2 or self.full < 1:
            raise InputError(f"halving: factor {self.factor} and full {self.full} must be >= 2, 1")
        object.__setattr__(self, "first", min(max(self.first, least), self.full))

    def _begun(self) -> int:
        return self.first

    def _after(self, outcomes: list[Outcome], number: int) -> list[Trial]:
        alive = sorted((o for o in outcomes if not o.failed), key=lambda o: (o.score, o.trial.id))
        budget = outcomes[0].trial.budget
        start = max(o.trial.id for o in outcomes) + 1
        if self.guarded and self._too_early(alive, budget):
            kept, budget = alive, min(2 * budget, self.full)
        else:
            kept = self._survivors(alive, math.ceil(len(outcomes) / self.factor))
            budget = min(budget * self.factor, self.full)
        kept = sorted(kept, key=lambda o: o.trial.id)
        return [
            Trial(start + i, o.trial.config, budget, parent=o.trial.id) for i, o in enumerate(kept)
        ]

    def _too_early(self, alive: Sequence[Outcome], budget: int) -> bool:
        if not alive or 2 * budget > self.full / 2 or not _regularizes(self.space):
            return False
        least = min(alive, key=lambda o: (self.space.weight(o.trial.config), o.trial.id))
        return not turned_up(least)

    def _survivors(self, alive: list[Outcome], count: int) -> list[Outcome]:
        kept = alive[:count]
        if not self.guarded or not kept or not _regularizes(self.space):
            return kept
        weights = sorted(self.space.weight(o.trial.config) for o in alive)
        typical = max(self.space.weight(o.trial.config) for o in kept)
        for lower in (weights[len(weights) // 3], weights[2 * len(weights) // 3]):
            third = [o for o in alive[count:] if self.space.weight(o.trial.config) >= lower]
            falling = [o for o in third if still_falling(o)]
            if lower > typical and falling and falling[0] not in kept:
                kept = [*kept, falling[0]]
        return kept


@dataclass(frozen=True)
class PopulationBased(RoundSearch):
    """Population-based training from better intermediate results (Jaderberg et al., 2017).

    Every `interval` epochs the worst quarter continues from members of the best quarter, each
    hyperparameter perturbed (x1.2 or x0.8 in its range, or to the next value of an ordered choice)
    or redrawn (1 in 4).
    """

    interval: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.interval <= self.full:
            raise InputError(f"interval {self.interval} must lie in [1, full={self.full}]")

    def _begun(self) -> int:
        return self.interval

    def _after(self, outcomes: list[Outcome], number: int) -> list[Trial]:
        draw = random.Random(f"{self.seed}-{number}")
        order = sorted(
            outcomes, key=lambda o: (o.failed, 0.0 if o.failed else o.score, o.trial.id)
        )
        if order[0].failed:
            return []
        quarter = max(1, len(order) // 4)
        worst = {o.trial.id for o in order[len(order) - quarter :]} if len(order) > 1 else set()
        worst |= {o.trial.id for o in order if o.failed}
        best = [o for o in order[:quarter] if not o.failed]
        budget = min(outcomes[0].trial.budget + self.interval, self.full)
        start = max(o.trial.id for o in outcomes) + 1
        trials = []
        for i, outcome in enumerate(outcomes):
            source = draw.choice(best) if outcome.trial.id in worst else outcome
            config = source.trial.config
            if source is not outcome:
                config = self._explored(config, draw)
            trials.append(Trial(start + i, config, budget, parent=source.trial.id))
        return trials

    def _explored(self, config: Mapping[str, Value], draw: random.Random) -> dict[str, Value]:
        moved = dict(config)
        for name in self.space.varying:
            entry = self.space.range(name)
            loose = isinstance(entry, Choice) and not entry.ordered
            if loose or name not in config or draw.random() < 0.25:
                moved[name] = entry.at(draw.random())
            elif isinstance(entry, Choice):
                place = entry.values.index(config[name]) + draw.choice((-1, 1))
                moved[name] = entry.values[min(max(place, 0), len(entry.values) - 1)]
            else:
                value = float(config[name]) * draw.choice((0.8, 1.2))
                value = min(max(value, entry.at(0.0)), entry.at(1.0))
                moved[name] = round(float(value)) if isinstance(entry, Int) else value
        return self.space.resolved(moved)


def turned_up(outcome: Outcome) -> bool:
    """Return whether the validation loss has passed its minimum."""
    losses = [loss for _, loss in outcome.curve]
    return len(losses) >= 2 and min(losses) < losses[-1]


def still_falling(outcome: Outcome) -> bool:
    """Return whether the last validation loss is the lowest."""
    losses = [loss for _, loss in outcome.curve]
    return len(losses) >= 2 and losses[-1] <= min(losses)


def _regularizes(space: Space) -> bool:
    return any(map(simplifies, space.varying))
