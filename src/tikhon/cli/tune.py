"""tikhon tune: search the hyperparameters of a network in the time of a few trainings."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tikhon.budget import Budget
from tikhon.cli import tables
from tikhon.cli.folders import about_data, about_network, config_of, output_of
from tikhon.cli.option_groups import completion, flag
from tikhon.cli.options import Data, DataDir, Device, Resumable, Seed, TestShare
from tikhon.cli.resuming import complete_files, report_interruption
from tikhon.errors import InputError
from tikhon.numbers import format_duration
from tikhon.options import (
    DATA,
    LOSSES,
    MODEL,
    MODELS,
    TRAINING,
    remove_options,
    rerun_command,
    with_mode,
)

if TYPE_CHECKING:
    from torch import nn

    from tikhon.cli.terminal import Terminal
    from tikhon.data import Split
    from tikhon.tuning.space import Space
    from tikhon.tuning.tune import TuneResult

# what the final choice writes into the configuration; name and size if it is among networks
_CHOSEN = ("model.members", "model.name", "model.parameters")
_LONGER = 4  # times the budget, after a search that ended before its plan
_ANNOUNCED_FROM = 20.0  # seconds from which a plan is announced
SHARING = "Several processes"  # the --help panel


def _scorers(incomplete: str) -> list[str]:
    """Return the scorers of scikit-learn, for shell completion."""
    from sklearn.metrics import get_scorer_names

    return completion(get_scorer_names())(incomplete)


def tune(
    data: Data,
    model: Annotated[
        str | None,
        flag(
            "mlp, mlp:300,100, spline:mlp:64, lenet5, convnet; several as A|B.",
            MODEL,
            "MODEL",
            shown="mlp:64,64; for a table also spline:mlp:64,64",
            names=MODELS,
        ),
    ] = None,
    space: Annotated[
        Path | None,
        flag(
            "TOML file with the ranges to search.",
            TRAINING,
            "FILE",
            shown="dropout, lr, weight decay",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        flag(
            "Wall time such as 60s, 5m or 1h, or configurations such as 200runs.",
            TRAINING,
            "BUDGET",
            shown="16runs",
        ),
    ] = None,
    folds: Annotated[
        int | None,
        flag(
            "Folds of cross-validation; 0 for one held-out part.",
            DATA,
            shown="3 under 2,500 rows, else 0",
        ),
    ] = None,
    epochs: Annotated[
        int | None, flag("Epochs of a full training.", TRAINING, shown="by rows")
    ] = None,
    batch_size: Annotated[int | None, flag("Rows per step.", TRAINING, shown="by rows")] = None,
    loss: Annotated[
        str, flag("Loss to train with, as for tikhon fit.", TRAINING, "NAME", names=LOSSES)
    ] = "auto",
    metric: Annotated[
        str | None,
        typer.Option(
            help="A scorer of scikit-learn to compare trials by, such as roc_auc.",
            metavar="SCORER",
            show_default="the loss",
            rich_help_panel=TRAINING,
            autocompletion=_scorers,
        ),
    ] = None,
    test: TestShare = 0.2,
    *,
    table: tables.Rows,
    storage: Annotated[
        str | None,
        flag("Share the search: journal:PATH or a database URL (Optuna).", SHARING, "STORAGE"),
    ] = None,
    workers: Annotated[int, flag("Processes that share the search.", SHARING)] = 1,
    ray: Annotated[
        str | None,
        flag("Train on Ray: on this machine, or on the cluster at ADDRESS.", SHARING, "[ADDRESS]"),
    ] = None,
    join: Annotated[
        bool, flag("Join the search in --storage as one more worker.", SHARING)
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    data_dir: DataDir = None,
    run: Resumable,
) -> int:
    """Search dropout, learning rate and weight decay for DATA; report how reliable the choice is.

    Networks are trained side by side where that is faster; the best are trained again on all rows
    but those for testing.
    """
    from tikhon.tuning.space import Space

    Budget.parse(budget)
    entries = None if space is None else Space.from_toml(space)
    if workers < 1:
        raise InputError(f"workers must be 1 or more, received {workers}")
    if join and not storage:
        raise InputError("--join needs --storage, the search to train for")

    from tikhon.cli.results import conclude_saved, suggest_predict
    from tikhon.cli.startup import limit_threads
    from tikhon.runs.interrupt import Stopped, interruptible
    from tikhon.runs.run_directory import JOURNAL, RunDirectory

    terminal = run.terminal()
    options, source, parts = tables.load_and_split(
        terminal, data, table, data_dir, test=test, seed=seed
    )
    train = tables.all_but_test(parts)
    path = output_of(run.output, source.name, run.resume)
    names = _model_names(model, parts)
    network = _network_builder(names, parts, source.outputs)
    entries = _with_models(names, entries, network)
    size = sum(p.numel() for p in network({}).parameters())
    limit_threads(size * 64)
    device = _device(device)
    config = config_of(
        "tune",
        path,
        about_data(source, parts, tables.VALID, test, options, folds=True),
        about_network(names[0], parts, source.outputs, parameters=size),
        seed=seed,
        optimizer={"name": "adamw", "schedule": "cosine"},
        device=device,
    )
    terminal.note(
        f"{source.name}: {len(train[0]):,} rows to choose and train on, {len(parts.test.x):,} to "
        f"test; model {' or '.join(names)}, {size:,} parameters"
    )
    searching: dict[str, Any] = dict(
        loss=loss,
        metric=metric,
        space=entries,
        budget=budget,
        seed=seed,
        folds=folds,
        epochs=epochs,
        batch_size=batch_size,
        device=device,
        output=path,
        resume=run.resume and (path / JOURNAL).exists(),
    )
    if storage or ray or workers > 1:
        searching |= _distributed(storage, ray, path, seed, workers)
    if run.resume and complete_files(terminal, path):
        return 0
    with RunDirectory(path) as folder:
        chosen = _CHOSEN if len(names) > 1 else _CHOSEN[:1]
        folder.take(config, resume=run.resume, overwrite=run.overwrite, results=chosen)
        helpers = 0 if join else workers - 1
        with (
            _worker_processes(helpers, storage or _own_storage(path), path),
            interruptible() as interrupt,
        ):
            from tikhon.tuning.tune import tune as search

            try:
                with SearchTable(terminal, joins=join) as board:
                    searching |= {"stop": interrupt.__bool__, "on_event": board.event}
                    result = search(network, train, **searching)
            except _SearchFinished:
                return 0
            except Stopped:
                kept = f"no trial was finished yet in {path}"
                return report_interruption(terminal, interrupt, config["command"], kept)
        more = _test_results(result, train, parts, loss)
        longer = _longer_command(config, budget) if result.stopped and not interrupt else []
        more["next"] = [*longer, *suggest_predict(more, path, config)]
        document = _save(folder, result, config, more)
    left_out = ("trials", "space", "plan", "score_errors", "margins")
    conclude_saved(terminal, document, path, ending=f"; models in {path}", left_out=left_out)
    if not interrupt:
        return 0
    kept = f"the finished trials are kept in {path}"
    return report_interruption(terminal, interrupt, config["command"], kept)


def _longer_command(config: Mapping[str, Any], budget: str | None) -> list[str]:
    """Return the search again with more time, of which the plan of this one had too little."""
    seconds = Budget.parse(budget).seconds
    if seconds is None:
        return []
    repeat = remove_options(rerun_command(config["command"]), "--budget")
    return [shlex.join([*repeat, "--budget", f"{_LONGER * seconds:g}s"])]


def _network_builder(
    names: Sequence[str], parts: Split, outputs: int
) -> Callable[[Mapping[str, Any]], nn.Module]:
    """Return a function that builds the network of a configuration, by default the first."""
    from tikhon.models import build

    def network(config: Mapping[str, Any]) -> nn.Module:
        name = config.get("model", names[0])
        return build(name, parts.train.shape, outputs, rows=parts.train.x)

    return network


def _with_models(
    names: Sequence[str], space: Space | None, network: Callable[[Mapping[str, Any]], nn.Module]
) -> Space | None:
    """Prepend the choice of network to the space if there are several."""
    if len(names) == 1:
        return space
    from tikhon.tuning.preparation import default_space
    from tikhon.tuning.space import Choice, Space

    return Space(model=Choice(tuple(names)), **dict(space or default_space(network)))


class _SearchFinished(Exception):
    """This process has finished its part of a shared search."""


class SearchTable:
    """The live table of rungs, survivors and time, on stderr.

    A process that `joins` a search leaves by `_SearchFinished` once no trials remain.
    """

    def __init__(self, terminal: Terminal, *, joins: bool = False) -> None:
        from rich.live import Live

        self._terminal, self._joins, self._metric = terminal, joins, None
        self._rungs: dict[int, dict[str, Any]] = {}
        self._now = 0
        self._began, self._seconds, self._line = perf_counter(), None, ""
        still = terminal.quiet or not terminal.err.is_terminal
        self._live = None if still else Live(console=terminal.err, refresh_per_second=4)

    def __enter__(self) -> SearchTable:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, event: dict[str, Any]) -> None:
        """Process one event of the search."""
        kind = event["event"]
        if kind == "plan":
            self._plan(event)
        elif kind == "batch":
            rung = {"members": event["trials"], "done": 0, "failed": 0, "best": None, "epoch": 0}
            self._now, self._rungs[event["budget"]] = event["budget"], rung
        elif kind == "epoch" and event["budget"] in self._rungs:
            self._rungs[event["budget"]]["epoch"] = event["epoch"]
        elif kind == "outcomes":
            self._outcomes(event["outcomes"])
        elif kind == "damaged":
            self._damaged(event)
        if self._live is not None:
            self._live.update(self._table())
        if kind == "searched" and self._joins:
            raise _SearchFinished

    def _plan(self, plan: dict[str, Any]) -> None:
        self._seconds, self._metric = plan["seconds"], plan["metric"]
        together = min(plan["chunk"], plan["members"])
        how = f"{together} at a time" if together > 1 else "one after another"
        members = f"{plan['members']} member{'s' * (plan['members'] != 1)}"
        text = f"plan: {members} of {plan['epochs']} epochs, trained {how}"
        if (expected := plan["expected"] or 0.0) > _ANNOUNCED_FROM:
            text += f"; about {format_duration(expected)}"
        self._terminal.note(text)
        if plan["chunk"] == 1 and plan["reason"]:
            self._terminal.note(f"not vectorised: {plan['reason']}", "yellow")

    def _damaged(self, event: dict[str, Any]) -> None:
        found = ", ".join(map(str, event["files"]))
        why = f"{found} is damaged" if found else "their states are gone"
        again = ", ".join(map(str, event["trials"])) or "those after it"
        self._terminal.note(f"{why}: trials {again} are trained again", "yellow")

    def _outcomes(self, outcomes: list[Any]) -> None:
        rung = self._rungs[self._now]  # trials out of time have fewer epochs
        rung["done"] += len(outcomes)
        rung["failed"] += sum(o.failed for o in outcomes)
        known = [o for o in outcomes if not o.failed]
        if known:
            best = min(known, key=lambda o: o.score)
            if rung["best"] is None or best.score < rung["best"].score:
                rung["best"] = best
        if self._live is None:
            best = rung["best"]
            shown = "none"
            if best is not None:
                shown = f"{self._shown(best)} ({_format_config(best.trial.config)})"
            self._terminal.note(
                f"rung of {outcomes[0].trial.budget} epochs: {rung['done']} "
                f"member{'s' * (rung['done'] != 1)}, {rung['failed']} diverged, best {shown}"
            )

    def _shown(self, outcome: Any) -> str:
        """Format a score with the metric's own sign."""
        score = outcome.score if self._metric is None else self._metric.signed(outcome.score)
        return f"{score:.4f}"

    def _table(self) -> Any:
        from rich.table import Table

        spent = perf_counter() - self._began
        left = (
            "" if self._seconds is None else f", about {max(self._seconds - spent, 0):.0f} s left"
        )
        table = Table(box=None, pad_edge=False, title=f"{spent:.0f} s{left}", title_justify="left")
        for name in ("epochs", "members", "at epoch", "diverged", "best", "configuration"):
            table.add_column(name, justify="left" if name == "configuration" else "right")
        for budget, rung in self._rungs.items():
            best = rung["best"]
            table.add_row(
                str(budget),
                str(rung["members"]),
                str(rung["epoch"]) if rung["done"] < rung["members"] else "done",
                str(rung["failed"]),
                "" if best is None else self._shown(best),
                "" if best is None else _format_config(best.trial.config),
            )
        return table


