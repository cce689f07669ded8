"""tikhon fit: train a network on data by a recipe (the options; `fitting` carries them out)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tikhon.cli import tables
from tikhon.cli.options import (
    Budget,
    Data,
    DataDir,
    Debug,
    Device,
    Epochs,
    Json,
    Output,
    Overwrite,
    Quiet,
    Resume,
    Seed,
)

_TRAINING, _PENALTIES, _NOISE = "Training", "Penalties", "Noise, targets, gradients, averages"
Strength = Annotated[str | None, typer.Option(metavar="S", rich_help_panel=_PENALTIES)]
Amount = Annotated[float | None, typer.Option(rich_help_panel=_NOISE)]


def fit(
    data: Data,
    model: Annotated[
        str,
        typer.Option(
            help="linear, mlp, mlp:300,100, mlp-784-128-10, spline:mlp, lenet5, convnet.",
            rich_help_panel=_TRAINING,
        ),
    ] = "mlp",
    optimizer: Annotated[
        str, typer.Option(help="sgd, adam, adamw, ...", rich_help_panel=_TRAINING)
    ] = "adam",
    lr: Annotated[float, typer.Option(help="Learning rate.", rich_help_panel=_TRAINING)] = 1e-3,
    momentum: Annotated[float, typer.Option(rich_help_panel=_TRAINING)] = 0.0,
    schedule: Annotated[
        str,
        typer.Option(help="constant, cosine, linear or warmup_cosine.", rich_help_panel=_TRAINING),
    ] = "constant",
    loss: Annotated[
        str,
        typer.Option(help="cross_entropy, mse, half_mse, mae or auto.", rich_help_panel=_TRAINING),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(rich_help_panel=_TRAINING)] = 64,
    epochs: Epochs = 20,
    valid: Annotated[float, typer.Option(help="Share of the rows for validation.")] = 0.2,
    test: Annotated[
        float, typer.Option(help="Share for testing; unused if the data have one.")
    ] = 0.2,
    target: tables.Target = None,
    task: tables.Task = None,
    time: tables.Time = None,
    group: tables.Group = None,
    drop: tables.Drop = None,
    categorical: tables.Categorical = None,
    separator: tables.Separator = None,
    decimal: tables.Decimal = ".",
    encoding: tables.Encoding = "utf-8",
    missing: tables.Missing = None,
    bad_rows: tables.BadRows = "error",
    l1: Strength = None,
    l2: Strength = None,
    elastic_net: Strength = None,
    group_lasso: Strength = None,
    penalty: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[PATTERN=]NAME:S[,KEY=VALUE]",
            rich_help_panel=_PENALTIES,
            help="Any penalty on the weights that the pattern names; may be repeated.",
        ),
    ] = None,
    how: Annotated[
        str | None,
        typer.Option(
            help="objective (default) or decoupled, as AdamW does.", rich_help_panel=_PENALTIES
        ),
    ] = None,
    refit: Annotated[
        bool,
        typer.Option(
            "--refit",
            rich_help_panel=_PENALTIES,
            help="Train again on train + valid with the strengths that auto has found.",
        ),
    ] = False,
    dropout: Amount = None,
    label_smoothing: Amount = None,
    confidence_penalty: Amount = None,
    r_drop: Amount = None,
    mixup: Amount = None,
    cutmix: Amount = None,
    input_noise: Amount = None,
    clip_norm: Amount = None,
    clip_value: Amount = None,
    clip_adaptive: Amount = None,
    averaging: Annotated[
        str | None, typer.Option(help="ema or swa of the weights.", rich_help_panel=_NOISE)
    ] = None,
    early_stopping: Annotated[
        int | None, typer.Option(help="Patience in epochs.", rich_help_panel=_NOISE)
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Cut exact zeros out: a smaller, equal model.")
    ] = False,
    export: Annotated[
        str | None, typer.Option(help="Also write the model as: onnx.", metavar="FORMAT")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe from a .toml or .json file or a run's folder.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    checkpoint_every: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 10.0,
    budget: Budget = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Train a network on DATA by a recipe, and keep the run in a folder.

    The strength of --l1 is lambda of lambda*sum|w|, that of --l2 of lambda/2*sum w^2, on all
    weight matrices; "auto" finds it in the run.
    """
    given = dict(locals())

    from tikhon.cli.fitting import carry_out

    return carry_out(given)
