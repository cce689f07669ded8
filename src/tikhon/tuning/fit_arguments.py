"""Convert a configuration to arguments of `fit`: a recipe and settings."""

from __future__ import annotations

from functools import partial
from typing import Any

from tikhon.options import STRENGTHS, RecipeOptions, options_of, split_name
from tikhon.penalties import L2, Penalty, penalty_names
from tikhon.regularizer.terms import Term
from tikhon.training.losses import LOSSES
from tikhon.training.recipe import Auto, Recipe
from tikhon.training.settings import OPTIMIZERS
from tikhon.tuning.runners import SearchJob, with_settings
from tikhon.tuning.trials import Config, Value


def recipe_of(config: Config) -> Recipe:
    """Return the regularization of a configuration, with the mode of each strength.

    >>> recipe_of({"lr": 0.1, "weight_decay": 0.01}).to_dict()["penalties"][0]["how"]
    'decoupled'
    """
    terms: dict[str, list[Penalty | Term]] = {}
    more: dict[str, Any] = {}
    others = options_of(RecipeOptions)
    for name, value in config.items():
        own, pattern = split_name(name)
        if own == "dropout":
            more.setdefault(own, {})[pattern] = float(value)
        elif own == "lr" and name != own:
            more.setdefault("learning_rates", {})[pattern] = float(value)
        elif own in others:
            more[own] = float(value)
        elif own in (*STRENGTHS, "max_norm") and value:
            terms.setdefault(pattern, []).append(_term(own, value))
    if set(rates := more.get("dropout", {})) == {"*"}:
        more["dropout"] = rates["*"]
    return Recipe(terms or (), **more)


def _term(name: str, value: Value) -> Penalty | Term:
    if name == "weight_decay":
        if value == "auto":
            return Term(L2(), how="decoupled", strength=Auto())
        return Term(L2(float(value)), how="decoupled")
    return penalty_names()[name](float(value))


def settings_of(config: Config, job: SearchJob) -> dict[str, object]:
    """Return the other settings of a trial, named as arguments of `fit`."""
    job = with_settings(job, config)
    known = {kind: name for name, kind in OPTIMIZERS.items()}
    loss, lr = job.objective.loss, float(config.get("lr", 1e-3))
    own = partial(job.optimizer, lr=lr, weight_decay=0.0)  # an unnamed factory
    return {
        "lr": lr,
        "schedule": "cosine",
        "optimizer": known.get(job.optimizer, own),  # type: ignore[call-overload]
        "batch_size": job.batch_size,
        "epochs": job.epochs,
        "loss": loss.name if LOSSES.get(loss.name) is loss else loss.function,
        "seed": int(config.get("seed", job.seed)),
    }
