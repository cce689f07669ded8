"""Population-based tuning of a strength, scored on every fold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from tikhon.tuning.searches import Design, PopulationBased
from tikhon.tuning.space import Log, Space
from tikhon.tuning.trials import History, Outcome, Value

if TYPE_CHECKING:
    from tikhon.sklearn.fitting import RegularizedNetwork

_ROUNDS = 8  # exchanges between members

Models: TypeAlias = "list[RegularizedNetwork]"  # one for each fold
TrainFunction: TypeAlias = (
    "Callable[[Models | None, float, int], Models]"  # (parent's models, alpha, epochs)
)


@dataclass(frozen=True)
class FixedDesign(Design):
    """Start a population from given strengths."""

    alphas: tuple[float, ...] = ()

    def configs(self) -> list[dict[str, Value]]:
        """Return one member for each strength."""
        return [{"alpha": alpha} for alpha in self.alphas]


@dataclass(frozen=True)
class Generation:
    """The last generation, strongest penalty first, and the history of its best member."""

    alphas: np.ndarray
    scores: np.ndarray  # (members, folds)
    schedule: list[tuple[float, int]]  # (strength, epochs) of the best member, from the start


def evolve(
    alphas: Sequence[float],
    epochs: int,
    seed: int,
    train: TrainFunction,
    score: Callable[[Models], list[float]],
) -> Generation:
    """Train one member for each strength on all folds; the worst quarter copies the best.

    A member is one model for each fold; its score is the mean over folds. Raises ValueError for
    fewer than two distinct strengths, or one that is 0.

    Reference: Jaderberg et al. (2017), https://arxiv.org/abs/1711.09846.
    """
    if len(set(alphas)) < 2 or min(alphas) <= 0:
        raise ValueError(
            f"a population needs two different strengths or more, all > 0; received "
            f"alphas={[float(alpha) for alpha in alphas]}"
        )
    space = Space(alpha=Log(float(min(alphas)), float(max(alphas))))
    design = FixedDesign(space, alphas=tuple(map(float, alphas)))
    interval = max(1, -(-epochs // _ROUNDS))
    search = PopulationBased(space, design, full=epochs, interval=interval, seed=seed)
    history, models, scores = History(), {}, {}
    while trials := search.next(history):
        previous = models
        models = {}
        for trial in trials:
            epochs_done = 0 if trial.parent is None else history.of(trial.parent).trial.budget
            start = None if trial.parent is None else copy.deepcopy(previous[trial.parent])
            alpha = float(trial.config["alpha"])
            models[trial.id] = train(start, alpha, trial.budget - epochs_done)
            scores[trial.id] = score(models[trial.id])
        history = history.extended(
            Outcome(trial, -float(np.mean(scores[trial.id]))) for trial in trials
        )
    last = sorted(models, key=lambda i: -float(history.of(i).trial.config["alpha"]))
    best = max(last, key=lambda i: np.mean(scores[i]))  # strongest penalty on ties
    rounds = [outcome.trial for outcome in history.lineage(best)][::-1]
    boundaries = [0, *(trial.budget for trial in rounds)]
    return Generation(
        np.array([float(history.of(i).trial.config["alpha"]) for i in last]),
        np.array([scores[i] for i in last]),
        [
            (float(t.config["alpha"]), t.budget - epochs_done)
            for epochs_done, t in zip(boundaries, rounds)
        ],
    )
