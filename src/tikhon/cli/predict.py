"""tikhon predict: new rows through a saved run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tikhon.cli import tables
from tikhon.cli.option_groups import flag
from tikhon.cli.options import DataDir, PrintOptions
from tikhon.options import DATA, MODEL, OUTPUT


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="New rows, in the form of the DATA of the run.")
    ],
    output: Annotated[
        Path | None,
        flag("CSV file to write.", OUTPUT, "FILE", shown="stdout", flags=("--output", "-o")),
    ] = None,
    keep: Annotated[
        list[str] | None,
        flag(
            "Column of DATA to put before the predictions, such as an id; may be repeated.",
            OUTPUT,
            "COLUMN",
            shown="none",
        ),
    ] = None,
    spreadsheet: Annotated[
        bool,
        flag(
            "Put ' before labels such as =1+1, which a spreadsheet would run as formulas.", OUTPUT
        ),
    ] = False,
    encoding: Annotated[
        str | None,
        flag("Text encoding of a table: utf-8, cp1252, ...", DATA, "NAME", shown="as in the run"),
    ] = None,
    single: Annotated[
        bool, flag("Use the chosen network of a search alone, not the average of its best.", MODEL)
    ] = False,
    data_dir: DataDir = None,
    *,
    shown: PrintOptions,
) -> None:
    """Predict the rows of DATA with the model and the preprocessing of RUN.

    Prints one CSV row for each row of DATA, in the same order: the prediction, then the
    probability of each class. --keep puts columns of DATA before them.

    Columns of DATA are matched by name, and those that the run did not use are ignored. A category
    that did not occur in training is treated as a rare one. The predictions of a search
    (`tikhon tune`) are averaged over its best networks.
    """
    from tikhon.data.sources import find_path
    from tikhon.runs.files import write_bytes
    from tikhon.training.saved_model import SavedModel, escape_formulas

    terminal = shown.terminal()
    if output is not None:
        _check_output(output, find_path(data, data_dir), run)
    saved = SavedModel.load(run, single=single)
    given = {"data_dir": data_dir, "encoding": encoding}
    options = {name: value for name, value in given.items() if value is not None}
    fitted = saved.preprocessing
    if fitted is not None:
        path = find_path(data, data_dir)
        tables.announce_reading(terminal, path, fitted.transform, saved.format(encoding))
    rows = saved.read_rows(data, keep=keep or (), **options)
    frame = rows.prepend_kept(saved.predict(rows.x))
    for remark in rows.remarks:
        terminal.note(f"notice: {remark}", "yellow")
    text = (escape_formulas(frame) if spreadsheet else frame).to_csv(index=False)
    if output is not None:
        write_bytes(output, text.encode())
        terminal.note(f"{len(frame):,} predictions in {output}")
    elif not shown.json:
        terminal.write(text)
    written = None if output is None else str(output)
    answers = frame.iloc[:, len(set(keep or ()))].tolist() if output is None else None
    terminal.print_document({"rows": len(frame), "output": written, "predictions": answers})


def _check_output(output: Path, data: Path, run: Path) -> None:
    """Refuse to overwrite the input rows, or a file of the run."""
    from tikhon.errors import InputError

    target = output.resolve()
    if target == data.resolve():
        raise InputError(f"--output {output} is the file of the input rows: give another name")
    if target.exists() and target.parent == run.resolve():
        raise InputError(f"--output {output} is a file of the run: give another name")
