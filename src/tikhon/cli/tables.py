"""Options of tables, and DATA loaded and split for the commands that train."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tikhon.cli.option_groups import option_group
from tikhon.errors import InputError
from tikhon.numbers import format_duration
from tikhon.options import DATA, option

if TYPE_CHECKING:
    from torch import Tensor

    from tikhon.cli.terminal import Terminal
    from tikhon.data.dataset import Dataset
    from tikhon.data.source import Format, Source
    from tikhon.data.splits import Split
    from tikhon.data.table import TableOptions

VALID = 0.2  # share of rows for validation, where no option sets it


@dataclass(frozen=True)
class TableArguments:
    """How to read a table, and the roles of its columns."""

    target: str | None = option(None, "Column to predict.", str, DATA, metavar="COLUMN")
    task: str | None = option(
        None,
        "classification or regression; inferred if left out.",
        str,
        DATA,
        metavar="TASK",
        names=("classification", "regression"),
    )
    time: str | None = option(
        None, "Hold out the latest rows by this column.", str, DATA, metavar="COLUMN"
    )
    group: str | None = option(
        None, "Keep rows with the same value in the same part.", str, DATA, metavar="COLUMN"
    )
    drop: list[str] | None = option(
        None, "Column to leave out; may be repeated.", list[str], DATA, metavar="COLUMN"
    )
    categorical: list[str] | None = option(
        None, "Column to read as text; may be repeated.", list[str], DATA, metavar="COLUMN"
    )
    separator: str | None = option(
        None, "Field separator; detected if left out.", str, DATA, flags=("--sep",), metavar="CHAR"
    )
    decimal: str | None = option(
        None,
        "Decimal mark, '.' or ','; detected if left out.",
        str,
        DATA,
        metavar="CHAR",
        names=(".", ","),
    )
    dates: str | None = option(
        None,
        "dmy, mdy, ymd or a format such as %d/%m/%Y; detected if left out.",
        str,
        DATA,
        metavar="ORDER",
        names=("dmy", "mdy", "ymd"),
    )
    encoding: str = option(
        "utf-8", "Text encoding: utf-8, cp1252, gb18030, ...", str, DATA, metavar="NAME"
    )
    missing: list[str] | None = option(
        None,
        "Cell text that means a missing value; may be repeated.",
        list[str],
        DATA,
        flags=("--na-values",),
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

    @property
    def first_flag(self) -> str | None:
        """The first option that was given."""
        given = (f for f in fields(self) if getattr(self, f.name) != f.default)
        flags = ((*f.metadata["option"].flags, f"--{f.name}")[0] for f in given)
        return next(flags, None)

    def read(self) -> TableOptions | None:
        """Return the table options; None without a target.

        Raises `InputError` for options of a table without its target.
        """
        if self.target is None:
            if flag := self.first_flag:
                raise InputError(
                    f"{flag} is for a table, whose column to predict --target names: add --target "
                    f"COLUMN, or leave out {flag}"
                )
            return None
        from tikhon.data.source import Format
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


Rows = Annotated[TableArguments, option_group(TableArguments)]


def silence_class_warnings() -> None:
    """Silence warnings about missing classes, which notices of `split` name."""
    for start in ("valid lacks classes of train", "classes with fewer rows than there are folds"):
        warnings.filterwarnings("ignore", message=start)


def announce_loading(
    terminal: Terminal, data: str, table: TableOptions | None, data_dir: Path | None = None
) -> None:
    """Announce how long a large table will take to load and split."""
    from tikhon.data.sources import find_path
    from tikhon.data.splits import split
    from tikhon.data.table import from_source

    if table is not None:
        path = find_path(data, data_dir)
        announce_reading(terminal, path, lambda s: split(from_source(s, table)), table.format)


def announce_reading(
    terminal: Terminal, path: Path, use: Callable[[Source], object], format: Format | None
) -> None:
    """Announce how long a large table will take to read and `use`."""
    from tikhon.data.reading_time import estimate_reading_time

    seconds = estimate_reading_time(path, use, format)
    if seconds is not None:
        size = path.stat().st_size / 1e6
        terminal.note(f"{path.name}: {size:,.0f} MB, about {format_duration(seconds)} to read")


def print_notices(terminal: Terminal, source: Dataset) -> None:
    """Print what was inferred from a table: the task, and notices about its columns."""
    silence_class_warnings()
    if "task" in source.origin:
        terminal.note(str(source.origin["task"]))
    for notice in source.notices:
        terminal.note(f"notice: {notice}", "yellow")


def load_and_split(
    terminal: Terminal,
    data: str,
    table: TableArguments,
    data_dir: Path | None,
    *,
    test: float,
    seed: int,
) -> tuple[TableOptions | None, Dataset, Split]:
    """Announce, load and split DATA, and print notices."""
    from tikhon.data import load, split

    options = table.read()
    announce_loading(terminal, data, options, data_dir)
    source = load(data, data_dir=data_dir, table=options)
    parts = split(source, valid=VALID, test=test, seed=seed)
    print_notices(terminal, parts.train)
    return options, source, parts


def all_but_test(parts: Split) -> tuple[Tensor, Tensor]:
    """Join training and validation rows, for callers that split themselves."""
    import torch

    pieces = (parts.train, parts.valid)
    return torch.cat([p.x for p in pieces]), torch.cat([p.y for p in pieces])
