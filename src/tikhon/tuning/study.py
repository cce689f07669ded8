"""Searches proposed and stored by a user's Optuna study."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tikhon.errors import InputError
from tikhon.tuning.searches import Search
from tikhon.tuning.space import Choice, Conditional, Int, Log
from tikhon.tuning.trials import History, Trial, Value


def direction_of(study: object, metric: object) -> str | None:
    """Return the direction of a study, for a metric function without one."""
    directions = getattr(study, "directions", ())
    score = isinstance(metric, str) or hasattr(metric, "_score_func")
    if metric is None or score or len(directions) != 1:
        return None
    return directions[0].name.lower()


@dataclass(frozen=True, eq=False)
class StudySearch(Search):
    """`count` full trainings proposed by an Optuna study, which receives the results.

    The study's sampler decides, also from earlier trials; its pruner is not used, as the trials of
    a batch train at once. Diverged and unfinished trials are reported as failed. If `maximised`,
    the study receives the negated score.

    Raises `InputError` for several objectives or a conflicting direction.
    """

    study: Any = None
    count: int = 16
    batch: int = 4
    budget: int = 1
    maximised: bool = False
    open: dict[int, Any] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)  # why the sampler stopped proposing

    def __post_init__(self) -> None:
        if not all(hasattr(self.study, name) for name in ("ask", "tell", "directions")):
            raise InputError(f"study must be an Optuna study, received {self.study!r}")
        found = [direction.name.lower() for direction in self.study.directions]
        required = "maximize" if self.maximised else "minimize"
        if found != [required]:
            raise InputError(
                f"the study's direction is {' and '.join(found)}, but what is searched for is to "
                f"{required}: optuna.create_study(direction={required!r})"
            )

    def next(self, history: History) -> list[Trial]:
        """Report finished trials to the study, and ask for a batch."""
        self._report_finished(history)
        if self.ended:
            return []
        first = max(history.ids, default=-1) + 1  # a new study restarts its numbering
        return [self._ask(first) for _ in range(min(self.batch, self.count - len(history)))]

    def collect(self, history: History) -> History:
        """Return the history unchanged; report unfinished trials as failed."""
        self._report_finished(history)
        for trial in self.open.values():
            self._report(trial, None)
        self.open.clear()
        return history

    def _report_finished(self, history: History) -> None:
        for outcome in history:
            trial = self.open.pop(outcome.trial.id, None)
            if trial is None:
                continue
            score = -outcome.score if self.maximised else outcome.score
            self._report(trial, None if outcome.failed else score)

    def _report(self, trial, value: float | None) -> None:
        """Report to the study; an exhausted grid raises an error."""
        from optuna.trial import TrialState

        try:
            self.study.tell(trial, value, state=TrialState.FAIL if value is None else None)
        except RuntimeError as error:
            if "Study.stop" not in str(error):
                raise
            self.ended.append(str(error))

    def _ask(self, first: int) -> Trial:
        trial = self.study.ask()
        id = max([trial.number, first, *(known + 1 for known in self.open)])
        config: dict[str, Value] = {}
        for name, entry in self.space.items():
            if isinstance(entry, Conditional) and not entry.holds(config):
                continue
            varies = name in self.space.varying
            config[name] = self._suggest(trial, name) if varies else self.space.fixed[name]
        self.open[id] = trial
        return Trial(id, config, self.budget)

    def _suggest(self, trial: Any, name: str) -> Value:
        entry = self.space.range(name)
        if isinstance(entry, Choice):
            if not any(isinstance(value, tuple) for value in entry.values):
                return trial.suggest_categorical(name, list(entry.values))
            by_name = {str(value): value for value in entry.values}  # studies cannot store tuples
            return by_name[trial.suggest_categorical(name, list(by_name))]
        if isinstance(entry, Int):
            return trial.suggest_int(name, int(entry.low), int(entry.high), log=entry.log)
        low, high = entry.at(0.0), entry.at(1.0)
        return trial.suggest_float(name, low, high, log=isinstance(entry, Log))
