"""Run a search: ask, train, store; stop gracefully."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from tikhon.runs.interrupt import REQUESTED, Stopped, never_stop
from tikhon.tuning.journal import SearchJournal
from tikhon.tuning.plan import SearchPlan, default_config
from tikhon.tuning.runners import PopulationRunner
from tikhon.tuning.searches import Search
from tikhon.tuning.space import Space
from tikhon.tuning.states import States
from tikhon.tuning.trials import DEFAULT, History, Outcome, Trial

TOP = 8  # members in the average
TIMED_OUT = "the time budget was used up"
LEAST, MOST = 0.2, 0.4  # share of a time budget reserved for after the search,
UNTUNED = 0.3  # and share of that for the untuned trial


@dataclass(eq=False)
class Session:
    """A running search: its history and persistent state.

    The share `kept` of a time `budget` is reserved for the untuned trial and for retraining on all
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
    kept: float = LEAST
    ended: str = ""

    @property
    def left(self) -> float:
        """Seconds left in the budget."""
        return self.started + self.budget - time.perf_counter()

    def pace(self, id: int) -> float:
        """Return the seconds taken by an epoch of a trial, on one fold."""
        trained = list(self.history.lineage(id))
        epochs = max(trained[0].trial.budget * self.runner.job.folds, 1)
        return sum(outcome.seconds for outcome in trained) / epochs

    def past(self, share: float) -> bool:
        """Return whether this share of the budget is spent."""
        return self.left < (1 - share) * self.budget if math.isfinite(self.budget) else False

    def asked_to_stop(self) -> bool:
        """Return whether to stop; the result is then partial."""
        if self.stop():
            self.ended = REQUESTED
        return self.ended == REQUESTED

    def run(self, search: Search) -> None:
        """Train the trials of the search until it is finished, stopped, or out of time."""
        try:
            self._take_up()
            self.runner.expired = lambda: self.past(1 - self.kept)
            while trials := search.next(searched(self.history)):
                if self.history and self.past(1 - self.kept):
                    self.ended = TIMED_OUT
                    return
                batch = {"trials": len(trials), "budget": trials[0].budget}
                self.on_event({"event": "batch", **batch})
                outcomes = self._train(trials)
                if not self.past(1 - self.kept):  # otherwise trials not continued are results too
                    self._forget()
                told = {"outcomes": outcomes, "history": self.history}
                self.on_event({"event": "outcomes", **told})
        except Stopped:
            self.ended = REQUESTED

    def finish(self, space: Space, plan: SearchPlan) -> None:
        """Train the untuned configuration too, which one search in ten fails to beat.

        Also retrains here the best trials whose weights are in another process.
        """
        self.runner.expired = lambda: self.past(1 - (1 - UNTUNED) * self.kept)
        if self.asked_to_stop():
            return
        try:
            self._train_again(o.trial.id for o in searched(self.history).ranked()[:TOP])
            if DEFAULT not in self.history.ids:
                self._train_untuned(Trial(DEFAULT, default_config(space), plan.epochs))
        except Stopped:
            self.ended = REQUESTED

    def _train_untuned(self, trial: Trial) -> None:
        """Train the untuned configuration for the number of epochs best on its validation rows.

        Trained fully it may overfit, unlike in practice, and every search would appear to gain.
        """
        (outcome,) = self.runner.run([trial])
        best = outcome.best_epoch
        if not outcome.failed and best < trial.budget:
            self.runner.expired = never_stop  # at most as long as the first run
            (outcome,) = self.runner.run([replace(outcome.trial, budget=best)])
        self._keep([outcome])

    def _take_up(self) -> None:
        """Load the states left by an earlier process; retrain damaged ones.

        Scores stay those of the journal.
        """
        if self.journal is None:
            return
        if self.journal.record.torn is not None:
            told = {"files": [self.journal.record.path], "trials": []}
            self.on_event({"event": "damaged", **told})
        damaged = self.states.adopt(self.journal.seals)
        again = self._train_again(_needed(self.history))
        if again:
            self.on_event({"event": "damaged", "files": damaged, "trials": again})
            self.journal.extend([], self.states.seal())

    def _train(self, trials: Sequence[Trial]) -> list[Outcome]:
        return self._keep(self.runner.run(trials))

    def _keep(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Store outcomes in the journal and history."""
        seals = self.states.seal()
        if self.journal is not None:
            self.journal.extend(outcomes, seals)
        self.history = self.history.extended(outcomes)
        return outcomes

    def _train_again(self, ids: Iterable[int]) -> list[int]:
        """Rebuild missing states of trials, from the nearest ancestor with a state."""
        lost: dict[int, Trial] = {}
        for id in ids:
            for outcome in self.history.lineage(id):
                if outcome.trial.id in self.states or outcome.failed:
                    break
                lost[outcome.trial.id] = outcome.trial
        for budget in sorted({trial.budget for trial in lost.values()}):
            self.runner.run([trial for trial in lost.values() if trial.budget == budget])
        return sorted(lost)

    def _forget(self) -> None:
        """Drop the states of trials that were continued or eliminated."""
        kept = _needed(self.history)
        for id in [id for id in self.states if id not in kept]:
            del self.states[id]


def _needed(history: History) -> set[int]:
    """Return the trials that may still be continued or chosen."""
    newest = history[-1].trial.budget if history else 0
    ends = {o.trial.id for o in history if o.trial.budget == newest}
    return ends | {o.trial.id for o in history.ranked()[: 2 * TOP]}


def searched(history: History) -> History:
    """Return the history without the untuned trial."""
    return History(o for o in history if o.trial.id != DEFAULT)
