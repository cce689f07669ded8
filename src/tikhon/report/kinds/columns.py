"""Describe a table: its columns, target, notices, and the importance of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tikhon.report import charts
from tikhon.report.kinds.elements import as_mapping, worst
from tikhon.report.kinds.scores import learned_nothing
from tikhon.report.page import (
    Chart,
    Label,
    Name,
    Page,
    PageTable,
    Section,
    format_number,
    joined,
    label,
    saved_text,
)
from tikhon.report.saved import SavedRun

PARTS = ("train", "valid", "test")
_NAMED = 3  # columns named in the sentence
_DRAWN = 25  # columns in the chart
_ROWS = 50  # rows shown of a table


def section(run: SavedRun) -> Section | None:
    """Build the section on used and unused columns, target and notices; None without a table."""
    table = as_mapping(as_mapping(run.config.get("data")).get("table"))
    target = as_mapping(table.get("target"))
    blocks = [
        used_columns(table),
        unused_columns(table),
        class_table(target) if "classes" in target else number_table(target),
        notice_table(table),
    ]
    found = tuple(_shortened(block) for block in blocks if block is not None)
    return Section(label("columns"), found, label("columns_lead")) if found else None


def _shortened(table: PageTable) -> PageTable:
    """Shorten a long table to its first rows; the run folder has the rest."""
    if len(table.rows) <= _ROWS:
        return table
    caption = label("first_rows", caption=table.caption, shown=_ROWS, all=f"{len(table.rows):,}")
    return replace(table, caption=caption, rows=table.rows[:_ROWS])


def used_columns(table: Mapping[str, Any]) -> PageTable | None:
    """Tabulate each column with its kind, content, missing cells and number of inputs."""
    rows = tuple(
        (
            Name(str(column["name"])),
            label(f"column_{column['kind']}"),
            _content(column),
            _count(column["missing"]),
            _count(column["inputs"]),
        )
        for column in table.get("columns") or ()
    )
    keys = ("column", "kind", "column_values", "missing_cells", "inputs")
    return PageTable(label("columns_caption"), tuple(map(label, keys)), rows) if rows else None


def _content(column: Mapping[str, Any]) -> Name | Label:
    """Summarise a column: mean and standard deviation, levels or days, and unusual formats."""
    held = ""
    if "levels" in column:
        more = ", ..." if column["of"] > len(column["levels"]) else ""
        levels = (str(level) for level in column["levels"])
        held = ", ".join(f"'{s}'" if "," in s else s for s in levels) + more
    elif "mean" in column:
        held = f"{format_number(column['mean'])} ± {format_number(column['deviation'])}"
    elif "first" in column:
        held = f"{column['first']} – {column['last']}"
    how = joined([saved_text(part) for part in column.get("readings") or ()])
    if held and how:
        return label("held_and_read", held=held, how=how)
    return how or Name(held or "–")


def unused_columns(table: Mapping[str, Any]) -> PageTable | None:
    """Tabulate the unused columns with the reasons."""
    rows = tuple(
        (Name(str(column["name"])), saved_text(column["reason"]))
        for column in table.get("left_out") or ()
    )
    head = (label("column"), label("reason"))
    return PageTable(label("left_out_caption"), head, rows) if rows else None


def class_table(target: Mapping[str, Any]) -> PageTable:
    """Tabulate the rows of each class by part of the data."""
    counts = [target["rows"][part] for part in PARTS]
    rows = tuple(
        (Name(str(name)), *(_count(part[i]) for part in counts))
        for i, name in enumerate(target["classes"])
    )
    head = (label("class"), *(label(f"part_{part}") for part in PARTS))
    return PageTable(label("classes_caption"), head, rows)


def number_table(target: Mapping[str, object]) -> PageTable | None:
    """Tabulate mean, standard deviation and range of a numeric target in its own unit."""
    found = as_mapping(target.get("numbers"))
    keys = ("mean", "deviation", "least", "largest")
    rows = tuple(
        (label(f"part_{part}"), *(format_number(as_mapping(found[part]).get(key)) for key in keys))
        for part in PARTS
        if part in found
    )
    head = (label("rows"), *(label(f"target_{key}") for key in keys))
    return PageTable(label("numbers_caption"), head, rows) if rows else None


def notice_table(table: Mapping[str, Any]) -> PageTable | None:
    """Tabulate the notices: suspected leaks, rows in two parts, unusual cells."""
    apart = ("notice_left_out", "notice_read")  # shown in their own tables
    notices = [n for n in table.get("notices") or () if _notice_key(n) not in apart]
    rows = tuple((saved_text(notice),) for notice in notices)
    return PageTable(label("notices_caption"), (label("notice"),), rows) if rows else None


def put_doubts_first(page: Page, run: SavedRun) -> Page:
    """Put a suspected leak, if any, ahead of a finished run's verdict, and groups after it."""
    table = as_mapping(as_mapping(run.config.get("data")).get("table"))
    notices = [(_notice_key(notice), notice) for notice in table.get("notices") or ()]
    if not run.result:
        return page
    groups = [saved_text(notice) for key, notice in notices if key == "notice_groups"]
    page = replace(page, remarks=(*groups, *page.remarks))
    leaks = [saved_text(notice) for key, notice in notices if key.startswith("notice_leak")]
    if not leaks:
        return page
    level = worst([page.level, "watch"])
    return replace(page, level=level, verdict=leaks[0], remarks=page.sentences)


def _notice_key(notice: Mapping[str, Any]) -> str:
    """Return the key of a notice; older runs store its kind."""
    return str(notice.get("key") or f"notice_{notice['kind']}")


def importances(run: SavedRun) -> Section | None:
    """Plot the permutation importance of each column with its interval."""
    found = as_mapping(run.result.get("importances"))
    columns = list(found.get("columns") or ())[:_DRAWN]
    if not columns or learned_nothing(run.result):
        return None
    names, means, lows, highs = zip(*columns, strict=True)
    colours = ["series-1" if low > 0 else "muted" for low in lows]
    figure = charts.intervals(
        [Name(str(name)) for name in names], means, lows, highs, label("loss_rise"), colours
    )
    alt = important_columns(run)
    assert alt is not None
    note = label("relies_note", rows=f"{found['rows']:,}")
    return Section(label("relies"), (Chart(label("loss_rise"), figure, alt, note, wide=True),))


def important_columns(run: SavedRun) -> Label | None:
    """Name the columns whose shuffling significantly raises the loss."""
    found = as_mapping(run.result.get("importances"))
    columns: list[tuple[str, float, float, float]] = list(found.get("columns") or [])
    if not columns or learned_nothing(run.result):
        return None
    certain = [(name, mean) for name, mean, low, _ in columns if low > 0][:_NAMED]
    if not certain:
        return label("relies_on_none", rows=f"{found['rows']:,}")
    shown = ", ".join(f"{name} (+{format_number(mean)})" for name, mean in certain)
    return label("relies_on", columns=shown)


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "–"
