"""Run a search: ask, train, store; stop gracefully."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tikhon.runs.interrupt import REQUESTED, Stopped
from tikhon.tuning.journal import SearchJournal
from tikhon.tuning.plan import SearchPlan, default_config
from tikhon.tuning.runners import PopulationRunner
from tikhon.tuning.searches import Search
from tikhon.tuning.space import Space
from tikhon.tuning.states import States
from tikhon.tuning.trials import DEFAULT, History, Outcome, Trial

TOP = 8  # members in the average
TIMED_OUT = "the time budget was used up"
MIN_RESERVE, MAX_RESERVE = 0.2, 0.4  # share of a time budget reserved for after the search,
UNTUNED_SHARE = 0.3  # and share of that for the untuned trial
_LATE = 0.75  # share of the epochs after which a best epoch tells that training was cut short


@dataclass(eq=False)
class Session:
    """A running search: its history and persistent state.

    The share `reserve` of a time `budget` is left for the untuned trial and for retraining on all
    rows.
    """

    runner: PopulationRunner
    states: States
    history: History
    journal: SearchJournal | None
    started: float
    budget: float
    stop: Callable[[], bool]
    on_event: Callable[[dict[str, object]], None]
    reserve: float = MIN_RESERVE
    ended: str = ""
    untuned_epochs: int = 0  # of the untuned trial if time was too short to compare with it

    @property
    def seconds_left(self) -> float:
        """Seconds left in the budget."""
        return self.started + self.budget - time.perf_counter()

    def pace(self, id: int) -> float:
        """Return the seconds taken by an epoch of a trial, on one fold."""
        trained = list(self.history.lineage(id))
        epochs = max(trained[0].trial.budget * self.runner.job.folds, 1)
        return sum(outcome.seconds for outcome in trained) / epochs

    def is_spent(self, share: float, ahead: float = 0.0) -> bool:
        """Return whether this share of the budget is spent, now or `ahead` seconds from now."""
        if not math.isfinite(self.budget):
            return False
        return self.seconds_left - ahead < (1 - share) * self.budget

    def should_stop(self) -> bool:
        """Return whether to stop; the result is then partial."""
        if self.stop():
            self.ended = REQUESTED
        return self.ended == REQUESTED

    def run(self, search: Search) -> None:
        """Train the trials of the search until it is finished, stopped, or out of time."""
        try:
            self._resume()
            self.runner.expired = partial(self.is_spent, 1 - self.reserve)
            while trials := search.next(without_default(self.history)):
                if self.history and self.is_spent(1 - self.reserve):
                    self.ended = TIMED_OUT
                    return
                batch = {"trials": len(trials), "budget": trials[0].budget}
                self.on_event({"event": "batch", **batch})
                outcomes = self._train(trials)
                if not self.is_spent(1 - self.reserve):
                    self._drop_states()  # once time is up, trials not continued are results too
                details = {"outcomes": outcomes, "history": self.history}
                self.on_event({"event": "outcomes", **details})
        except Stopped:
            self.ended = REQUESTED

    def finish(self, space: Space, plan: SearchPlan) -> None:
        """Train the untuned configuration too, which one search in ten fails to beat.

        Also retrains here the best trials whose weights are in another process.
        """
        self.runner.expired = partial(self.is_spent, 1 - (1 - UNTUNED_SHARE) * self.reserve)
        if self.should_stop():
            return
        try:
            self._retrain(o.trial.id for o in without_default(self.history).ranked()[:TOP])
            if DEFAULT not in self.history.ids:
                self._train_untuned(Trial(DEFAULT, default_config(space), plan.epochs))
        except Stopped:
            self.ended = REQUESTED

    def _train_untuned(self, trial: Trial) -> None:
        """Train the untuned configuration for the number of epochs best on its validation rows.

        Trained fully it may overfit, unlike in practice, and every search would appear to gain.
        One that time cut short while it improved is not recorded, for the same reason.
        """
        (outcome,) = self.runner.run([trial])
        best, trained = outcome.best_epoch, outcome.trial.budget
        if not outcome.failed and trained < trial.budget and best > _LATE * trained:
            self.untuned_epochs = trained
            return
        if not outcome.failed and best < trial.budget:
            self.runner.expired = lambda ahead: False  # at most as long as the first run
            (outcome,) = self.runner.run([replace(outcome.trial, budget=best)])
            outcome = replace(outcome, score=outcome.curve[-1][1])  # of so few epochs no mean
        self._record([outcome])

    def _resume(self) -> None:
        """Load the states left by an earlier process; retrain damaged ones.

        Scores stay those of the journal.
        """
        if self.journal is None:
            return
        if self.journal.record.torn is not None:
            details = {"files": [self.journal.record.path], "trials": []}
            self.on_event({"event": "damaged", **details})
        damaged = self.states.load_sealed(self.journal.seals)
        retrained = self._retrain(_needed_trials(self.history))
        if retrained:
            self.on_event({"event": "damaged", "files": damaged, "trials": retrained})
            self.journal.extend([], self.states.seal())

    def _train(self, trials: Sequence[Trial]) -> list[Outcome]:
        return self._record(self.runner.run(trials))

    def _record(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Store outcomes in the journal and history."""
        seals = self.states.seal()
        if self.journal is not None:
            self.journal.extend(outcomes, seals)
        self.history = self.history.extended(outcomes)
        return outcomes

    def _retrain(self, ids: Iterable[int]) -> list[int]:
        """Rebuild missing states of trials, from the nearest ancestor with a state."""
        missing: dict[int, Trial] = {}
        for id in ids:
            for outcome in self.history.lineage(id):
                if outcome.trial.id in self.states or outcome.failed:
                    break
                missing[outcome.trial.id] = outcome.trial
        for budget in sorted({trial.budget for trial in missing.values()}):
            self.runner.run([trial for trial in missing.values() if trial.budget == budget])
        return sorted(missing)

    def _drop_states(self) -> None:
        """Drop the states of trials that were continued or eliminated."""
        needed = _needed_trials(self.history)
        for id in [id for id in self.states if id not in needed]:
            del self.states[id]


def _needed_trials(history: History) -> set[int]:
    """Return the trials that may still be continued or chosen."""
    longest = history[-1].trial.budget if history else 0
    longest_trials = {o.trial.id for o in history if o.trial.budget == longest}
    return longest_trials | {o.trial.id for o in history.ranked()[: 2 * TOP]}


def without_default(history: History) -> History:
    """Return the history without the untuned trial."""
    return History(o for o in history if o.trial.id != DEFAULT)
