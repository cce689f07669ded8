"""The loop of a search: ask, train, write down; stop in good order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from tikhon.runs.interrupt import REQUESTED, Stopped, never
from tikhon.tuning.journal import SearchJournal
from tikhon.tuning.plan import SearchPlan, default_config
from tikhon.tuning.runners import PopulationRunner
from tikhon.tuning.searches import Search
from tikhon.tuning.space import Space
from tikhon.tuning.states import States
from tikhon.tuning.trials import DEFAULT, History, Outcome, Trial

TOP = 8  # members of the average
TIMED_OUT = "the time budget was used up"
LEAST, MOST = 0.2, 0.4  # shares of a budget in seconds that are kept from the search,
UNTUNED = 0.3  # and this share of them for the untuned trial


@dataclass(eq=False)
class Session:
    """One search under way: its history, and what keeps it safe.

    Of a `budget` in seconds the share `kept` is not for the search but for the untuned trial and
    for training again on all rows.
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
        """Seconds of the budget."""
        return self.started + self.budget - time.perf_counter()

    def pace(self, id: int) -> float:
        """Seconds that an epoch of a trial has taken, of one of its folds."""
        trained = list(self.history.lineage(id))
        epochs = max(trained[0].trial.budget * self.runner.job.folds, 1)
        return sum(outcome.seconds for outcome in trained) / epochs

    def past(self, share: float) -> bool:
        """Whether this share of the budget is used up."""
        return self.left < (1 - share) * self.budget if math.isfinite(self.budget) else False

    def asked_to_stop(self) -> bool:
        """Whether it is to stop; what is left out from then on makes the result a part."""
        if self.stop():
            self.ended = REQUESTED
        return self.ended == REQUESTED

    def run(self, search: Search) -> None:
        """Train what the search asks for until it is done, stopped, or out of time."""
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
                if not self.past(1 - self.kept):  # else those not continued are ends as well
                    self._forget()
                told = {"outcomes": outcomes, "history": self.history}
                self.on_event({"event": "outcomes", **told})
        except Stopped:
            self.ended = REQUESTED

    def finish(self, space: Space, plan: SearchPlan) -> None:
        """Train the untuned configuration too: one search in ten ends worse than it.

        Of the best trials, those whose weights are in another process are trained again here.
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
        """Train the untuned configuration for as many epochs as its validation rows like best.

        After all of them it may have overfitted, as nobody who watches those rows would let it,
        and every search would seem to gain.
        """
        (outcome,) = self.runner.run([trial])
        best = outcome.best_epoch
        if not outcome.failed and best < trial.budget:
            self.runner.expired = never  # no longer than it has just taken
            (outcome,) = self.runner.run([replace(outcome.trial, budget=best)])
        self._keep([outcome])

    def _take_up(self) -> None:
        """Read the states that an earlier process left; train again what is damaged.

        The scores stay those of the journal.
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
        """Write down what was found."""
        seals = self.states.seal()
        if self.journal is not None:
            self.journal.extend(outcomes, seals)
        self.history = self.history.extended(outcomes)
        return outcomes

    def _train_again(self, ids: Iterable[int]) -> list[int]:
        """Make the states of trials that have none here, from their nearest ancestor that has."""
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
        """Drop the states of trials that were continued or are beaten: only ends are needed."""
        kept = _needed(self.history)
        for id in [id for id in self.states if id not in kept]:
            del self.states[id]


def _needed(history: History) -> set[int]:
    """The trials that may be continued or chosen."""
    newest = history[-1].trial.budget if history else 0
    ends = {o.trial.id for o in history if o.trial.budget == newest}
    return ends | {o.trial.id for o in history.ranked()[: 2 * TOP]}


def searched(history: History) -> History:
    """Without the untuned trial."""
    return History(o for o in history if o.trial.id != DEFAULT)
