"""Finish a command: write and print the sentences and tables of the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tikhon.options import command_for, with_reruns
from tikhon.report.kinds.scores import learned_nothing
from tikhon.report.page import Label, Mark, Page, PageTable

if TYPE_CHECKING:
    from tikhon.cli.terminal import Terminal

_ONLY_IN_FILE = tuple(
    "weights predictions importances statements score_errors margins by_row".split()
)  # only in result.json
_HOW_IT_ENDED = {
    "epochs": "ran all {epochs} epochs",
    "early stopping": "stopped after {epochs} epochs, the state of epoch {best_epoch} was kept",
    "budget": "its time was over after {epochs} epochs",
}


def conclude_fit(terminal: Terminal, path: Path) -> None:
    """Write the page of a fit whose result is saved, and print it."""
    from tikhon.runs.run_directory import RESULT, RunDirectory

    result = RunDirectory(path).read(RESULT)
    result.pop("schema_version")
    ended = _HOW_IT_ENDED[result["ended"]].format_map(result).replace("all 1 epochs", "1 epoch")
    conclude_saved(terminal, result, path, ending=f", {ended}.", left_out=_ONLY_IN_FILE)


def conclude_saved(
    terminal: Terminal,
    result: Mapping[str, Any],
    path: Path,
    *,
    ending: str,
    left_out: Sequence[str],
) -> None:
    """Write and print the page of a run with a saved result; `ending` follows the time.

    The short JSON document, if requested, lacks the entries `left_out` of the result.
    """
    from tikhon.report.document import write_page
    from tikhon.runs.interrupt import REQUESTED
    from tikhon.runs.run_directory import RunDirectory

    file, page = write_page(path)
    if result.get("stopped") != REQUESTED:
        RunDirectory(path).finish()
    print_page(terminal, page)
    terminal.print(f"{result['seconds']:.1f} s{ending}")
    print_next(terminal, file, result["next"])
    scores = (result.get("metrics") or {}).items()
    test = {k.removeprefix("test/"): v for k, v in scores if k.startswith("test/")}
    small = {key: value for key, value in result.items() if key not in left_out}
    terminal.print_document({"output": str(path), "report": str(file), "test": test, **small})


def score_on_test_rows(
    model: Any, train: tuple[Any, Any], test: Any, loss: str = "auto", *, linear: bool = True
) -> dict[str, Any]:
    """Score a chosen model and its baselines on test rows, for `result.json`.

    `train` are the rows it was chosen and trained on, `test` a `Dataset`.
    """
    from tikhon.training.baselines import assess
    from tikhon.training.losses import loss_of
    from tikhon.training.result import class_name

    if not len(test.x):
        return {}
    parts = {"train": train, "test": (test.x, test.y)}
    found = assess(model.cpu(), parts, loss_of(loss, test.y), unit=test.unit, linear=linear)
    return {
        "metrics": {k: v for k, v in found.metrics.items() if k.startswith("test/")},
        "score_errors": {k: v for k, v in found.errors.items() if k.startswith("test/")},
        "rows": dict(found.rows),
        "answer": class_name(found.most_frequent, test.classes),
        "yardsticks": {name: dict(held) for name, held in found.baselines.items()},
        "margins": {name: dict(held) for name, held in found.margins.items()},
    }


def print_page(terminal: Terminal, page: Page) -> None:
    """Print the tables and sentences of a run's page."""
    tables = [block for block in page.sections[0].blocks if isinstance(block, PageTable)]
    for table in tables:
        title = "" if table is tables[0] else english(table.caption)
        terminal.table([english(head) for head in table.head], table_cells(table), title)
        if table.note is not None:
            terminal.print_wrapped(english(table.note))
    for sentence in page.sentences:
        terminal.print_wrapped(english(sentence))


def suggest_predict(result: Mapping[str, Any], path: Path, config: Mapping[str, Any]) -> list[str]:
    """Suggest predicting rows, unless the model learned nothing; leaks are left out first."""
    predict = command_for("predict", config["command"])
    predict.insert(2, str(path))
    return with_reruns(config, [] if learned_nothing(result) else [shlex.join(predict)])


def print_next(terminal: Terminal, page: Path | None, commands: Sequence[str]) -> None:
    """Print the path of the page, if there is one, and what to run next."""
    if page is not None:
        terminal.print(f"report: {page}")
    for command in commands:
        terminal.print(f"next:   {command}")


def table_cells(table: PageTable) -> list[list[str]]:
    """Return a page table as text, marking the chosen row."""
    rows = [[english(cell) for cell in row] for row in table.rows]
    if table.chosen is not None:
        rows[table.chosen][0] += " *"
    return rows


def english(cell: object) -> str:
    """Return a text of the page in English."""
    if isinstance(cell, Mark):
        return cell.label.text("en")
    if isinstance(cell, Label):
        return cell.text("en")
    return str(cell)