def _format_config(config: Any) -> str:
    shown = {k: f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in config.items()}
    return ", ".join(f"{with_mode(name)} {value}" for name, value in shown.items())


def _device(device: str) -> str:
    import torch

    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _distributed(
    storage: str | None, ray: str | None, path: Path, seed: int, workers: int
) -> dict[str, object]:
    if ray is not None:
        from tikhon.integrations.ray import RayRunner

        return {"runner": RayRunner.factory(ray)}
    from tikhon.integrations.optuna import shared_search

    where = storage or _own_storage(path)
    return {"search": shared_search(where, seed=seed, workers=workers)}


def _own_storage(path: Path) -> str:
    return f"journal:{path / 'study.log'}"


@contextmanager
def _worker_processes(count: int, storage: str, path: Path) -> Iterator[None]:
    """Run `count` helper processes that join the search, in their own folders."""
    import sys

    kept = remove_options(sys.argv[1:], "--storage", "--output", "-o", "--overwrite", "--resume")
    kept += ["--storage", storage, "--join", "--quiet", "--overwrite"]
    start = [sys.executable, "-c", "from tikhon.cli import main; raise SystemExit(main())"]
    helpers = [
        subprocess.Popen(
            [*start, *kept, "--output", str(path / f"worker-{k}")], stdout=subprocess.DEVNULL
        )
        for k in range(2, count + 2)
    ]
    try:
        yield
    finally:
        for helper in helpers:
            helper.terminate()
            helper.wait()


