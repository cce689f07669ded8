"""What `tikhon fit` does with its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tikhon.budget import seconds_of
from tikhon.cli import compacted, tables
from tikhon.cli.conclusion import conclude_fit
from tikhon.cli.folders import about_data, command_of, output_of
from tikhon.cli.length import length_of, needs_length
from tikhon.cli.options import penalty_entry, strength
from tikhon.cli.progress import FitProgress
from tikhon.cli.resuming import completed, interrupted
from tikhon.cli.terminal import Terminal
from tikhon.cli.threads import limit_threads

if TYPE_CHECKING:
    from torch import nn

    from tikhon.data import Split
    from tikhon.training.recipe import Recipe

_TRAINING = ("loss", "optimizer", "lr", "momentum", "schedule", "batch_size", "seed", "device")
_PENALTIES = ("l1", "l2", "elastic_net", "group_lasso")
_RECIPE = (
    "dropout",
    "label_smoothing",
    "confidence_penalty",
    "r_drop",
    "mixup",
    "cutmix",
    "input_noise",
    "clip_norm",
    "clip_value",
    "clip_adaptive",
    "averaging",
    "early_stopping",
)


@dataclass(frozen=True, eq=False)
class Job:
    """All that a training needs, read and checked; nothing is written yet."""

    network: nn.Module
    parts: Split
    recipe: Recipe
    training: dict[str, Any]
    path: Path
    about: dict[str, Any]
    length: str  # how long it trains, in words, where the options do not say


def carry_out(given: Mapping[str, Any]) -> int:
    """Train as the options say; the exit code."""
    from tikhon.runs.interrupt import interruptible
    from tikhon.training import fit
    from tikhon.training.predictions import predictions

    terminal = Terminal(json=given["json"], quiet=given["quiet"])
    job = _prepare(given)
    if given["resume"] and completed(terminal, job.path):
        return 0
    _introduce(terminal, job)
    limit_threads(job.about["model"]["parameters"] * given["batch_size"])
    showing = FitProgress(terminal, verbose=given["verbose"])
    with interruptible() as interrupt, showing as progress:
        run = fit(
            job.network,
            job.parts.train,
            job.recipe,
            valid=job.parts.valid,
            test=job.parts.test,
            unit=job.parts.train.unit,
            output=job.path,
            about=job.about,
            refit=given["refit"],
            linear=given["linear"],
            resume=given["resume"],
            overwrite=given["overwrite"],
            checkpoint_every=given["checkpoint_every"],
            stop=interrupt.__bool__,
            on_tick=progress.tick,
            on_epoch=progress.epoch,
            on_warning=lambda text: terminal.note(f"warning: {text}", "yellow"),
            **job.training,
        )
    if run.ended == "stopped":
        kept = f"step {progress.step:,} is saved in {job.path}"
        return interrupted(terminal, interrupt, job.about["command"], kept)
    test, center = job.parts.test, job.parts.scaling.get("target_mean", 0.0)
    center = center if isinstance(center, float) else center[0]
    more: dict[str, Any] = {
        "predictions": predictions(
            run.model, test.x, test.y, classes=test.classes, unit=test.unit, center=center
        )
    }
    if given["compact"] or given["export"]:
        more |= compacted.finish(
            terminal,
            run.model,
            job.parts.test.x[:256],
            job.path,
            shrink=given["compact"],
            export=given["export"],
        )
    conclude_fit(terminal, run, job.path, more, job.parts.train.classes)
    return 0


def _prepare(given: Mapping[str, Any]) -> Job:
    """Refuse what cannot be carried out, from the cheapest check to reading the data."""
    import torch

    from tikhon.data import load, split
    from tikhon.models import build
    from tikhon.training import Settings

    training: dict[str, Any] = {name: given[name] for name in _TRAINING}
    budget, epochs = seconds_of(given["budget"]), given["epochs"]
    table = tables.table_options(given)
    compacted.check_export(given["export"])
    recipe = _recipe(given)
    Settings(**training, budget=budget, epochs=1 if epochs is None else epochs)
    source = load(given["data"], data_dir=given["data_dir"], table=table)
    parts = split(source, valid=given["valid"], test=given["test"], seed=given["seed"])
    length = length_of(
        epochs,
        budget,
        recipe,
        batches=-(-len(parts.train.x) // given["batch_size"]),
        needs=needs_length(given, recipe, len(parts.valid.x) > 0),
    )
    recipe = replace(recipe, early_stopping=length.patience)
    training |= {
        "epochs": length.epochs,
        "budget": None if length.budget is None else f"{length.budget:g}s",
    }
    path = output_of(given["output"], source.name, given["resume"])
    rate = recipe.dropout if isinstance(recipe.dropout, float) else 0.0
    shape = parts.train.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(given["seed"])
        network = build(given["model"], shape, source.outputs, rate=rate, rows=parts.train.x)
    model = {
        "name": given["model"],
        "shape": list(shape),
        "outputs": source.outputs,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    about = {
        "command": command_of(path),
        "data": about_data(source, parts, given["valid"], given["test"], table),
        "model": model,
    }
    return Job(network, parts, recipe, training, path, about, length.words)


def _recipe(given: Mapping[str, Any]) -> Recipe:
    """The recipe of the file, with what the options say on top."""
    entries = _penalties(given)

    from tikhon.training.recipe import Recipe

    plain = Recipe.load(given["recipe"]).to_dict() if given["recipe"] is not None else {}
    plain |= {name: given[name] for name in _RECIPE if given[name] is not None}
    if entries:
        plain["penalties"] = entries
    return Recipe.from_dict(plain)


def _penalties(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recipe entries of the penalty options."""
    entries: list[dict[str, Any]] = [
        {"penalty": name, "strength": strength(given[name], "--" + name.replace("_", "-"))}
        for name in _PENALTIES
        if given[name] is not None
    ]
    entries += [penalty_entry(text) for text in given["penalty"] or ()]
    return [entry | ({"how": given["how"]} if given["how"] else {}) for entry in entries]


def _introduce(terminal: Terminal, job: Job) -> None:
    parts, train = job.parts, job.parts.train
    if "task" in train.origin:
        terminal.note(str(train.origin["task"]))
    for notice in train.notices:
        terminal.note(f"notice: {notice}", "yellow")
    kind = f"{len(train.classes)} classes" if train.classes else "a number"
    terminal.note(
        f"{train.name}: {len(train.x):,} rows to train on, {len(parts.valid.x):,} to validate, "
        f"{len(parts.test.x):,} to test; {train.x[0].numel()} features, predicting {kind}; "
        f"model {job.about['model']['name']}"
    )
    shown = job.recipe.to_dict()
    if job.length:
        shown.pop("early_stopping", None)  # the line below says it
    for entry in shown.pop("penalties", []):
        shown[f"{entry['penalty']} on {entry['pattern']}"] = entry["strength"]
    text = ", ".join(f"{name} {_inline(value)}" for name, value in shown.items())
    terminal.note(f"recipe: {text or 'none'}")
    if job.length:
        terminal.note(f"trains {job.length}")


def _inline(value: Any) -> str:
    """A setting in words: a table as `Linear(start=0, end=0.1)`, rates by pattern as they are."""
    if not isinstance(value, Mapping):
        return str(value)
    entries = [f"{k}={v}" for k, v in value.items() if k != "kind"]
    return f"{value.get('kind', '')}({', '.join(entries)})"
