"""tikhon fit: train a network on data by a recipe (the options; `fitting` carries them out)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from tikhon.cli.tables import Rows, TableArguments
from tikhon.options import (
    DATA,
    MODEL,
    MODELS,
    MODES,
    OUTPUT,
    REGULARIZATION,
    TrainingOptions,
    option,
    options_of,
)


@dataclass(frozen=True)
class Shares:
    """How the rows are divided."""

    valid: float = option(0.2, "Share of the rows for validation.", float, DATA)
    test: float = option(
        0.2, "Share for testing; not used where the data bring their own.", float, DATA
    )


@dataclass(frozen=True)
class ModelOptions:
    """What is trained, and what is made of it."""

    model: str = option(
        "mlp",
        "linear, mlp, mlp:300,100, mlp-784-128-10, spline:mlp, lenet5, convnet.",
        str,
        MODEL,
        metavar="MODEL",
        names=MODELS,
    )
    compact: bool = option(
        False, "Cut exact zeros out: a smaller model with equal outputs.", bool, MODEL
    )
    export: str | None = option(
        None, "Also write the model as: onnx.", str, MODEL, metavar="FORMAT", names=("onnx",)
    )
    linear: bool = option(True, "Also train a linear model, as a baseline.", bool, MODEL)
    importances: bool = option(
        True, "Measure which columns of a table the model relies on.", bool, MODEL
    )


_told = options_of(TrainingOptions)
_told["epochs"] = (_told["epochs"][0], None)  # left out, it trains as long as it improves
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


@dataclass(frozen=True)
class Request:
    """All that `tikhon fit` was asked for."""

    data: str
    data_dir: Path | None
    shares: Shares
    table: TableArguments
    network: ModelOptions
    penalties: list[Mapping[str, object]]  # entries of a recipe
    given: Given  # the rest of a recipe
    recipe: Path | None
    training: Given
    refit: bool
    checkpoint_every: float
    run: Output


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
