"""The loop of a search: ask, train, write down; stop in good order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tikhon.tuning.journal import Journal
from tikhon.tuning.plan import Plan, default_config
from tikhon.tuning.runners import PopulationRunner, Stopped
from tikhon.tuning.searches import Search
from tikhon.tuning.space import Space
from tikhon.tuning.states import StateStore
from tikhon.tuning.trials import History, Outcome, Trial

TOP = 8  # members of the average
SEARCH, UNTUNED = 0.8, 0.9  # shares of a budget in seconds
DEFAULT = -1  # the id of the untuned trial


@dataclass(eq=False)
class Session:
    """One search under way: its history, and what keeps it safe.

    A `budget` in seconds is split: the search has until `SEARCH` of it, the untuned trial until
    `UNTUNED`; the rest is for training again on all rows.
    """

    runner: PopulationRunner
    history: History
    journal: Journal | None
    store: StateStore
    started: float
    budget: float
    stop: Callable[[], bool]
    on_event: Callable[[dict[str, Any]], None]
    ended: str = ""

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.started + self.budget - time.perf_counter()

    @property
    def pace(self) -> float:
        """Seconds that an epoch of one member has taken so far."""
        epochs = max(self.history.epochs * self.runner.job.folds, 1)
        return sum(o.seconds for o in self.history) / epochs

    def past(self, share: float) -> bool:
        """Whether this share of the budget is used up."""
        return self.left < (1 - share) * self.budget if math.isfinite(self.budget) else False

    def run(self, search: Search) -> None:
        """Train what the search asks for until it is done, stopped, or out of time."""
        self.runner.expired = lambda: self.past(SEARCH)
        while trials := search.next(self.history):
            if self.history and self.past(SEARCH):
                self.ended = "the time budget was used up"
                return
            self.on_event({"event": "batch", "trials": len(trials), "budget": trials[0].budget})
            try:
                outcomes = self._train(trials)
            except Stopped:
                self.ended = "stopped by request"
                return
            self._forget()
            self.on_event({"event": "outcomes", "outcomes": outcomes, "history": self.history})

    def finish(self, space: Space, plan: Plan) -> None:
        """Train the untuned configuration too: one search in ten ends worse than it.

        Of the best trials, those whose weights are in another process are trained again here.
        """
        self.runner.expired = lambda: self.past(UNTUNED)
        best = searched(self.history).ranked()[:TOP]
        lost = [
            replace(o.trial, parent=None) for o in best if o.trial.id not in self.runner.states
        ]
        try:
            if lost:
                self.runner.run(lost)
            if DEFAULT not in self.history.ids:
                self._train([Trial(DEFAULT, default_config(space), plan.epochs)])
        except Stopped:
            self.ended = "stopped by request"

    def _train(self, trials: Sequence[Trial]) -> list[Outcome]:
        outcomes = self.runner.run(trials)
        self.store.save(self.runner.states, outcomes)
        if self.journal is not None:
            self.journal.extend(outcomes)
        self.history = self.history.extended(outcomes)
        return outcomes

    def _forget(self) -> None:
        """Drop the states of trials that were continued or are beaten: only ends are needed."""
        newest = self.history[-1].trial.budget
        kept = {o.trial.id for o in self.history if o.trial.budget == newest}
        kept |= {o.trial.id for o in self.history.ranked()[: 2 * TOP]}
        for id in [id for id in self.runner.states if id not in kept]:
            del self.runner.states[id]


def searched(history: History) -> History:
    """Without the untuned trial."""
    return History(o for o in history if o.trial.id != DEFAULT)
