"""Plan a search from a budget and a measurement: members, epochs, chunk size."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from tikhon.budget import Budget
from tikhon.errors import InputError
from tikhon.options import split_name
from tikhon.tuning.runners import SearchJob, choose_chunk, step_time
from tikhon.tuning.searches import SpaceFilling
from tikhon.tuning.space import KNOWN, Choice, Space
from tikhon.tuning.trials import Config, Value

MEMBERS = 16  # as good as 64, as selection noise hides the difference
HALVING_COST = 0.6  # cost of guarded halving with validation, in full trainings for each member
REFIT_COST = 9  # full trainings reserved for the default and the refits
TARGET_EPOCHS = 60  # epochs if time allows, as many rows keep improving
DEFAULTS = {"lr": 3e-3, "dropout": 0.1, "weight_decay": 0.01}


@dataclass(frozen=True)
class SearchPlan:
    """Decisions made before the first trial, stored in the journal for resuming.

    `microseconds` holds the chunk size and the measured time of a step for each member; `threads`
    is torch's thread count (0 if unknown), which like the chunk size affects rounding.
    """

    members: int
    epochs: int
    chunk: int
    seconds: float | None = None
    reason: str = ""
    microseconds: tuple[tuple[int, float], ...] = ()
    threads: int = 0

    def expected(self, searching: int, refitting: int) -> float | None:
        """Estimate the total seconds; `searching` and `refitting` are the steps in an epoch of one
        member, in the search with its folds, and on all rows.
        """
        if self.seconds is not None or not self.microseconds:
            return self.seconds
        trials = 1 + (HALVING_COST * self.members if self.members > 1 else 1)
        steps = self.epochs * (trials * searching + (REFIT_COST - 1) * refitting)
        return steps * self.microseconds[0][1] * 1e-6

    def to_dict(self) -> dict[str, object]:
        """Return a JSON-serialisable dict."""
        return {**asdict(self), "microseconds": [list(pair) for pair in self.microseconds]}


def make_plan(
    job: SearchJob, space: Space, budget: str | None, *, fixed: bool = False
) -> SearchPlan:
    """Choose the chunk size from the model, and members and epochs from the budget.

    A budget in runs gives the same plan on every machine; for one in seconds a step is timed, and
    the plan is stored in the journal. Time goes to trainings of `LONG` epochs first (unless the
    length is `fixed`), then to more members.

    Raises `InputError` for a budget too small for one trial.
    """
    given = Budget.parse(budget)
    seconds, runs = given.seconds, given.runs
    configs = SpaceFilling(space, count=MEMBERS).configs()
    chunk, reason = choose_chunk(job, configs)
    step_microseconds = step_time(job, configs, chunk)
    measured, threads = ((chunk, step_microseconds),), torch.get_num_threads()
    if seconds is None:
        members = (runs or MEMBERS) if space.varying else 1
        return SearchPlan(members, job.epochs, chunk, None, reason, measured, threads)
    step = step_microseconds * 1e-6 * job.folds
    epoch = step * job.steps_per_epoch * 1.15  # validation, checks
    affordable = 0.8 * seconds / epoch
    min_epochs = 3 * math.ceil(job.epochs / 4)
    if affordable < min_epochs:
        raise InputError(
            f"a budget of {seconds:g} s is too small: one trial of {math.ceil(job.epochs / 4)} "
            f"epochs, the default and one refit take about {min_epochs * epoch:.1f} s; "
            "give more time or fewer epochs"
        )
    min_members, max_epochs = MEMBERS // 2, job.epochs if fixed else max(job.epochs, TARGET_EPOCHS)
    epochs = min(int(affordable / (0.5 * REFIT_COST + HALVING_COST * min_members)), max_epochs)
    epochs = max(epochs, math.ceil(job.epochs / 4))
    trainings = affordable / epochs
    members = min(int((trainings - REFIT_COST / max(job.folds, 1)) / HALVING_COST), 64)
    members = max(members, min(min_members, int((trainings - 2) / HALVING_COST)), 1)
    if not space.varying:
        members = 1
    return SearchPlan(members, epochs, chunk, seconds, reason, measured, threads)


def configs_near_defaults(space: Space, count: int) -> list[dict[str, Value]]:
    """Return at most `count` configurations to try first: those closest to common defaults, with
    each value of the first choice.
    """
    defaults = {**default_config(space), **space.fixed}
    for name in space.varying:
        entry = space.range(name)
        base_name = split_name(name)[0]
        if not isinstance(entry, Choice):
            unit = 0.0 if base_name in KNOWN else 0.5
            if base_name in DEFAULTS:
                unit = entry.unit(DEFAULTS[base_name])
            defaults[name] = entry.at(min(max(unit, 0.0), 1.0))
        elif name not in defaults or defaults[name] not in entry.values:
            defaults[name] = entry.values[0]
    choices = [n for n in space.varying if isinstance(space.range(n), Choice)][:1]
    variants = [{name: value} for name in choices for value in space.range(name).grid(count)]
    return [space.resolved({**defaults, **variant}) for variant in (variants or [{}])][:count]


def default_config(space: Space) -> Config:
    """Return the untuned configuration: fixed entries, and defaults for the others."""
    config: dict[str, Value] = {
        name: DEFAULTS["weight_decay"] if entry == "auto" else entry
        for name, entry in space.fixed.items()
    }
    for name in space.varying:
        entry = space.range(name)
        base_name, _ = split_name(name)
        if base_name == "lr" and name != base_name:
            config[name] = entry.at(0.5)  # there is no default for parts of a model
        elif base_name in DEFAULTS:
            config[name] = DEFAULTS[base_name]
        elif isinstance(entry, Choice):
            config[name] = entry.values[0]
        else:
            config[name] = entry.at(0.0)
    return space.resolved(config)
