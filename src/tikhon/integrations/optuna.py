"""Search with several processes that share an Optuna study.

Needs `pip install tikhon[search]`. A process asks for a batch of trials and trains it as one
population; `optuna-dashboard` can show the storage.
"""

# named like the package it imports, which misleads the type checker:
# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import math
import os
import random
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tikhon.errors import InputError, StorageError
from tikhon.tuning.plan import SearchPlan
from tikhon.tuning.searches import Search
from tikhon.tuning.space import Choice, Int, Log, Space
from tikhon.tuning.trials import History, Outcome, Trial

try:
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from optuna.trial import TrialState
except ImportError as error:
    raise ImportError("this search needs Optuna: pip install tikhon[search]") from error

OPEN_ATTEMPTS = 5


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Convert a space to Optuna's distributions."""
    found: dict[str, BaseDistribution] = {}
    for name in space.varying:
        entry = space.range(name)
        if isinstance(entry, Choice):
            if any(isinstance(value, tuple) for value in entry.values):
                raise InputError(
                    f"space entry {name!r} holds tuples, which a study of Optuna cannot store: "
                    "name them by strings, and look them up in build_model"
                )
            found[name] = CategoricalDistribution(list(entry.values))
        elif isinstance(entry, Int):
            found[name] = IntDistribution(int(entry.low), int(entry.high), log=entry.log)
        else:
            found[name] = FloatDistribution(entry.low, entry.high, log=isinstance(entry, Log))
    return found


@dataclass(frozen=True)
class SharedSearch(Search):
    """One of several processes on one study, each training populations of `batch` trials.

    A process sends a heartbeat every few seconds; trials of one silent for `grace` seconds are
    failed and retried by others, once each.
    """

    storage: str = ""
    count: int = 64
    batch: int = 16
    budget: int = 1
    seed: int = 0
    name: str = "tikhon"
    grace: float = 60.0
    open: dict[int, Any] = field(default_factory=dict, compare=False)
    cache: dict[str, Any] = field(default_factory=dict, compare=False)

    def next(self, history: History) -> list[Trial]:
        """Report finished trials, take over abandoned ones, ask for a batch; [] at the end."""
        study = self._study()
        self._report_outcomes(study, history)
        while True:
            self._retry_abandoned(study)
            trials = self._request_trials(study)
            if trials or not self._has_unfinished_elsewhere(study):
                return trials
            time.sleep(min(1.0, self.grace / 4))

    def collect(self, history: History) -> History:
        """Return the history with outcomes of all processes, by trial number."""
        found = {o.trial.id: o for o in history}
        for trial in self._study().get_trials(deepcopy=False):
            row = trial.user_attrs.get("outcome")
            if row is not None and trial.number not in found:
                found[trial.number] = Outcome.from_dict(row)
        return History(found[number] for number in sorted(found))

    def _study(self) -> optuna.Study:
        if "study" not in self.cache:
            sampler = optuna.samplers.TPESampler(seed=self.seed + os.getpid())
            self.cache["study"] = _open_study(self.storage, self.name, sampler)
            self._check_space(self.cache["study"])
            threading.Thread(target=self._send_heartbeats, daemon=True).start()
        return self.cache["study"]

    def _check_space(self, study: optuna.Study) -> None:
        stored = study.user_attrs.get("space")
        if stored is None:
            study.set_user_attr("space", self.space.to_dict())
        elif stored != self.space.to_dict():
            raise InputError(
                f"the study in {self.storage} searches another space: {stored}, now "
                f"{self.space.to_dict()}; use another storage"
            )

    def _request_trials(self, study: optuna.Study) -> list[Trial]:
        fixed = self.space.fixed
        found = []
        for _ in range(self.batch):
            trials = study.get_trials(deepcopy=False)
            if _count_new(trials) >= self.count:
                if all(t.state is not TrialState.WAITING for t in trials):
                    break
            trial = study.ask(distributions(self.space))
            again = trial.user_attrs.get("retried")
            if again is None:  # counted anew: another process may have been faster
                earlier = study.get_trials(deepcopy=False)[: trial.number]
                surplus = _count_new(earlier) >= self.count
            else:
                surplus = _retry_numbers(study)[again] < trial.number
            if surplus:
                trial.set_user_attr("surplus", True)
                study.tell(trial, state=TrialState.FAIL)
                continue
            trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")
            trial.set_user_attr("beat", time.time())
            self.open[trial.number] = trial
            config = self.space.resolved({**fixed, **trial.params})
            found.append(Trial(trial.number, config, self.budget))
        return found

    def _report_outcomes(self, study: optuna.Study, history: History) -> None:
        for outcome in history:
            trial = self.open.pop(outcome.trial.id, None)
            if trial is None:
                continue
            # a trial whose process was silent for too long is another's by now
            with suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                trial.set_user_attr("outcome", outcome.to_dict())
                if outcome.failed:
                    study.tell(trial, state=TrialState.FAIL)
                else:
                    study.tell(trial, outcome.score)

    def _retry_abandoned(self, study: optuna.Study) -> None:
        """Fail the trials of silent processes and enqueue their configurations again."""
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
            last = max(trial.user_attrs.get("beat", 0.0), started)
            if trial.number in self.open or time.time() - last < self.grace:
                continue
            outcome = trial.user_attrs.get("outcome")
            if outcome is None and trial.number not in _retry_numbers(study):  # before it fails:
                study.enqueue_trial(trial.params, user_attrs={"retried": trial.number})
            with suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                if outcome is None or outcome["score"] is None:
                    study.tell(trial.number, state=TrialState.FAIL)
                else:  # it had ended, but was not reported
                    study.tell(trial.number, outcome["score"])

    def _has_unfinished_elsewhere(self, study: optuna.Study) -> bool:
        """Return whether a trial is running in another process, or waiting."""
        states = (TrialState.RUNNING, TrialState.WAITING)
        waiting = study.get_trials(deepcopy=False, states=states)
        return any(trial.number not in self.open for trial in waiting)

    def _send_heartbeats(self) -> None:
        while True:
            time.sleep(self.grace / 6)
            for trial in list(self.open.values()):
                with suppress(Exception):  # a finished trial, or an unavailable storage
                    trial.set_user_attr("beat", time.time())


