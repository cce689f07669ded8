"""Trials proposed by a search and their outcomes: frozen values, standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Value = float | int | str | bool
Config = Mapping[str, Value]
DEFAULT = -1  # id of the untuned trial


@dataclass(frozen=True)
class Trial:
    """One configuration to train up to `budget` epochs (counted from its first ancestor).

    With a `parent`, training continues from its final state: the previous strength of a path, the
    same member one rung earlier, or the better member of a population.
    """

    id: int
    config: Config
    budget: int
    parent: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", MappingProxyType(dict(self.config)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Trial, (self.id, dict(self.config), self.budget, self.parent)

    def to_dict(self) -> dict[str, object]:
        """Return JSON-serialisable values."""
        return {
            "id": self.id,
            "config": dict(self.config),
            "budget": self.budget,
            "parent": self.parent,
        }


@dataclass(frozen=True)
class Outcome:
    """Result of a trial: `score` (lower is better; NaN if failed), its error, its curve.

    `curve` holds (epoch, validation loss) pairs; `strengths` the final adapted strengths.
    """

    trial: Trial
    score: float
    seconds: float = 0.0
    error: float = 0.0
    failure: str = ""
    curve: tuple[tuple[int, float], ...] = ()
    strengths: Mapping[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether the member diverged or could not be trained."""
        return not math.isfinite(self.score)

    @property
    def best_epoch(self) -> int:
        """Epoch with the lowest validation loss; the last one if none was measured."""
        if not self.curve:
            return self.trial.budget
        return min(self.curve, key=lambda point: point[1])[0]

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-serialisable dict, with None for non-finite numbers."""
        return {
            **self.trial.to_dict(),
            "score": finite_or_none(self.score),
            "seconds": self.seconds,
            "error": finite_or_none(self.error),
            "failure": self.failure,
            "curve": [[epoch, finite_or_none(loss)] for epoch, loss in self.curve],
            "strengths": {name: finite_or_none(value) for name, value in self.strengths.items()},
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Outcome:
        """Invert `to_dict`."""
        config = {name: _tupled(value) for name, value in row["config"].items()}
        return cls(
            trial=Trial(row["id"], config, row["budget"], row["parent"]),
            score=_number(row["score"]),
            seconds=row["seconds"],
            error=_number(row["error"]),
            failure=row["failure"],
            curve=tuple((epoch, _number(loss)) for epoch, loss in row["curve"]),
            strengths={name: _number(value) for name, value in row["strengths"].items()},
        )


def _tupled(value: Any) -> Any:
    """Convert lists, as JSON has them, to tuples."""
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


class History(tuple[Outcome, ...]):
    """The outcomes so far in order; immutable.

    >>> history = History([Outcome(Trial(0, {"lr": 0.1}, 5), 0.7)])
    >>> history = history.extended([Outcome(Trial(1, {"lr": 0.2}, 5), 0.5)])
    >>> history.best().trial.config["lr"], history.epochs
    (0.2, 10)
    """

    def extended(self, outcomes: Iterable[Outcome]) -> History:
        """Return this history followed by more outcomes."""
        return History((*self, *outcomes))

    def of(self, id: int) -> Outcome:
        """Return the outcome of one trial."""
        for outcome in self:
            if outcome.trial.id == id:
                return outcome
        raise KeyError(id)

    @property
    def ids(self) -> frozenset[int]:
        """Ids of the trials with an outcome."""
        return frozenset(outcome.trial.id for outcome in self)

    @property
    def epochs(self) -> int:
        """Epochs trained in total, counting trials with a parent only from its end."""
        spent = {outcome.trial.id: outcome.trial.budget for outcome in self}
        return sum(
            o.trial.budget - (0 if o.trial.parent is None else spent.get(o.trial.parent, 0))
            for o in self
        )

    def missing(self, trials: Iterable[Trial]) -> list[Trial]:
        """Return the trials without an outcome."""
        done = self.ids
        return [trial for trial in trials if trial.id not in done]

    def ends(self) -> list[Outcome]:
        """Return finished trials that were not continued, best first, ties by id."""
        continued = {outcome.trial.parent for outcome in self}
        ends = (o for o in self if not o.failed and o.trial.id not in continued)
        return sorted(ends, key=lambda o: (o.score, o.trial.id))

    def ranked(self) -> list[Outcome]:
        """Return the `ends` with the longest training."""
        ends = self.ends()
        longest = max((o.trial.budget for o in ends), default=0)
        return [o for o in ends if o.trial.budget == longest]

    def best(self) -> Outcome:
        """Return the lowest score among the trials with the largest budget."""
        ranked = self.ranked()
        if not ranked:
            raise ValueError(
                f"none of the {len(self)} trials finished with a finite score: "
                "lower the learning rates of the space"
            )
        return ranked[0]

    def lineage(self, id: int) -> Iterator[Outcome]:
        """Yield the outcome and its ancestors, youngest first."""
        current: int | None = id
        while current is not None:
            outcome = self.of(current)
            yield outcome
            current = outcome.trial.parent


def finite_or_none(value: float) -> float | None:
    """Return the number, None in place of a non-finite one."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
