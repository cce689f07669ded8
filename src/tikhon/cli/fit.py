"""tikhon fit: train a network on data by a recipe."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    penalty_entry,
    seconds,
    strength,
)
from tikhon.errors import InputError

if TYPE_CHECKING:
    from tikhon.data import Dataset, Split
    from tikhon.data.table import TableOptions
    from tikhon.recipe import Recipe
    from tikhon.training import Run

_TRAINING, _PENALTIES, _NOISE = "Training", "Penalties", "Noise, targets, gradients, averages"
Strength = Annotated[str | None, typer.Option(metavar="S", rich_help_panel=_PENALTIES)]
Amount = Annotated[float | None, typer.Option(rich_help_panel=_NOISE)]


def fit(
    data: Data,
    model: Annotated[
        str,
        typer.Option(
            help="linear, mlp, mlp:300,100, mlp-784-128-10, lenet5, convnet.",
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
    given = {
        "l1": l1, "l2": l2, "elastic_net": elastic_net, "group_lasso": group_lasso,
        "penalty": penalty, "how": how, "dropout": dropout, "label_smoothing": label_smoothing,
        "confidence_penalty": confidence_penalty, "r_drop": r_drop, "mixup": mixup,
        "cutmix": cutmix, "input_noise": input_noise, "clip_norm": clip_norm,
        "clip_value": clip_value, "clip_adaptive": clip_adaptive, "averaging": averaging,
        "early_stopping": early_stopping,
    }  # fmt: skip
    stop_after = seconds(budget)
    entries = _penalties(given)
    table = tables.table_options(
        data, target, task=task, time=time, group=group, drop=drop, categorical=categorical,
        separator=separator, decimal=decimal, encoding=encoding, missing=missing,
        bad_rows=bad_rows,
    )  # fmt: skip

    import torch

    from tikhon.cli import compacted
    from tikhon.cli.terminal import Terminal
    from tikhon.data import load, split
    from tikhon.models import build
    from tikhon.training import Settings
    from tikhon.training import fit as train

    compacted.check_export(export)
    terminal = Terminal(json=json, quiet=quiet)
    chosen = _recipe(recipe, entries, given)
    training = {
        "loss": loss,
        "optimizer": optimizer,
        "lr": lr,
        "momentum": momentum,
        "schedule": schedule,
        "batch_size": batch_size,
        "epochs": epochs,
        "seed": seed,
        "device": device,
        "budget": stop_after,
    }
    Settings(**training)  # refuse what is out of range before reading the data
    source = load(data, data_dir=data_dir, table=table)
    parts = split(source, valid=valid, test=test, seed=seed)
    path = _output(output, source.name, resume)
    rate = chosen.dropout if isinstance(chosen.dropout, float) else 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(model, parts.train.shape, source.outputs, rate=rate)
    about = {
        "command": _command(path),
        "data": _about(source, parts, valid, test, table),
        "model": {
            "name": model,
            "shape": list(parts.train.shape),
            "outputs": source.outputs,
            "parameters": sum(p.numel() for p in network.parameters()),
        },
    }

    from tikhon.cli.progress import FitProgress
    from tikhon.cli.threads import limit_threads
    from tikhon.training.interrupt import interruptible

    _introduce(terminal, parts, model, chosen)
    limit_threads(about["model"]["parameters"] * batch_size)
    with interruptible() as interrupt, FitProgress(terminal, epochs) as progress:
        run = train(
            network, parts.train, chosen, valid=parts.valid, test=parts.test,
            unit=parts.train.unit, output=path, about=about, resume=resume, overwrite=overwrite,
            checkpoint_every=checkpoint_every, stop=interrupt.__bool__,
            on_tick=progress.tick, on_epoch=progress.epoch,
            on_warning=lambda text: terminal.note(f"warning: {text}", "yellow"),
            **training,
        )  # fmt: skip
    if run.ended == "stopped":
        again = shlex.join([*about["command"], "--resume"])
        terminal.note(
            f"stopped after step {progress.step:,}, saved in {path}; continue with\n  {again}"
        )
        return 128 + int(interrupt.signal or 0)
    more = {}
    if compact or export:
        more = compacted.finish(
            terminal, run.model, parts.test.x[:256], path, shrink=compact, export=export
        )
    return _conclude(terminal, run, path, more)


def _penalties(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recipe entries of the penalty options."""
    entries: list[dict[str, Any]] = []
    for name in ("l1", "l2", "elastic_net", "group_lasso"):
        if given[name] is not None:
            option = "--" + name.replace("_", "-")
            entries.append({"penalty": name, "strength": strength(given[name], option)})
    entries += [penalty_entry(text) for text in given["penalty"] or ()]
    return [entry | ({"how": given["how"]} if given["how"] else {}) for entry in entries]


