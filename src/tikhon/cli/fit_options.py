"""The options of `tikhon fit` as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tikhon.cli.options import GivenOptions, Output
from tikhon.cli.tables import TableArguments
from tikhon.options import DATA, MODEL, MODELS, option


@dataclass(frozen=True)
class Shares:
    """Shares of the rows held out."""

    valid: float = option(0.2, "Share of the rows for validation.", float, DATA)
    test: float = option(
        0.2, "Share for testing; not used where the data have a test set.", float, DATA
    )


@dataclass(frozen=True)
class ModelOptions:
    """The model to train, and what to do with it afterwards."""

    model: str = option(
        "mlp",
        "linear, mlp, mlp:300,100, mlp-784-128-10, spline:mlp, lenet5, convnet.",
        str,
        MODEL,
        metavar="MODEL",
        names=MODELS,
    )
    compact: bool = option(
        False,
        "Remove weights that are exactly zero: a smaller model with equal outputs.",
        bool,
        MODEL,
    )
    export: str | None = option(
        None,
        "Also write the model in this format: onnx.",
        str,
        MODEL,
        metavar="FORMAT",
        names=("onnx",),
    )
    linear: bool = option(True, "Also train a linear model, as a baseline.", bool, MODEL)
    importances: bool = option(
        True, "Measure which columns of a table the model relies on.", bool, MODEL
    )


@dataclass(frozen=True)
class FitRequest:
    """All options of `tikhon fit`."""

    data: str
    data_dir: Path | None
    shares: Shares
    table: TableArguments
    network: ModelOptions
    penalties: list[Mapping[str, object]]  # recipe entries
    given: GivenOptions  # the rest of the recipe
    recipe: Path | None
    training: GivenOptions
    refit: bool
    checkpoint_every: float
    run: Output
