"""tikhon compare: compare methods of regularization."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from tikhon.budget import parse_seconds
from tikhon.cli import tables
from tikhon.cli.folders import config_of, output_of
from tikhon.cli.option_groups import flag
from tikhon.cli.options import BatchSize, Budget, Data, DataDir, Resumable, Seed
from tikhon.cli.resuming import complete_files, report_interruption
from tikhon.errors import InputError
from tikhon.numbers import format_duration
from tikhon.options import (
    METHODS,
    MODEL,
    MODELS,
    REGULARIZATION,
    TRAINING,
    command_for,
    format_penalty,
    with_reruns,
)

if TYPE_CHECKING:
    from tikhon.cli.progress import StepProgress
    from tikhon.cli.terminal import Terminal
    from tikhon.data.dataset import Dataset


def _sizes_option(help: str) -> object:
    return flag(help, MODEL, "N,N,...", shown="none")


def compare(
    data: Data,
    table: tables.Rows,
    data_dir: DataDir = None,
    *,
    model: Annotated[
        str, flag("Network to train, as for tikhon fit.", MODEL, "MODEL", names=MODELS)
    ] = "mlp",
    widths: Annotated[
        str | None, _sizes_option("Hidden widths to try with several L2 strengths.")
    ] = None,
    depths: Annotated[
        str | None, _sizes_option("Depths to try with plain, He, normalized and residual layers.")
    ] = None,
    methods: Annotated[
        str | None,
        flag(
            "none, l1, l2, dropout, auto, l2+dropout, ...",
            REGULARIZATION,
            "A,B,A+B,...",
            shown="eleven of them",
            names=METHODS,
        ),
    ] = None,
    splits: Annotated[int, flag("Random splits of the rows.", TRAINING)] = 5,
    trials: Annotated[
        int | None,
        flag("Trainings for each method and split.", TRAINING, shown="6, or by the budget"),
    ] = None,
    epochs: Annotated[int, flag("Passes over the training rows.", TRAINING)] = 30,
    batch_size: BatchSize = 64,
    budget: Budget = None,
    seed: Seed = 0,
    run: Resumable,
) -> int:
    """Tune each method with the same budget on several splits; report whether any is worth it.

    --widths plots the test score over width and strength, --depths over depth, kind of network
    and strength.
    """
    parse_seconds(budget)
    wide, deep = _parse_sizes(widths, "--widths"), _parse_sizes(depths, "--depths")
    from tikhon.cli.progress import StepProgress
    from tikhon.cli.results import conclude_saved
    from tikhon.cli.startup import limit_threads
    from tikhon.comparison import DEFAULT, Method, Records
    from tikhon.data import load
    from tikhon.runs.interrupt import Stopped, interruptible
    from tikhon.runs.journal import Journal
    from tikhon.runs.run_directory import JOURNAL, RESULT, RunDirectory

    terminal, options = run.terminal(), table.read()
    limit_threads(0)
    tables.announce_loading(terminal, data, options, data_dir)
    source = load(data, data_dir=data_dir, table=options)
    every = source.task == "classification"
    suited = [name for name in DEFAULT if every or not Method.of(name).classes_only]
    names: list[str] = methods.split(",") if methods else suited
    settings = {"model": model, "splits": splits, "trials": trials, "epochs": epochs}
    settings |= {"batch_size": batch_size, "budget": budget}
    path = output_of(run.output, f"{source.name}-compare", run.resume)
    tables.print_notices(terminal, source)
    if run.resume and complete_files(terminal, path):
        return 0
    about = {
        "name": source.name,
        "task": source.task,
        "rows": len(source.x),
        "features": len(source.table.columns) if source.table else source.x[0].numel(),
        "classes": list(source.classes),
        "fingerprint": source.fingerprint(),
        "table": {"notices": [notice.with_text() for notice in source.notices]},
    }
    config = config_of("compare", path, about, {"name": model}, seed=seed)
    with RunDirectory(path) as folder:
        folder.take(config, resume=run.resume, overwrite=run.overwrite)
        header = {**settings, "methods": names, "seed": seed, "widths": wide, "depths": deep}
        header |= {k: v for k, v in (("time", table.time), ("group", table.group)) if v}
        file = path / JOURNAL
        journal = Journal(file, header, resume=run.resume and file.exists())
        if journal.torn is not None:
            terminal.note(f"the end of {journal.path} is damaged: it is done again", "yellow")
        with interruptible() as interrupt, StepProgress(terminal) as progress:
            records = Records(journal, stop=interrupt.__bool__)
            on_event = _announcing_progress(terminal, source, settings, progress)
            given: dict[str, object] = {"seed": seed, "records": records, "on_event": on_event}
            try:
                result = _run_comparison(source, names, settings, wide, deep, given)
            except Stopped:
                kept = f"{len(records)} trainings are kept in {path}"
                return report_interruption(terminal, interrupt, config["command"], kept)
        result["next"] = _suggest_next(result, config, settings)
        folder.write(RESULT, result)
        conclude_saved(terminal, result, path, ending=f"; trainings in {path}", left_out=())
    return 0


def _announcing_progress(
    terminal: Terminal, source: Dataset, settings: dict[str, Any], progress: StepProgress
) -> Callable[[str, int, int], None]:
    """Report progress, after announcing the number of trainings and their estimated time."""

    def on_event(text: str, done: int, total: int) -> None:
        if total == 0:
            terminal.note(text, "yellow")
            return
        if done == 0 and settings["budget"] is None:
            epochs = settings["epochs"]
            passes = f"{epochs} epoch{'s' if epochs > 1 else ''}"
            terminal.note(
                f"plan: {total} trainings of {passes}{_estimated_time(source, settings, total)}"
            )
        progress(text, done, total)

    return on_event


def _estimated_time(source: Dataset, settings: dict[str, Any], trainings: int) -> str:
    """Format the estimated time of all trainings, if it is long."""
    import torch

    from tikhon.cli.training_length import estimate_seconds
    from tikhon.data import split
    from tikhon.models import build

    train = split(source).train
    with torch.random.fork_rng(devices=[]):
        network = build(settings["model"], train.shape, train.outputs, rows=train.x)
    epochs = settings["epochs"] * trainings
    training = {"batch_size": settings["batch_size"], "epochs": epochs, "loss": "auto"}
    seconds = estimate_seconds(network, train.x, train.y, training)
    return "" if seconds is None else f", about {format_duration(seconds)}"


def _run_comparison(
    source: Any,
    names: list[str],
    settings: dict[str, Any],
    wide: list[int],
    deep: list[int],
    given: dict[str, Any],
) -> dict[str, object]:
    from tikhon.comparison import balance, compare

    result = compare(source, names, **settings, **given).to_dict()
    if wide or deep:
        shapes = balance(source, widths=wide, depths=deep, epochs=settings["epochs"], **given)
        result["architecture"] = shapes.to_dict()
    return result


def _suggest_next(
    result: dict[str, Any], config: dict[str, Any], settings: dict[str, Any]
) -> list[str]:
    """Suggest what to run next: a search, or the best method as tuned on one split."""
    rows = result["methods"]
    if any(row["method"] == "none" and row["tied"] for row in rows):  # plain training is as good
        then = command_for("tune", config["command"])
    else:
        length = ("--epochs", str(settings["epochs"]))
        then = [*command_for("fit", config["command"]), *length, *_recipe_options(rows[0])]
    return with_reruns(config, [shlex.join(then)])


def _recipe_options(first: dict[str, Any]) -> list[str]:
    """Return the options that train with a method's recipe."""
    options = ["--lr", f"{first['lr']:.3g}"]
    for name, value in first["recipe"].items():
        if name == "penalties":
            for entry in value:
                options += ["--penalty", format_penalty(entry)]
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            options += [f"--{name.replace('_', '-')}", shown]
    return options


def _parse_sizes(text: str | None, option: str) -> list[int]:
    if text is None:
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} takes whole numbers like 32,128, received {text!r}") from error
