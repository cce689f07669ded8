"""tikhon fit: train a network on data by a recipe (the options; `fitting` carries them out)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tikhon.cli.fit_options import FitRequest, ModelOptions, Shares
from tikhon.cli.option_groups import OptionGroup, flag, option_group
from tikhon.cli.options import (
    Data,
    DataDir,
    GivenOptions,
    Output,
    Penalties,
    RecipeGiven,
    Strengths,
)
from tikhon.cli.tables import Rows
from tikhon.options import (
    MODES,
    OUTPUT,
    REGULARIZATION,
    TrainingOptions,
    options_of,
)

_training = options_of(TrainingOptions)
_training["epochs"] = (_training["epochs"][0], None)  # omitted: train until no improvement
_ORDER = ("epochs", "budget", "optimizer", "lr", "momentum", "schedule", "loss", "batch_size")
Training = Annotated[
    GivenOptions, OptionGroup({n: _training[n] for n in (*_ORDER, "seed", "device")}, dict)
]
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
        "Train again on training and validation rows with the strengths that auto chose.",
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
    shares: Annotated[Shares, option_group(Shares)],
    table: Rows,
    data_dir: DataDir = None,
    *,
    network: Annotated[ModelOptions, option_group(ModelOptions)],
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
    """Train a network on DATA, and keep the run in a folder.

    --l1 S adds S times the sum of |w| to the loss, --l2 S adds S/2 times the sum of the squares;
    with auto, S is chosen during training.
    """
    from tikhon.cli.fit_job import penalty_entries, run_fit

    return run_fit(
        FitRequest(
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
