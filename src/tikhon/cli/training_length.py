"""Choose the length of a training without --epochs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tikhon.training.recipe import Recipe

FIXED = 20  # epochs if the number must be fixed beforehand
SECONDS = 60.0  # limit of a training of open length
_PATIENCE = 10, 100  # epochs, or this many steps if longer
_ANNOUNCED_FROM = 3_000  # steps from which the training time is announced
_TIMED_STEPS = 20  # steps timed to estimate it
_LIMITS = 100, 20_000, 2_000  # epochs, or this many steps if longer, up to a maximum of epochs


@dataclass(frozen=True)
class TrainingLength:
    """Maximal epochs, patience in epochs, maximal seconds, and a description."""

    epochs: int
    patience: int | None
    budget: float | None
    words: str


def choose_length(
    epochs: int | None, budget: float | None, recipe: Recipe, *, batches: int, needs: str
) -> TrainingLength:
    """Train for `epochs`, or by default until the validation loss stops improving.

    `needs` names what requires a fixed number of epochs, if anything; the default is then `FIXED`.
    """
    patience = recipe.early_stopping
    if epochs is None and needs:
        return TrainingLength(
            FIXED, patience, budget, f"{FIXED} epochs, because {needs}; or --epochs N"
        )
    if epochs is not None:
        return TrainingLength(epochs, patience, budget, "")
    patience = patience or max(_PATIENCE[0], -(-_PATIENCE[1] // batches))
    most = min(_LIMITS[2], max(_LIMITS[0], -(-_LIMITS[1] // batches)))
    budget = SECONDS if budget is None else budget
    words = (
        f"until the validation loss has not improved for {patience} epochs; "
        f"at most {most:,} epochs and {budget:g} s"
    )
    return TrainingLength(most, patience, budget, words)


def why_fixed_length(recipe: Recipe, schedule: str, *, refit: bool, validated: bool) -> str:
    """Return why a training needs a fixed number of epochs, or ""."""
    if not validated:
        return "there are no validation rows to stop by"
    if refit:
        return "--refit trains twice"
    if schedule != "constant":
        return f"schedule {schedule} spans them"
    if recipe.sparsify is not None:
        return "sparsify takes weights away over them"
    if recipe.averaging == "swa":
        return "swa averages the last quarter of them"
    for entry in recipe.to_dict().get("penalties", []):
        strength = entry.get("strength", 0.0)  # "auto" follows the validation loss to the end
        if strength != "auto" and not isinstance(strength, int | float):
            return f"the strength of {entry['penalty']} moves over them"
    return ""


def estimate_seconds(
    network: nn.Module, x: Tensor, y: Tensor, training: Mapping[str, Any]
) -> float | None:
    """Estimate the seconds of all epochs by timing a few steps on a copy, without penalties and
    validation; None for short trainings.
    """
    import torch

    from tikhon.copying import copy_with_model
    from tikhon.training.losses import loss_of
    from tikhon.training.step import Step

    size = training["batch_size"]
    steps = -(-len(x) // size) * training["epochs"]
    if steps < _ANNOUNCED_FROM:
        return None
    model, loss = copy_with_model(network, network), loss_of(training["loss"], y)
    optimizer = torch.optim.AdamW(model.parameters())
    step = Step(model, optimizer, lambda batch: loss(model(batch[0]), batch[1]))
    began = 0.0
    with torch.random.fork_rng(devices=[]):
        for number in range(_TIMED_STEPS + 1):
            if number == 1:  # the first step initialises the optimizer
                began = time.perf_counter()
            step((x[:size], y[:size]))
    return (time.perf_counter() - began) / _TIMED_STEPS * steps
