"""tikhon compare: methods of regularization side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tikhon.cli import tables
from tikhon.cli.options import (
    MODEL,
    REGULARIZATION,
    TRAINING,
    Budget,
    Data,
    DataDir,
    Debug,
    Json,
    Output,
    Overwrite,
    Quiet,
    Seed,
    seconds,
)
from tikhon.errors import InputError


def _sizes_option(help: str) -> Any:
    return typer.Option(metavar="N,N,...", help=help, show_default="none", rich_help_panel=MODEL)


def compare(
    data: Data,
    target: tables.Target = None,
    task: tables.Task = None,
    data_dir: DataDir = None,
    model: Annotated[str, typer.Option(help="As for fit.", rich_help_panel=MODEL)] = "mlp",
    widths: Annotated[
        str | None, _sizes_option("Hidden widths to try with strengths of L2.")
    ] = None,
    depths: Annotated[
        str | None, _sizes_option("Depths to try with remedies and strengths of L2.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,A+B,...",
            help="none, l1, l2, dropout, auto, l2+dropout, ...",
            show_default="eleven of them",
            rich_help_panel=REGULARIZATION,
        ),
    ] = None,
    splits: Annotated[
        int, typer.Option(help="Splits of the rows, each drawn anew.", rich_help_panel=TRAINING)
    ] = 5,
    trials: Annotated[
        int | None,
        typer.Option(
            help="Trainings for each method and split.",
            show_default="6, or by the budget",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(help="Passes over the training rows.", rich_help_panel=TRAINING)
    ] = 30,
    batch_size: Annotated[
        int, typer.Option(help="Rows of a step.", rich_help_panel=TRAINING)
    ] = 64,
    budget: Budget = None,
    seed: Seed = 0,
    output: Output = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Tune every method with the same budget on several splits, and say who is really better.

    --widths draws the test score over width x strength, --depths over depth x remedy x strength.
    """
    stop_after = seconds(budget)
    wide, deep = _sizes(widths, "--widths"), _sizes(depths, "--depths")
    table = tables.table_options(data, target, task=task)

    from tikhon.cli.terminal import Terminal
    from tikhon.cli.threads import limit_threads
    from tikhon.comparison import DEFAULT, Method
    from tikhon.comparison import balance as over_shapes
    from tikhon.comparison import compare as over_methods
    from tikhon.data import load

    terminal = Terminal(json=json, quiet=quiet)
    limit_threads(0)
    source = load(data, data_dir=data_dir, table=table)
    names = methods.split(",") if methods else list(DEFAULT)
    if not methods and source.task != "classification":
        names = [name for name in names if not Method.of(name).classes_only]
    folder = _folder(output, source.name, overwrite)
    tables.introduce(terminal, source)
    with terminal.progress() as bar:
        task_id = bar.add_task("", rate="", note="")

        def on_event(text: str, done: int, total: int) -> None:
            bar.update(task_id, description=text, completed=done, total=total)

        found = over_methods(
            source, names, model=model, splits=splits, trials=trials, epochs=epochs,
            batch_size=batch_size, budget=stop_after, seed=seed, on_event=on_event,
        )  # fmt: skip
        result = found.to_dict()
        if wide or deep:
            shapes = over_shapes(source, widths=wide, depths=deep, epochs=epochs, seed=seed,
                                 on_event=on_event)  # fmt: skip
            result["architecture"] = shapes.to_dict()
    _save(folder, source, model, result, seed)
    _show(terminal, result)
    terminal.say(f"result: {folder / 'result.json'}")
    terminal.document({"output": str(folder), **result})


def _sizes(text: str | None, option: str) -> list[int]:
    if text is None:
        return []
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} takes whole numbers like 32,128, received {text!r}") from error


def _folder(output: Path | None, name: str, overwrite: bool) -> Path:
    from tikhon.runs.run_directory import RunDirectory, next_free

    path = output or next_free(Path("runs"), f"{name}-compare")
    with RunDirectory(path) as folder:
        folder.create(overwrite=overwrite)
    return path


def _save(path: Path, source: Any, model: str, result: dict[str, Any], seed: int) -> None:
    import sys

    from tikhon.runs.run_directory import CONFIG, RESULT, RunDirectory
    from tikhon.training.fit import versions

    folder = RunDirectory(path)
    about = {"name": source.name, "task": source.task, "rows": len(source.x),
             "features": source.x[0].numel(), "classes": list(source.classes)}  # fmt: skip
    config = {
        "kind": "compare",
        "command": ["tikhon", *sys.argv[1:]],
        "data": about,
        "model": {"name": model},
        "seed": seed,
        "device": "cpu",
        "versions": versions(),
    }
    folder.write(CONFIG, config)
    folder.write(RESULT, result)
    folder.finish()


def _show(terminal: Any, result: dict[str, Any]) -> None:
    sign = 1 if result["metric"] == "accuracy" else -1
    rows = [
        [
            f"{row['method']}{' =' if row['tied'] else ''}",
            f"{sign * row['test']:.4f}",
            _range(row, sign),
            f"{row['gap']:.4f}",
            f"{row['zeros']:.1%}",
            f"{row['size']:.2f}",
            "-" if row["seed_std"] is None else f"{row['seed_std']:.4f}",
            f"{row['seconds']:.2f}",
        ]
        for row in result["methods"]
    ]
    terminal.table(
        ["method", result["metric"], "95 % interval", "gap", "zeros", "size", "seed", "s"],
        rows,
        title=f"{result['data']}: {result['splits']} splits, {result['trials']} trainings each",
    )
    terminal.say(
        "test rows; = not told apart from the best; gap: train minus test; size: parameters left "
        "after compaction; seed: standard deviation over seeds; s: one training"
    )
    shapes = result.get("architecture", {}).get("rows", [])
    for kind in ("width", "depth"):
        chosen = [row for row in shapes if kind in row]
        if chosen:
            terminal.table(*_grid(chosen, kind))
    terminal.say(result["verdict"])
    if result["notice"]:
        terminal.note(f"notice: {result['notice']}", "yellow")


def _range(row: dict[str, Any], sign: int) -> str:
    ends = sorted((sign * row["low"], sign * row["high"]))
    if sign > 0:
        ends = [max(ends[0], 0.0), min(ends[1], 1.0)]  # shares end at 0 and 1
    return "-" if ends[0] != ends[0] else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _grid(rows: list[dict[str, Any]], kind: str) -> tuple[list[str], list[list[str]]]:
    """Test scores over strength, one line a network."""
    metric = "test/accuracy" if "test/accuracy" in rows[0] else "test/rmse"
    strengths = sorted({row["strength"] for row in rows})
    lines: dict[str, dict[float, float]] = {}
    ratios: dict[str, float] = {}
    for row in rows:
        label = " ".join(str(row[key]) for key in (kind, "remedy") if key in row)
        lines.setdefault(label, {})[row["strength"]] = row[metric]
        ratios[label] = row.get("backprop_ratio", float("nan"))
    more = ["backprop ratio"] if kind == "depth" else []
    head = [kind, *more, *(f"L2 {s:g}" for s in strengths)]
    body = [
        [label, *([f"{ratios[label]:.2g}"] if more else []), *(f"{v[s]:.4f}" for s in strengths)]
        for label, v in lines.items()
    ]
    return head, body
