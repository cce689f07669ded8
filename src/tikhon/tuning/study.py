"""A search that a study of the user's own proposes and keeps: Optuna's interface, as it is met."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tikhon.errors import InputError
from tikhon.tuning.searches import Search
from tikhon.tuning.space import Choice, Conditional, Int, Log
from tikhon.tuning.trials import History, Trial, Value


def direction_of(study: object, metric: object) -> str | None:
    """Which way the study goes, for a metric that does not say itself: a function."""
    directions = getattr(study, "directions", ())
    own = isinstance(metric, str) or hasattr(metric, "_score_func")
    if metric is None or own or len(directions) != 1:
        return None
    return directions[0].name.lower()


@dataclass(frozen=True, eq=False)
class StudySearch(Search):
    """`count` full trainings proposed by an Optuna study, which is told how each of them ended.

    The study's sampler decides, from what the study already holds too; its pruner is not asked,
    because the trials of a batch are trained at once. A trial that diverges, or that a stop leaves
    unfinished, is told as failed. `maximised` says whether the study is told minus the score.

    Raises `InputError` for a study of several objectives, or of the other direction.
    """

    study: Any = None
    count: int = 16
    batch: int = 4
    budget: int = 1
    maximised: bool = False
    open: dict[int, Any] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)  # why the sampler has nothing more to propose

    def __post_init__(self) -> None:
        if not all(hasattr(self.study, name) for name in ("ask", "tell", "directions")):
            raise InputError(f"study must be an Optuna study, received {self.study!r}")
        found = [direction.name.lower() for direction in self.study.directions]
        wanted = "maximize" if self.maximised else "minimize"
        if found != [wanted]:
            raise InputError(
                f"the study's direction is {' and '.join(found)}, but what is searched for is to "
                f"{wanted}: optuna.create_study(direction={wanted!r})"
            )

    def next(self, history: History) -> list[Trial]:
        """Tell the study what has ended, and ask it for a batch."""
        self._tell(history)
        if self.ended:
            return []
        first = max(history.ids, default=-1) + 1  # a study made anew numbers its trials anew
        return [self._asked(first) for _ in range(min(self.batch, self.count - len(history)))]

    def collect(self, history: History) -> History:
        """The history as it is; trials that were never finished are told as failed."""
        self._tell(history)
        for trial in self.open.values():
            self._told(trial, None)
        self.open.clear()
        return history

    def _tell(self, history: History) -> None:
        for outcome in history:
            trial = self.open.pop(outcome.trial.id, None)
            if trial is None:
                continue
            own = -outcome.score if self.maximised else outcome.score
            self._told(trial, None if outcome.failed else own)

    def _told(self, trial, value: float | None) -> None:
        """Tell the study; of a grid that is used up, it says so by an error."""
        from optuna.trial import TrialState

        try:
            self.study.tell(trial, value, state=TrialState.FAIL if value is None else None)
        except RuntimeError as error:
            if "Study.stop" not in str(error):
                raise
            self.ended.append(str(error))

    def _asked(self, first: int) -> Trial:
        trial = self.study.ask()
        id = max([trial.number, first, *(known + 1 for known in self.open)])
        config: dict[str, Value] = {}
        for name, entry in self.space.items():
            if isinstance(entry, Conditional) and not entry.holds(config):
                continue
            varies = name in self.space.varying
            config[name] = self._suggested(trial, name) if varies else self.space.fixed[name]
        self.open[id] = trial
        return Trial(id, config, self.budget)

    def _suggested(self, trial: Any, name: str) -> Value:
        entry = self.space.range(name)
        if isinstance(entry, Choice):
            if not any(isinstance(value, tuple) for value in entry.values):
                return trial.suggest_categorical(name, list(entry.values))
            named = {str(value): value for value in entry.values}  # a study holds no tuples
            return named[trial.suggest_categorical(name, list(named))]
        if isinstance(entry, Int):
            return trial.suggest_int(name, int(entry.low), int(entry.high), log=entry.log)
        low, high = entry.at(0.0), entry.at(1.0)
        return trial.suggest_float(name, low, high, log=isinstance(entry, Log))
