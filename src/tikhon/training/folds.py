"""Tune "auto" strengths on cross-validation folds of the training rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tikhon.copying import copy_with_model
from tikhon.data.batches import pair
from tikhon.data.nested import take_rows
from tikhon.data.splits import assign_parts
from tikhon.errors import InputError
from tikhon.regularizer.regularizer import Regularizer
from tikhon.regularizer.terms import Term
from tikhon.runs.interrupt import Stopped
from tikhon.strengths.schedules import Recorded
from tikhon.training.loop import Training
from tikhon.training.recipe import Auto, Recipe
from tikhon.training.settings import Settings

FOLDS = 3
_STEP_DIVISOR = 3  # a fold takes the run's steps divided by this,
_MIN_STEPS = 500  # but at least this many (or all the run has): strengths need time to adapt
_TIME_SHARE = 0.15  # share of the time budget, for each fold


@dataclass(frozen=True, eq=False)
class FoldStrengths:
    """Strengths found on the folds, combined by their geometric mean at each point of training."""

    regularizers: tuple[Regularizer, ...]
    seconds: float  # spent on the folds

    def replay(self, steps: int) -> dict[object, list[Term]]:
        """Return the terms with the strengths found, as schedules over `steps` steps."""
        runs = [regularizer.replay(steps) for regularizer in self.regularizers]
        return {
            name: [_mean(terms, steps) for terms in zip(*(run[name] for run in runs))]
            for name in runs[0]
        }


def tune_on_folds(
    model: nn.Module,
    train: Any,
    recipe: Recipe,
    settings: Settings,
    unit: float,
    stop: Callable[[], bool],
) -> FoldStrengths:
    """Tune the "auto" strengths of a recipe when there are no validation rows.

    On each fold a copy of the model trains on two thirds of the rows, for a third of the run's
    steps (at least 500, if the run has them), while the strengths descend the loss on the rest.

    Raises `InputError` for early stopping, an optimizer instance bound to the model, and too few
    rows; `Stopped` if `stop` returns true before the end.
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
    budget = None if settings.budget is None else _TIME_SHARE * settings.budget
    short = dataclasses.replace(settings, epochs=epochs, budget=budget)
    fold_of_row = assign_parts(y, FOLDS, seed=settings.seed)
    found, seconds = [], 0.0
    for fold in range(FOLDS):
        train_rows, valid_rows = (
            part.nonzero()[:, 0].to(y.device)
            for part in (fold_of_row != fold, fold_of_row == fold)
        )
        rows, valid = take_rows((x, y), train_rows), take_rows((x, y), valid_rows)
        torch.manual_seed(settings.seed)
        training = Training(
            copy_with_model(model, model), rows, recipe, short, valid=valid, unit=unit
        )
        if training.run(stop=stop) == "stopped":
            raise Stopped("before the strengths were found")
        assert training.regularizer is not None
        found.append(training.regularizer)
        seconds += training.seconds
    torch.manual_seed(settings.seed)
    return FoldStrengths(tuple(found), seconds)


def has_auto_strength(recipe: Recipe) -> bool:
    """Return whether any strength of the recipe is "auto"."""
    return any(isinstance(term.strength, Auto) for _, term in recipe.penalties)


def _epochs(rows: int, settings: Settings) -> int:
    """Number of epochs to train on each fold."""
    all_batches, fold_batches = (
        math.ceil(count / settings.batch_size) for count in (rows, rows * (FOLDS - 1) / FOLDS)
    )
    steps = all_batches * settings.epochs
    return math.ceil(max(steps / _STEP_DIVISOR, min(steps, _MIN_STEPS)) / fold_batches)


def _mean(terms: Sequence[Term], steps: int) -> Term:
    recorded = [t.strength.strengths for t in terms if isinstance(t.strength, Recorded)]
    if len(recorded) < len(terms):
        return terms[0]
    length = max(map(len, recorded))
    logs = [
        sum(math.log(max(s[k * len(s) // length], 1e-30)) for s in recorded) / len(recorded)
        for k in range(length)
    ]
    return dataclasses.replace(terms[0], strength=Recorded(tuple(map(math.exp, logs)), steps))