def _model_names(name: str | None, parts: Split) -> tuple[str, ...]:
    """Return the networks to choose from, the plain one first."""
    if name is not None:
        return tuple(name.split("|"))
    return ("mlp:64,64",) if parts.preprocessing is None else ("mlp:64,64", "spline:mlp:64,64")


def _save(
    folder: Any, result: TuneResult, config: dict[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    from tikhon.runs.files import write_tensors
    from tikhon.runs.run_directory import AVERAGE, CONFIG, MODEL, RESULT

    if "model" in result.config:
        size = sum(p.numel() for p in result.model.parameters())
        config["model"] |= {"name": result.config["model"], "parameters": size}
    own = config["model"]["name"]
    config["model"]["members"] = [member.get("model", own) for member in result.members]
    folder.write(CONFIG, config)
    write_tensors(folder.path / MODEL, result.model.state_dict())
    write_tensors(folder.path / AVERAGE, result.average.state_dict())
    document = result.to_dict() | more
    folder.write(RESULT, document)
    return document


def _test_results(
    result: TuneResult, train: tuple[Any, Any], parts: Split, loss: str
) -> dict[str, Any]:
    """Return test scores of the chosen model, its baselines and the average."""
    from tikhon.cli.results import score_on_test_rows

    average = score_on_test_rows(result.average, train, parts.test, loss, linear=False)
    found = score_on_test_rows(result.model, train, parts.test, loss)
    return found | {"average": average.get("metrics", {})}