def _open_study(storage: str, name: str, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
    """Open or create the study, retrying where processes create its tables simultaneously."""
    for attempt in range(1, OPEN_ATTEMPTS + 1):
        try:
            with _silenced_log():
                return optuna.create_study(
                    storage=storage_of(storage),
                    study_name=name,
                    load_if_exists=True,
                    sampler=sampler,
                )
        except Exception as error:
            ours = isinstance(error, optuna.exceptions.OptunaError)
            if not ours and not type(error).__module__.startswith("sqlalchemy"):
                raise
            if attempt == OPEN_ATTEMPTS:
                where = urlsplit(storage).hostname or "there"  # the URL may contain a password
                raise StorageError(
                    f"the storage of the search ({where}) cannot be opened: {error}"
                ) from error
        time.sleep(attempt * random.uniform(0.1, 0.5))
    raise AssertionError


def _count_new(trials: Sequence[optuna.trial.FrozenTrial]) -> int:
    """Count the trials that repeat no other."""
    return sum("retried" not in trial.user_attrs for trial in trials)


def _retry_numbers(study: optuna.Study) -> dict[int, int]:
    """Map retried trials to the first trial that repeats each.

    If two processes enqueue one simultaneously, the second copy is not trained.
    """
    found: dict[int, int] = {}
    for trial in study.get_trials(deepcopy=False):
        if "retried" in trial.user_attrs:
            found.setdefault(trial.user_attrs["retried"], trial.number)
    return found


def shared_search(
    storage: str, *, name: str = "tikhon", grace: float = 60.0, seed: int = 0, workers: int = 1
) -> Callable[[Space, SearchPlan], Search]:
    """Return a `search` for `tune` that joins or creates the study in `storage`.

    A batch is the best size to train at once, but leaves work for each of `workers` processes.
    """

    def build(space: Space, plan: SearchPlan) -> Search:
        if plan.seconds is not None:
            raise InputError(
                "a shared search needs a budget in runs, such as 64runs: every "
                "process must plan the same"
            )
        return SharedSearch(
            space,
            storage=storage,
            count=plan.members,
            budget=plan.epochs,
            seed=seed,
            name=name,
            grace=grace,
            batch=min(plan.chunk, math.ceil(plan.members / workers)),
        )

    return build


def storage_of(url: str) -> optuna.storages.BaseStorage | str:
    """Open `journal:PATH` as a shared journal file; anything else is a database URL."""
    if not url.startswith("journal:"):
        return url
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path = os.path.abspath(url.removeprefix("journal:"))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with _silenced_log():
        return JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path)))


@contextmanager
def _silenced_log() -> Iterator[None]:
    """Silence Optuna's log within the block."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
