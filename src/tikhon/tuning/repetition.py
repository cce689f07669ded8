"""A configuration as what `fit` takes: a recipe, and the settings beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

from tikhon.options import RecipeOptions, options_of
from tikhon.penalties import L2, MaxNorm
from tikhon.population.hyperparameters import PENALTIES
from tikhon.regularizer.terms import Term
from tikhon.training.losses import LOSSES
from tikhon.training.recipe import Auto, Recipe, penalty_names
from tikhon.training.settings import OPTIMIZERS
from tikhon.tuning.runners import Config, Job


def recipe_of(config: Config) -> Recipe:
    """The regularization of a configuration, with the mode of every strength.

    >>> recipe_of({"lr": 0.1, "weight_decay": 0.01}).to_dict()["penalties"][0]["how"]
    'decoupled'
    """
    terms: list[Any] = []
    if (decay := config.get("weight_decay")) == "auto":
        terms.append(Term(L2(), how="decoupled", strength=Auto()))
    elif decay:
        terms.append(Term(L2(float(decay)), how="decoupled"))
    kinds = penalty_names()
    terms += [kinds[name](float(config[name])) for name in PENALTIES if config.get(name)]
    if "max_norm" in config:
        terms.append(MaxNorm(float(config["max_norm"])))
    own = options_of(RecipeOptions)
    more: dict[str, Any] = {name: float(value) for name, value in config.items() if name in own}
    return Recipe({"*": terms} if terms else (), **more)


def settings_of(config: Config, job: Job) -> dict[str, Any]:
    """What a trial was trained with beside its recipe, under the names of `fit`'s arguments."""
    known = {kind: name for name, kind in OPTIMIZERS.items()}
    loss, lr = job.objective.loss, float(config.get("lr", 1e-3))
    own = partial(job.optimizer, lr=lr, weight_decay=0.0)  # a factory that has no name
    return {
        "lr": lr,
        "schedule": "cosine",
        "optimizer": known.get(job.optimizer, own),  # type: ignore[call-overload]
        "batch_size": job.batch_size,
        "epochs": job.epochs,
        "loss": loss.name if loss.name in LOSSES else loss.function,
        "seed": int(config.get("seed", job.seed)),
    }
