"""Carry out `tikhon fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tikhon.budget import parse_seconds
from tikhon.cli import exporting, tables
from tikhon.cli.folders import about_data, about_network, command_of, output_of
from tikhon.cli.options import parse_penalty, parse_strength
from tikhon.cli.progress import FitProgress
from tikhon.cli.results import conclude_fit
from tikhon.cli.resuming import complete_files, report_interruption
from tikhon.cli.startup import limit_threads
from tikhon.cli.tables import print_notices
from tikhon.cli.training_length import choose_length, estimate_seconds, why_fixed_length
from tikhon.errors import InputError, unknown_name
from tikhon.languages import sentence
from tikhon.numbers import format_duration
from tikhon.options import MODES, STRENGTHS

if TYPE_CHECKING:
    from torch import nn

    from tikhon.cli.fit_options import FitRequest, ModelOptions
    from tikhon.cli.terminal import Terminal
    from tikhon.data import Split
    from tikhon.training.recipe import Recipe


@dataclass(frozen=True, eq=False)
class FitJob:
    """Everything needed for a training, read and checked; nothing is written yet."""

    network: nn.Module
    parts: Split
    recipe: Recipe
    training: dict[str, Any]
    path: Path
    about: dict[str, Any]
    length: str  # training length in words, if the options leave it open


def run_fit(request: FitRequest) -> int:
    """Train as requested; return the exit code."""
    from tikhon.runs.interrupt import interruptible
    from tikhon.training import fit

    run = request.run
    terminal = run.terminal()
    job = _prepare(request)
    if run.resume and complete_files(terminal, job.path):
        return 0
    _print_plan(terminal, job)
    limit_threads(job.about["model"]["parameters"] * request.training["batch_size"])
    showing = FitProgress(terminal, verbose=run.verbose)

    with interruptible() as interrupt, showing as progress:
        found = fit(
            job.network,
            job.parts.train,
            job.recipe,
            valid=job.parts.valid,
            test=job.parts.test,
            unit=job.parts.train.unit,
            output=job.path,
            about=job.about,
            refit=request.refit,
            linear=request.network.linear,
            resume=run.resume,
            overwrite=run.overwrite,
            checkpoint_every=request.checkpoint_every,
            stop=interrupt.__bool__,
            on_tick=progress.tick,
            on_epoch=progress.epoch,
            on_warning=lambda text: terminal.note(f"warning: {text}", "yellow"),
            conclude=lambda run: _test_results(terminal, request.network, job, run.model),
            **job.training,
        )
    if found.ended == "stopped":
        kept = f"step {progress.step:,} is saved in {job.path}"
        return report_interruption(terminal, interrupt, job.about["command"], kept)
    conclude_fit(terminal, job.path)
    return 0


def _test_results(
    terminal: Terminal, options: ModelOptions, job: FitJob, model: nn.Module
) -> dict[str, Any]:
    """Evaluate on test rows, and compact or export as requested."""
    from tikhon.training.evaluation import evaluate

    test, center = job.parts.test, job.parts.scaling.get("target_mean", 0.0)
    center = center if isinstance(center, float) else center[0]
    predictions = evaluate(
        model, test.x, test.y, classes=test.classes, unit=test.unit, center=center
    )
    more: dict[str, object] = {"predictions": predictions}
    if options.importances and job.parts.preprocessing is not None:
        more["importances"] = _importances(model, job)
    if options.compact or options.export:
        more |= exporting.compact_and_export(
            terminal, model, test.x[:256], job.path, shrink=options.compact, export=options.export
        )
    return more


def _importances(model: nn.Module, job: FitJob) -> dict[str, object]:
    """Compute the importance of each table column on validation and test rows."""
    import torch

    from tikhon.training.importance import importances
    from tikhon.training.losses import loss_of

    fitted, held_out = job.parts.preprocessing, (job.parts.valid, job.parts.test)
    assert fitted is not None
    names = [column.name for column in fitted.columns]
    y = torch.cat([part.y for part in held_out])
    return importances(
        model,
        torch.cat([part.x for part in held_out]),
        y,
        dict(zip(names, fitted.inputs, strict=True)),
        loss_of(job.training["loss"], y),
        seed=job.training["seed"],
    )


def _prepare(request: FitRequest) -> FitJob:
    """Check the request, cheapest checks first, and read the data."""
    from tikhon.data import load, split
    from tikhon.training import Settings

    training, shares, run = dict(request.training), request.shares, request.run
    budget, epochs = parse_seconds(training.pop("budget")), training.pop("epochs")
    table = request.table.read()
    exporting.check_export(request.network.export)
    recipe = _recipe(request)
    Settings(**training, budget=budget, epochs=1 if epochs is None else epochs)
    tables.announce_loading(run.terminal(), request.data, table, request.data_dir)
    source = load(request.data, data_dir=request.data_dir, table=table)
    parts = split(source, valid=shares.valid, test=shares.test, seed=training["seed"])
    length = choose_length(
        epochs,
        budget,
        recipe,
        batches=-(-len(parts.train.x) // training["batch_size"]),
        needs=why_fixed_length(
            recipe,
            training["schedule"],
            refit=request.refit,
            validated=len(parts.valid.x) > 0,
        ),
    )
    recipe = replace(recipe, early_stopping=length.patience)
    training |= {
        "epochs": length.epochs,
        "budget": None if length.budget is None else f"{length.budget:g}s",
    }
    path = output_of(run.output, source.name, run.resume)
    network = _network(request, recipe, parts, source.outputs)
    size = sum(p.numel() for p in network.parameters())
    about = {
        "command": command_of(path),
        "data": about_data(source, parts, shares.valid, shares.test, table),
        "model": about_network(request.network.model, parts, source.outputs, parameters=size),
        "budget": length.budget,
    }
    return FitJob(network, parts, recipe, training, path, about, length.words)


def _network(request: FitRequest, recipe: Recipe, parts: Split, outputs: int) -> nn.Module:
    """Build the network with initial weights drawn from the seed."""
    import torch

    from tikhon.models import build

    rate = recipe.dropout if isinstance(recipe.dropout, float) else 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.training["seed"])
        name, shape = request.network.model, parts.train.shape
        return build(name, shape, outputs, rate=rate, rows=parts.train.x)


def _recipe(request: FitRequest) -> Recipe:
    """Return the recipe file's recipe, updated by the options."""
    from tikhon.training.recipe import Recipe

    plain = Recipe.load(request.recipe).to_dict() if request.recipe is not None else {}
    plain |= request.given
    if request.penalties:
        plain["penalties"] = request.penalties
    return Recipe.from_dict(plain)


