"""The options of a table, shared by the commands that read one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tikhon.cli.terminal import Terminal
    from tikhon.data.dataset import Dataset
    from tikhon.data.table import TableOptions

_PANEL = "Data"


def _option(help: str, metavar: str | None = None, name: str | None = None):
    return typer.Option(
        *([name] if name else []), help=help, metavar=metavar, rich_help_panel=_PANEL
    )


Target = Annotated[str | None, _option("Column to predict.", "COLUMN")]
Task = Annotated[str | None, _option("classification or regression; inferred if left out.")]
Time = Annotated[str | None, _option("Hold out the latest rows by this column.", "COLUMN")]
Group = Annotated[str | None, _option("Never split rows that share this value.", "COLUMN")]
Drop = Annotated[list[str] | None, _option("Column to leave out; may be repeated.", "COLUMN")]
Categorical = Annotated[
    list[str] | None, _option("Column to read as text; may be repeated.", "COLUMN")
]
Separator = Annotated[
    str | None, _option("Character between fields; found if left out.", name="--sep")
]
Decimal = Annotated[str | None, _option("'.' or ',' in numbers; found if left out.")]
Dates = Annotated[
    str | None,
    _option("dmy, mdy, ymd or a format as %d/%m/%Y; found if left out.", "ORDER"),
]
Encoding = Annotated[str, _option("Of the text: utf-8, latin-1, utf-16, ...")]
Missing = Annotated[
    list[str] | None,
    _option("Text that means no value; may be repeated.", "TEXT", name="--na-values"),
]
BadRows = Annotated[str, _option("Rows of the wrong length: error or skip.", name="--on-bad-row")]


def table_options(given: Mapping[str, Any]) -> TableOptions | None:
    """What a command's options say of a table; None without a target."""
    if given["target"] is None:
        return None
    from tikhon.data.reading import Format
    from tikhon.data.table import TableOptions

    separator: str | None = given["separator"]
    return TableOptions(
        given["target"],
        task=given.get("task"),
        drop=tuple(given.get("drop") or ()),
        categorical=tuple(given.get("categorical") or ()),
        time=given.get("time"),
        group=given.get("group"),
        format=Format(
            separator="\t" if separator in ("\\t", "tab") else separator,
            decimal=given["decimal"],
            encoding=given["encoding"],
            missing=tuple(given["missing"] or ()),
            bad_rows=given["bad_rows"],
            dates=given["dates"],
        ),
    )


def introduce(terminal: Terminal, source: Dataset) -> None:
    """Say what was inferred from a table: the task, and what was noticed in its columns."""
    if "task" in source.origin:
        terminal.note(str(source.origin["task"]))
    for notice in source.notices:
        terminal.note(f"notice: {notice}", "yellow")
