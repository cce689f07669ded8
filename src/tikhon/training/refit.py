"""Train again on all rows, replaying the strengths found by the first training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from tikhon.data.nested import concatenate
from tikhon.errors import InputError
from tikhon.regularizer.regularizer import Regularizer
from tikhon.regularizer.terms import Term
from tikhon.strengths.hypergradient import Hypergradient
from tikhon.training.loop import Training
from tikhon.training.recipe import Auto, Recipe
from tikhon.training.strength_verdicts import has_adapted_strengths


def check_refit(training: Training) -> None:
    """Raise `InputError` where a refit could not repeat the training."""
    if isinstance(training.settings.optimizer, Optimizer):
        raise InputError(
            "refit trains a second model from the same start, and this optimizer is bound to the "
            "first: give its name, or a factory of the parameters"
        )
    if training.stream.held is None:
        raise InputError("refit joins train and valid in memory: give rows, not a loader")
    if training.valid is None:
        raise InputError("refit trains on train + valid: give `valid`")
    if not has_adapted_strengths(training.regularizer):
        raise InputError(
            "refit uses strengths found by a first training, and this recipe has none: "
            "give a penalty the strength 'auto'"
        )
    if training.recipe.early_stopping is not None:
        raise InputError("refit has no validation rows to stop early by: leave early_stopping out")


def with_found_strengths(recipe: Recipe, regularizer: Regularizer | None) -> Recipe | None:
    """Return the recipe with adapted strengths as numbers; None if none adapted."""
    if regularizer is None or not has_adapted_strengths(regularizer):
        return None
    found = {
        live.name: float(live.value)
        for live in regularizer.live_strengths()
        if isinstance(live.source, Hypergradient)
    }
    terms = [pair for pair in recipe.penalties if not isinstance(pair[1].strength, Auto)]
    for parameter, replayed in regularizer.replay(1).items():
        for term in replayed:
            strength = found.pop(f"{parameter}/{type(term.penalty).__name__}", None)
            if strength is not None:
                rows = None if term.rows == term.penalty.rows else term.rows
                penalty = term.penalty.with_strength(strength)
                terms.append((parameter, Term(penalty, rows, term.how)))
    return None if found else dataclasses.replace(recipe, penalties=tuple(terms))


def refit_on_all_rows(
    training: Training, start: nn.Module, stop: Callable[[], bool]
) -> str | None:
    """Retrain `start` on train + valid and load it into `training`; return "stopped" if stopped.

    The rows of `training` become train + valid, as all of them have been trained on.
    """
    assert training.valid is not None and training.regularizer is not None
    rows = concatenate([(training.x, training.y), training.valid])
    torch.manual_seed(training.settings.seed)
    settings = dataclasses.replace(training.settings, budget=None)
    refitted = Training(
        start, rows, training.recipe, settings, unit=training.unit, recorded=training.regularizer
    )
    if refitted.run(stop=stop) == "stopped":
        return "stopped"
    training.model.load_state_dict(refitted.model.state_dict())
    training.x, training.y, training.valid = refitted.x, refitted.y, None
    training.seconds += refitted.seconds
    training.regularizer, training.sparsifier = refitted.regularizer, refitted.sparsifier
    return None
