"""tikhon fit: train a network on data by a recipe (the options; `fitting` carries them out)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tikhon.cli import tables
from tikhon.cli.options import (
    DATA,
    MODEL,
    OUTPUT,
    REGULARIZATION,
    TRAINING,
    Budget,
    Data,
    DataDir,
    Debug,
    Device,
    Json,
    Output,
    Overwrite,
    Quiet,
    Resume,
    Seed,
    Verbose,
)

_WEIGHTS = "on all weight matrices, or auto"


def _strength(help: str) -> Any:
    return typer.Option(
        metavar="S", help=f"{help} {_WEIGHTS}.", show_default="off", rich_help_panel=REGULARIZATION
    )


def _amount(help: str, metavar: str = "X") -> Any:
    return typer.Option(
        metavar=metavar, help=help, show_default="off", rich_help_panel=REGULARIZATION
    )


def _training(help: str, **more: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=TRAINING, **more)


def fit(
    data: Data,
    valid: Annotated[
        float, typer.Option(help="Share of the rows for validation.", rich_help_panel=DATA)
    ] = 0.2,
    test: Annotated[
        float,
        typer.Option(help="Share for testing; unused if the data have one.", rich_help_panel=DATA),
    ] = 0.2,
    target: tables.Target = None,
    task: tables.Task = None,
    time: tables.Time = None,
    group: tables.Group = None,
    drop: tables.Drop = None,
    categorical: tables.Categorical = None,
    separator: tables.Separator = None,
    decimal: tables.Decimal = None,
    dates: tables.Dates = None,
    encoding: tables.Encoding = "utf-8",
    missing: tables.Missing = None,
    bad_rows: tables.BadRows = "error",
    data_dir: DataDir = None,
    model: Annotated[
        str,
        typer.Option(
            help="linear, mlp, mlp:300,100, mlp-784-128-10, spline:mlp, lenet5, convnet.",
            rich_help_panel=MODEL,
        ),
    ] = "mlp",
    compact: Annotated[
        bool,
        typer.Option(
            "--compact",
            help="Cut exact zeros out: a smaller, equal model.",
            rich_help_panel=MODEL,
        ),
    ] = False,
    export: Annotated[
        str | None,
        typer.Option(
            help="Also write the model as: onnx.", metavar="FORMAT", rich_help_panel=MODEL
        ),
    ] = None,
    linear: Annotated[
        bool,
        typer.Option(
            help="Train a linear model beside it, as a yardstick.", rich_help_panel=MODEL
        ),
    ] = True,
    l1: Annotated[str | None, _strength("Strength of the sum of sizes")] = None,
    l2: Annotated[str | None, _strength("Strength of half the sum of squares")] = None,
    elastic_net: Annotated[str | None, _strength("Strength of L1 and L2 in equal parts")] = None,
    group_lasso: Annotated[str | None, _strength("Strength of the sum of row norms")] = None,
    penalty: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PATTERN=]NAME:S[,KEY=VALUE]",
            rich_help_panel=REGULARIZATION,
            help="Any penalty on the weights that the pattern names; may be repeated.",
        ),
    ] = None,
    how: Annotated[
        str | None,
        typer.Option(
            help="objective, or decoupled as AdamW does.",
            metavar="HOW",
            show_default="objective",
            rich_help_panel=REGULARIZATION,
        ),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            rich_help_panel=REGULARIZATION,
            help="Train again on train + valid with the strengths that auto has found.",
        ),
    ] = False,
    dropout: Annotated[float | None, _amount("Share of hidden units dropped.", "RATE")] = None,
    label_smoothing: Annotated[
        float | None, _amount("Share of each label spread over all classes.")
    ] = None,
    confidence_penalty: Annotated[
        float | None, _amount("Weight of the negative entropy of the predictions.")
    ] = None,
    r_drop: Annotated[
        float | None, _amount("Weight of the distance between two passes with dropout.")
    ] = None,
    mixup: Annotated[float | None, _amount("Alpha of Beta: mixes pairs of rows.", "ALPHA")] = None,
    cutmix: Annotated[
        float | None, _amount("Alpha of Beta: pastes patches of images.", "ALPHA")
    ] = None,
    input_noise: Annotated[
        float | None, _amount("Standard deviation of noise on the inputs.")
    ] = None,
    clip_norm: Annotated[float | None, _amount("Largest norm of the gradient.")] = None,
    clip_value: Annotated[float | None, _amount("Largest entry of the gradient.")] = None,
    clip_adaptive: Annotated[
        float | None, _amount("Largest gradient norm of a unit over its weight norm.")
    ] = None,
    averaging: Annotated[str | None, _amount("ema or swa of the weights.", "NAME")] = None,
    early_stopping: Annotated[
        int | None,
        typer.Option(
            help="Epochs without improvement after which it ends; the best state is kept.",
            metavar="EPOCHS",
            show_default="off with --epochs, else by rows",
            rich_help_panel=REGULARIZATION,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Recipe from a .toml or .json file or a run's folder.",
            metavar="FILE",
            rich_help_panel=REGULARIZATION,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        _training(
            "Exactly so many passes over the training rows.",
            metavar="N",
            show_default="until the validation loss stops improving, at most 60 s",
        ),
    ] = None,
    budget: Budget = None,
    optimizer: Annotated[str, _training("sgd, adam, adamw, ...")] = "adam",
    lr: Annotated[float, _training("Learning rate.")] = 1e-3,
    momentum: Annotated[float, _training("Of sgd and rmsprop.")] = 0.0,
    schedule: Annotated[str, _training("constant, cosine, linear or warmup_cosine.")] = "constant",
    loss: Annotated[
        str, _training("cross_entropy, bce, mse, half_mse, mae, ... or auto.")
    ] = "auto",
    batch_size: Annotated[int, _training("Rows of a step.")] = 64,
    seed: Seed = 0,
    device: Device = "auto",
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between checkpoints.", rich_help_panel=OUTPUT)
    ] = 10.0,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> int:
    """Train a network on DATA by a recipe, and keep the run in a folder.

    The strength of --l1 is lambda of lambda*sum|w|, that of --l2 of lambda/2*sum w^2; "auto"
    finds it in the run.
    """
    given = dict(locals())

    from tikhon.cli.fitting import carry_out

    return carry_out(given)
