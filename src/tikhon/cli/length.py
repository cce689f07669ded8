"""How long a training lasts when --epochs does not say."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tikhon.training.recipe import Recipe

FIXED = 20  # epochs of what must know its length beforehand
SECONDS = 60.0  # after which an open training ends
_PATIENCE = 10, 100  # epochs, or steps if these are more
_LONG = 3_000  # steps of a training whose time is told before it starts
_TIMED = 20  # steps that tell it
_MOST = 100, 20_000, 2_000  # epochs, or steps if these are more, but no more epochs than that


@dataclass(frozen=True)
class Length:
    """Epochs at most, patience in epochs, seconds at most, and the same in words."""

    epochs: int
    patience: int | None
    budget: float | None
    words: str


def length_of(
    epochs: int | None, budget: float | None, recipe: Recipe, *, batches: int, needs: str
) -> Length:
    """Exactly `epochs`; without them until the validation loss stops improving.

    `needs` names what must know the number of epochs beforehand, if anything does: `FIXED` then.
    """
    patience = recipe.early_stopping
    if epochs is None and needs:
        return Length(FIXED, patience, budget, f"{FIXED} epochs, because {needs}; or --epochs N")
    if epochs is not None:
        return Length(epochs, patience, budget, "")
    patience = patience or max(_PATIENCE[0], -(-_PATIENCE[1] // batches))
    most = min(_MOST[2], max(_MOST[0], -(-_MOST[1] // batches)))
    budget = SECONDS if budget is None else budget
    words = (
        f"until the validation loss has not improved for {patience} epochs; "
        f"at most {most:,} epochs and {budget:g} s"
    )
    return Length(most, patience, budget, words)


def needs_length(recipe: Recipe, schedule: str, *, refit: bool, validated: bool) -> str:
    """What of a training depends on its number of epochs, in words; empty if nothing does."""
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
        if not isinstance(entry.get("strength", 0.0), int | float):
            return f"the strength of {entry['penalty']} moves over them"
    return ""


def training_time(
    network: nn.Module, x: Tensor, y: Tensor, training: Mapping[str, Any]
) -> float | None:
    """Seconds that all epochs will take, by the time of a few steps on a copy; None for a short
    training, which nobody waits for. Penalties and validation come on top.
    """
    import torch

    from tikhon.copying import copied
    from tikhon.training.losses import loss_of
    from tikhon.training.step import Step

    size = training["batch_size"]
    steps = -(-len(x) // size) * training["epochs"]
    if steps < _LONG:
        return None
    model, loss = copied(network, network), loss_of(training["loss"], y)
    optimizer = torch.optim.AdamW(model.parameters())
    step = Step(model, optimizer, lambda batch: loss(model(batch[0]), batch[1]))
    began = 0.0
    with torch.random.fork_rng(devices=[]):
        for number in range(_TIMED + 1):
            if number == 1:  # the first step also makes the optimizer's state
                began = time.perf_counter()
            step((x[:size], y[:size]))
    return (time.perf_counter() - began) / _TIMED * steps
