"""tikhon fit: train a network on data by a recipe (the options; `fitting` carries them out)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tikhon.cli.groups import OptionGroup, flag, values_of
from tikhon.cli.options import (
    Data,
    DataDir,
    Given,
    Output,
    Penalties,
    RecipeGiven,
    Strengths,
)
from tikhon.cli.request import ModelOptions, Request, Shares
from tikhon.cli.tables import Rows
from tikhon.options import (
    MODES,
    OUTPUT,
    REGULARIZATION,
    TrainingOptions,
    options_of,
)

_told = options_of(TrainingOptions)
_told["epochs"] = (_told["epochs"][0], None)  # omitted: train until no improvement
_ORDER = ("epochs", "budget", "optimizer", "lr", "momentum", "schedule", "loss", "batch_size")
Training = Annotated[Given, OptionGroup({n: _told[n] for n in (*_ORDER, "seed", "device")}, dict)]
How = Annotated[
    str | None,
    flag(
        "Add penalties to the objective, or apply them decoupled, as AdamW does.",
        REGULARIZATION,
        "MODE",
        shown="objective",
        names=MODES,
    ),
]
Refit = Annotated[
    bool,
    flag(
        "Train again on training and validation rows with the strengths that auto found.",
        REGULARIZATION,
    ),
]
RecipeFile = Annotated[
    Path | None,
    flag("Recipe from a .toml or .json file or a run's folder.", REGULARIZATION, "FILE"),
]
CheckpointEvery = Annotated[float, flag("Seconds between checkpoints.", OUTPUT)]


def fit(
    data: Data,
    shares: Annotated[Shares, values_of(Shares)],
    table: Rows,
    data_dir: DataDir = None,
    *,
    network: Annotated[ModelOptions, values_of(ModelOptions)],
    strengths: Strengths,
    penalty: Penalties = None,
    how: How = None,
    refit: Refit = False,
    given: RecipeGiven,
    recipe: RecipeFile = None,
    training: Training,
    checkpoint_every: CheckpointEvery = 10.0,
    run: Output,
) -> int:
    """Train a network on DATA by a recipe, and keep the run in a folder.

    --l1 S adds S times the sum of |w| to the loss, --l2 S adds S/2 times the sum of the squares;
    auto finds S in the run.
    """
    from tikhon.cli.fitting import carry_out, penalty_entries

    return carry_out(
        Request(
            data,
            data_dir,
            shares,
            table,
            network,
            penalty_entries(strengths, penalty or (), how),
            given,
            recipe,
            training,
            refit,
            checkpoint_every,
            run,
        )
    )
