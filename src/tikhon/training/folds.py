"""Strengths from the training rows alone: found on folds, followed by the run on all rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tikhon.copying import copied
from tikhon.data.batches import pair
from tikhon.data.rows import take
from tikhon.data.splits import dealt
from tikhon.errors import InputError
from tikhon.regularizer.regularizer import Regularizer
from tikhon.regularizer.terms import Term
from tikhon.runs.interrupt import Stopped
from tikhon.strengths.schedules import Recorded
from tikhon.training.loop import Training
from tikhon.training.recipe import Auto, Recipe
from tikhon.training.settings import Settings

FOLDS = 3
_PART = 3  # a fold makes this part of the run's steps,
_LEAST = 500  # but this many if the run does: in fewer no strength gets far
_TIME = 0.15  # of a budget, for each fold


@dataclass(frozen=True, eq=False)
class Folded:
    """What the runs on the folds found: at every share of the way the geometric mean of theirs."""

    regularizers: tuple[Regularizer, ...]
    seconds: float  # that it took

    def replay(self, steps: int) -> dict[object, list[Term]]:
        """The terms, with the strengths that were found as schedules of a run of `steps`."""
        runs = [regularizer.replay(steps) for regularizer in self.regularizers]
        return {
            name: [_mean(terms, steps) for terms in zip(*(run[name] for run in runs))]
            for name in runs[0]
        }


def found_on_folds(
    model: nn.Module,
    train: Any,
    recipe: Recipe,
    settings: Settings,
    unit: float,
    stop: Callable[[], bool],
) -> Folded:
    """The strengths "auto" of a recipe without validation rows.

    Copies of the model train on two thirds of the rows each, a third of the run's steps (and up to
    500 of a short run's); the strengths descend the loss of the third that was left out.

    Raises `InputError` for early stopping, an optimizer that is bound to the model and too few
    rows, `Stopped` when `stop` is true before the end.
    """
    if recipe.early_stopping is not None:
        raise InputError("early_stopping needs validation data: give `valid`")
    if isinstance(settings.optimizer, Optimizer):
        raise InputError(
            "strength 'auto' without `valid` trains copies of the model, and this optimizer is "
            "bound to the model: give its name, a factory of the parameters, or `valid`"
        )
    x, y = pair(train, name="train")
    if len(y) < 2 * FOLDS:
        raise InputError(
            f"strength 'auto' without `valid` leaves a third of the rows out in turn, and there "
            f"are {len(y)}: give a number, or more rows"
        )
    epochs = _epochs(len(y), settings)
    budget = None if settings.budget is None else _TIME * settings.budget
    short = dataclasses.replace(settings, epochs=epochs, budget=budget)
    place = dealt(y, FOLDS, seed=settings.seed)
    found, seconds = [], 0.0
    for fold in range(FOLDS):
        kept, left = (part.nonzero()[:, 0].to(y.device) for part in (place != fold, place == fold))
        rows, valid = take((x, y), kept), take((x, y), left)
        torch.manual_seed(settings.seed)
        training = Training(copied(model, model), rows, recipe, short, valid=valid, unit=unit)
        if training.run(stop=stop) == "stopped":
            raise Stopped("before the strengths were found")
        assert training.regularizer is not None
        found.append(training.regularizer)
        seconds += training.seconds
    torch.manual_seed(settings.seed)
    return Folded(tuple(found), seconds)


def adapts(recipe: Recipe) -> bool:
    """Whether a strength of the recipe is "auto"."""
    return any(isinstance(term.strength, Auto) for _, term in recipe.penalties)


def _epochs(rows: int, settings: Settings) -> int:
    """Epochs of a fold."""
    whole, own = (
        math.ceil(count / settings.batch_size) for count in (rows, rows * (FOLDS - 1) / FOLDS)
    )
    steps = whole * settings.epochs
    return math.ceil(max(steps / _PART, min(steps, _LEAST)) / own)


def _mean(terms: Sequence[Term], steps: int) -> Term:
    places = [t.strength.strengths for t in terms if isinstance(t.strength, Recorded)]
    if len(places) < len(terms):
        return terms[0]
    length = max(map(len, places))
    logs = [
        sum(math.log(max(s[k * len(s) // length], 1e-30)) for s in places) / len(places)
        for k in range(length)
    ]
    return dataclasses.replace(terms[0], strength=Recorded(tuple(map(math.exp, logs)), steps))
