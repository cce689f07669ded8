"""Describe a table: its columns, target, notices, and the importance of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tikhon.report import charts
from tikhon.report.kinds.parts import entries, worst
from tikhon.report.page import (
    Chart,
    Label,
    Name,
    Page,
    PageTable,
    Section,
    joined,
    number,
    say,
    told,
)
from tikhon.report.saved import SavedRun

PARTS = ("train", "valid", "test")
_TOLD = 3  # columns named in the sentence
_DRAWN = 25  # columns in the chart
_ROWS = 50  # rows shown of a table


def section(run: SavedRun) -> Section | None:
    """Build the section on used and unused columns, target and notices; None without a table."""
    table = entries(entries(run.config.get("data")).get("table"))
    target = entries(table.get("target"))
    blocks = [
        used(table),
        left_out(table),
        classes(target) if "classes" in target else figures(target),
        noticed(table),
    ]
    found = tuple(_shortened(block) for block in blocks if block is not None)
    return Section(say("columns"), found, say("columns_lead")) if found else None


def _shortened(table: PageTable) -> PageTable:
    """Shorten a long table to its first rows; the run folder has the rest."""
    if len(table.rows) <= _ROWS:
        return table
    caption = say("first_rows", caption=table.caption, shown=_ROWS, all=f"{len(table.rows):,}")
    return replace(table, caption=caption, rows=table.rows[:_ROWS])


def used(table: Mapping[str, Any]) -> PageTable | None:
    """Tabulate each column with its kind, content, missing cells and number of inputs."""
    rows = tuple(
        (
            Name(str(column["name"])),
            say(f"column_{column['kind']}"),
            _held(column),
            _count(column["missing"]),
            _count(column["inputs"]),
        )
        for column in table.get("columns") or ()
    )
    keys = ("column", "kind", "column_values", "missing_cells", "inputs")
    return PageTable(say("columns_caption"), tuple(map(say, keys)), rows) if rows else None


def _held(column: Mapping[str, Any]) -> Name | Label:
    """Summarise a column: mean and standard deviation, levels or days, and unusual formats."""
    held = ""
    if "levels" in column:
        more = ", ..." if column["of"] > len(column["levels"]) else ""
        levels = (str(level) for level in column["levels"])
        held = ", ".join(f"'{s}'" if "," in s else s for s in levels) + more
    elif "mean" in column:
        held = f"{number(column['mean'])} ± {number(column['deviation'])}"
    elif "first" in column:
        held = f"{column['first']} – {column['last']}"
    how = joined([told(part) for part in column.get("readings") or ()])
    if held and how:
        return say("held_and_read", held=held, how=how)
    return how or Name(held or "–")


def left_out(table: Mapping[str, Any]) -> PageTable | None:
    """Tabulate the unused columns with the reasons."""
    rows = tuple(
        (Name(str(column["name"])), told(column["reason"]))
        for column in table.get("left_out") or ()
    )
    head = (say("column"), say("reason"))
    return PageTable(say("left_out_caption"), head, rows) if rows else None


def classes(target: Mapping[str, Any]) -> PageTable:
    """Tabulate the rows of each class by part of the data."""
    counts = [target["rows"][part] for part in PARTS]
    rows = tuple(
        (Name(str(name)), *(_count(part[i]) for part in counts))
        for i, name in enumerate(target["classes"])
    )
    head = (say("class"), *(say(f"part_{part}") for part in PARTS))
    return PageTable(say("classes_caption"), head, rows)


def figures(target: Mapping[str, object]) -> PageTable | None:
    """Tabulate mean, standard deviation and range of a numeric target in its own unit."""
    found = entries(target.get("numbers"))
    keys = ("mean", "deviation", "least", "largest")
    rows = tuple(
        (say(f"part_{part}"), *(number(entries(found[part]).get(key)) for key in keys))
        for part in PARTS
        if part in found
    )
    head = (say("rows"), *(say(f"target_{key}") for key in keys))
    return PageTable(say("numbers_caption"), head, rows) if rows else None


def noticed(table: Mapping[str, Any]) -> PageTable | None:
    """Tabulate the notices: suspected leaks, rows in two parts, unusual cells."""
    apart = ("notice_left_out", "notice_read")  # shown in their own tables
    notices = [n for n in table.get("notices") or () if _key(n) not in apart]
    rows = tuple((told(notice),) for notice in notices)
    return PageTable(say("notices_caption"), (say("notice"),), rows) if rows else None


def warned(page: Page, run: SavedRun) -> Page:
    """Put a suspected leak, if any, ahead of a finished run's verdict."""
    table = entries(entries(run.config.get("data")).get("table"))
    found = [n for n in table.get("notices") or () if _key(n).startswith("notice_leak")]
    if not found or not run.result:
        return page
    level, more = worst([page.level, "watch"]), (page.verdict, *page.more)
    return replace(page, level=level, verdict=told(found[0]), more=more)


def _key(notice: Mapping[str, Any]) -> str:
    """Return the key of a notice; older runs store its kind."""
    return str(notice.get("key") or f"notice_{notice['kind']}")


def importances(run: SavedRun) -> Section | None:
    """Plot the permutation importance of each column with its interval."""
    found = entries(run.result.get("importances"))
    columns = list(found.get("columns") or ())[:_DRAWN]
    if not columns or useless(run):
        return None
    names, means, lows, highs = zip(*columns, strict=True)
    colours = ["series-1" if low > 0 else "muted" for low in lows]
    figure = charts.intervals(
        [Name(str(name)) for name in names], means, lows, highs, say("loss_rise"), colours
    )
    alt = relied_on(run)
    assert alt is not None
    note = say("relies_note", rows=f"{found['rows']:,}")
    return Section(say("relies"), (Chart(say("loss_rise"), figure, alt, note, wide=True),))


def useless(run: SavedRun) -> bool:
    """Return whether the model was no better than a constant prediction: no column matters."""
    told = [entries(statement).get("code") for statement in run.result.get("statements") or ()]
    return any(str(code).startswith("no_better") for code in told)


def relied_on(run: SavedRun) -> Label | None:
    """Name the columns whose shuffling significantly raises the loss."""
    found = entries(run.result.get("importances"))
    columns: list[tuple[str, float, float, float]] = list(found.get("columns") or [])
    if not columns or useless(run):
        return None
    certain = [(name, mean) for name, mean, low, _ in columns if low > 0][:_TOLD]
    if not certain:
        return say("relies_on_none", rows=f"{found['rows']:,}")
    shown = ", ".join(f"{name} (+{number(mean)})" for name, mean in certain)
    return say("relies_on", columns=shown)


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"