def penalty_entries(
    strengths: Mapping[str, str], penalties: Sequence[str], how: str | None
) -> list[Mapping[str, object]]:
    """Return recipe entries of the penalty options; weight decay is decoupled whatever `how`."""
    if how is not None and how not in MODES:
        raise InputError("--how: " + unknown_name("mode", how, MODES))
    entries: list[Mapping[str, object]] = []
    for name, text in strengths.items():
        option = STRENGTHS[name]
        mode = option.how if option.how == "decoupled" else how or option.how
        given = parse_strength(text, "--" + name.replace("_", "-"))
        entries.append({"penalty": option.penalty, "strength": given, "how": mode})
    for text in penalties:
        entries.append(({"how": how} if how else {}) | parse_penalty(text))
    return entries


def _print_plan(terminal: Terminal, job: FitJob) -> None:
    parts, train = job.parts, job.parts.train
    print_notices(terminal, train)
    classes = len(train.classes)
    features = sentence("told_features", count=train.x[0].numel())
    terminal.note(
        f"{train.name}: {len(train.x):,} rows to train on, {len(parts.valid.x):,} to validate, "
        f"{len(parts.test.x):,} to test; {features}, predicting "
        f"{f'{classes} classes' if classes else 'a number'}; model {job.about['model']['name']}"
    )
    shown = job.recipe.to_dict()
    if job.length:
        shown.pop("early_stopping", None)  # printed below
    entries = [_format_penalty(entry) for entry in shown.pop("penalties", [])]
    entries += [f"{name} {_format_setting(value)}" for name, value in shown.items()]
    text = ", ".join(entries)
    terminal.note(f"recipe: {text or 'none'}")
    if job.length:
        terminal.note(f"trains {job.length}")
    elif seconds := estimate_seconds(job.network, train.x, train.y, job.training):
        epochs = job.training["epochs"]
        terminal.note(sentence("told_epochs", count=epochs, time=format_duration(seconds)))


def _format_penalty(entry: Mapping[str, object]) -> str:
    """Format a penalty with its strength and mode."""
    named = f"{entry['penalty']} on {entry['pattern']}"
    if "strength" not in entry:
        return named
    return f"{named} {_format_setting(entry['strength'])} ({entry['how']})"


def _format_setting(value: object) -> str:
    """Format a setting: a table as `Linear(start=0, end=0.1)`, rates by pattern unchanged."""
    if not isinstance(value, Mapping):
        return str(value)
    entries = [f"{k}={v}" for k, v in value.items() if k != "kind"]
    return f"{value.get('kind', '')}({', '.join(entries)})"
