"""Table options, shared by the commands that read tables."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tikhon.cli.groups import values_of
from tikhon.numbers import duration
from tikhon.options import DATA, option

if TYPE_CHECKING:
    from tikhon.cli.terminal import Terminal
    from tikhon.data.dataset import Dataset
    from tikhon.data.reading import Format, Source
    from tikhon.data.table import TableOptions


def _column(
    default: object,
    help: str,
    kind: object = str,
    *flags: str,
    metavar: str | None = None,
    names: tuple[str, ...] = (),
) -> Any:
    return option(default, help, kind, DATA, flags=flags, metavar=metavar, names=names)


@dataclass(frozen=True)
class TableArguments:
    """How to read a table, and the roles of its columns."""

    target: str | None = _column(None, "Column to predict.", metavar="COLUMN")
    task: str | None = _column(
        None,
        "classification or regression; inferred if left out.",
        metavar="TASK",
        names=("classification", "regression"),
    )
    time: str | None = _column(None, "Hold out the latest rows by this column.", metavar="COLUMN")
    group: str | None = _column(
        None, "Keep rows with the same value in one part.", metavar="COLUMN"
    )
    drop: list[str] | None = _column(
        None, "Column to leave out; may be repeated.", list[str], metavar="COLUMN"
    )
    categorical: list[str] | None = _column(
        None, "Column to read as text; may be repeated.", list[str], metavar="COLUMN"
    )
    separator: str | None = _column(
        None, "Field separator; detected if left out.", str, "--sep", metavar="CHAR"
    )
    decimal: str | None = _column(
        None, "Decimal mark, '.' or ','; detected if left out.", metavar="CHAR", names=(".", ",")
    )
    dates: str | None = _column(
        None,
        "dmy, mdy, ymd or a format such as %d/%m/%Y; detected if left out.",
        metavar="ORDER",
        names=("dmy", "mdy", "ymd"),
    )
    encoding: str = option(
        "utf-8", "Text encoding: utf-8, cp1252, gb18030, ...", panel=DATA, metavar="NAME"
    )
    missing: list[str] | None = _column(
        None,
        "Cell text that means a missing value; may be repeated.",
        list[str],
        "--na-values",
        metavar="TEXT",
    )
    bad_rows: str = option(
        "error",
        "What to do with a row of the wrong length: error or skip.",
        panel=DATA,
        flags=("--on-bad-row",),
        metavar="ACTION",
        names=("error", "skip"),
    )

    def read(self) -> TableOptions | None:
        """Return the table options; None without a target."""
        if self.target is None:
            return None
        from tikhon.data.reading import Format
        from tikhon.data.table import TableOptions

        return TableOptions(
            self.target,
            task=self.task,
            drop=tuple(self.drop or ()),
            categorical=tuple(self.categorical or ()),
            time=self.time,
            group=self.group,
            format=Format(
                separator="\t" if self.separator in ("\\t", "tab") else self.separator,
                decimal=self.decimal,
                encoding=self.encoding,
                missing=tuple(self.missing or ()),
                bad_rows=self.bad_rows,
                dates=self.dates,
            ),
        )


Rows = Annotated[TableArguments, values_of(TableArguments)]


def leave_to_notices() -> None:
    """Silence warnings about missing classes, which notices of `split` name."""
    for start in ("valid lacks classes of train", "classes with fewer rows than there are folds"):
        warnings.filterwarnings("ignore", message=start)


def announce(
    terminal: Terminal, data: str, table: TableOptions | None, data_dir: Path | None = None
) -> None:
    """Announce how long a large table will take to load and split."""
    from tikhon.data.sources import located
    from tikhon.data.splits import split
    from tikhon.data.table import from_source

    if table is not None:
        path = located(data, data_dir)
        announce_reading(terminal, path, lambda s: split(from_source(s, table)), table.format)


def announce_reading(
    terminal: Terminal, path: Path, use: Callable[[Source], object], format: Format | None
) -> None:
    """Announce how long a large table will take to read and `use`."""
    from tikhon.data.pace import reading_time

    seconds = reading_time(path, use, format)
    if seconds is not None:
        size = path.stat().st_size / 1e6
        terminal.note(f"{path.name}: {size:,.0f} MB, about {duration(seconds)} to read")


def introduce(terminal: Terminal, source: Dataset) -> None:
    """Print what was inferred from a table: the task, and notices about its columns."""
    leave_to_notices()
    if "task" in source.origin:
        terminal.note(str(source.origin["task"]))
    for notice in source.notices:
        terminal.note(f"notice: {notice}", "yellow")