def _recipe(path: Path | None, entries: list[dict[str, Any]], given: Mapping[str, Any]) -> Recipe:
    """The recipe of the file, with what the options say on top."""
    from tikhon.recipe import Recipe

    plain = Recipe.load(path).to_dict() if path is not None else {}
    own = ("l1", "l2", "elastic_net", "group_lasso", "penalty", "how")
    plain |= {k: v for k, v in given.items() if k not in own and v is not None}
    if entries:
        plain["penalties"] = entries
    return Recipe.from_dict(plain)


def _output(output: Path | None, name: str, resume: bool) -> Path:
    if output is not None:
        return output
    if resume:
        raise InputError("--resume needs --output RUN, the folder of the run to continue")
    from tikhon.training.run_directory import next_free

    return next_free(Path("runs"), Path(name).name)


def _command(path: Path) -> list[str]:
    """The command that repeats this run, with its folder spelled out."""
    arguments = [a for a in sys.argv[1:] if a not in ("--resume", "--overwrite")]
    if not any(a == "--output" or a.startswith("--output=") for a in arguments):
        arguments += ["--output", str(path)]
    return ["tikhon", *arguments]


def _about(
    source: Dataset, parts: Split, valid: float, test: float, table: TableOptions | None
) -> dict[str, Any]:
    fitted = parts.preprocessing
    more: dict[str, Any] = {} if fitted is None else {"preprocessing": fitted.to_dict()}
    if table is not None and fitted is not None:
        more["format"] = asdict(table.format) if table.format else {}
    return more | {
        "name": source.name,
        "task": source.task,
        "rows": {"train": len(parts.train.x), "valid": len(parts.valid.x),
                 "test": len(parts.test.x)},
        "features": parts.train.x[0].numel(),
        "feature_names": list(parts.train.feature_names),
        "classes": list(source.classes),
        "split": {"valid": valid, "test": test},
        "scaling": dict(parts.scaling),
        "fingerprint": source.fingerprint(),
        "origin": dict(source.origin),
    }  # fmt: skip


def _introduce(terminal: Any, parts: Split, model: str, recipe: Recipe) -> None:
    train = parts.train
    if "task" in train.origin:
        terminal.note(str(train.origin["task"]))
    for notice in train.notices:
        terminal.note(f"notice: {notice}", "yellow")
    kind = f"{len(train.classes)} classes" if train.classes else "a number"
    terminal.note(
        f"{train.name}: {len(train.x):,} rows to train on, {len(parts.valid.x):,} to validate, "
        f"{len(parts.test.x):,} to test; {train.x[0].numel()} features, predicting {kind}; "
        f"model {model}"
    )
    shown = recipe.to_dict()
    for entry in shown.pop("penalties", []):
        shown[f"{entry['penalty']} on {entry['pattern']}"] = entry["strength"]
    text = ", ".join(f"{name} {value}" for name, value in shown.items())
    terminal.note(f"recipe: {text or 'none'}")


def _conclude(terminal: Any, run: Run, path: Path, more: Mapping[str, Any]) -> int:
    from tikhon.report import write
    from tikhon.training.result import result_of
    from tikhon.training.run_directory import RESULT, RunDirectory

    result = result_of(run) | dict(more)
    if more:
        RunDirectory(path).write(RESULT, result)
    page = write(path)
    metrics = result["metrics"]
    kinds = [k.removeprefix("train/") for k in metrics if k.startswith("train/")]
    rows = [
        [part, *(f"{metrics[f'{part}/{kind}']:.4f}" for kind in kinds)]
        for part in ("train", "valid", "test")
        if f"{part}/{kinds[0]}" in metrics
    ]
    terminal.table(["rows", *kinds], rows)
    if result["penalties"]:
        terminal.table(
            ["penalty", "strength", "value", "exact zeros"],
            [[name, f"{p['strength']:.3g}", f"{p['value']:.4g}", f"{p['zeros']:.1%}"]
             for name, p in result["penalties"].items()],
        )  # fmt: skip
    terminal.say(f"{result['verdict']} {run.seconds:.1f} s, ended by {run.ended}.")
    terminal.say(f"report: {page}")
    for command in result["next"]:
        terminal.say(f"next:   {command}")
    terminal.document({"output": str(path), **result})
    return 0
