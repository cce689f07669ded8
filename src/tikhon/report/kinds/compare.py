"""The page of a comparison: scores of the methods, and which ones tie with the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tikhon.numbers import alike
from tikhon.report import charts, layer_charts
from tikhon.report.kinds import columns, parts
from tikhon.report.page import (
    Cell,
    Chart,
    CodeBlock,
    Fact,
    Label,
    Mark,
    Name,
    Page,
    PageTable,
    Section,
    number,
    percent,
    say,
    seconds,
    strength,
    told,
)
from tikhon.report.saved import SavedRun
from tikhon.runs.documents import Number

Row = Mapping[str, Any]


def page(run: SavedRun) -> Page:
    """Build the page: verdict table, test scores with intervals, recipes, architecture."""
    result = run.result
    rows: list[Row] = list(result.get("methods") or [])
    higher = result.get("metric") == "accuracy"
    metric = parts.ScoreKind("accuracy" if higher else "rmse", say(_metric(higher)), higher)
    return Page(
        title=say("title_compare", data=parts.data_name(run)),
        level="plain",
        verdict=_told(run, "verdict") if rows else say("unfinished", epochs=len(run.history)),
        more=more(run, rows, metric),
        following=tuple(map(str, result.get("next") or ())),
        facts=facts(run, rows, metric),
        about=parts.about(run),
        sections=parts.sections(
            Section(say("verdict"), (table(rows, metric), scores(rows, metric))) if rows else None,
            *architecture(result.get("architecture") or {}),
            recipes(rows),
            columns.section(run),
            parts.reproduce(run),
        ),
    )


def _metric(higher: bool) -> str:
    return "metric_accuracy" if higher else "metric_rmse"


def shown(value: Number, metric: parts.ScoreKind) -> Number:
    """Return a score for display: errors are stored negated, so that more is better."""
    return value if value is None or metric.higher else -value


def ends(row: Row, metric: parts.ScoreKind) -> tuple[Number, Number]:
    """Return the interval of a test score, clipped to [0, 1] for accuracies and to >= 0."""
    low, high = shown(row.get("low"), metric), shown(row.get("high"), metric)
    if low is None or high is None:
        return None, None
    low, high = max(min(low, high), 0.0), max(low, high)
    return low, min(high, 1.0) if metric.higher else high


def _told(run: SavedRun, part: str) -> Label | Name:
    """Return a sentence of the comparison; older runs store it in English."""
    saved = run.result.get("sentences") or {}
    return told(saved.get(part) or run.result[part])


def told_constant(run: SavedRun, metric: parts.ScoreKind) -> dict[str, object]:
    """Return the constant prediction and its score; empty for older runs."""
    found = run.result.get("constant")
    if not found:
        return {}
    answer = found.get("answer") or say("the_mean")
    return {"answer": answer, "constant": number(shown(found["test"], metric))}


def more(run: SavedRun, rows: list[Row], metric: parts.ScoreKind) -> tuple[Label | Name, ...]:
    """Return the score of a constant prediction, and what exceeded the budget."""
    found: list[Label | Name] = []
    constant = told_constant(run, metric)
    if rows and constant and run.result["constant"]["beaten"]:
        found.append(say("compare_beside", **constant))
    if run.result.get("notice"):
        found.append(_told(run, "notice"))
    return tuple(found)


def facts(run: SavedRun, rows: list[Row], metric: parts.ScoreKind) -> tuple[Fact, ...]:
    """Return the best score, and the size of the comparison."""
    if not rows:
        return ()
    low, high = ends(rows[0], metric)
    left, right = alike(low, high)
    note = None if low is None else say("interval_95", low=left, high=right)
    return (
        Fact(parts.part_score(metric, "test"), number(shown(rows[0]["test"], metric)), note),
        Fact(say("methods"), str(len(rows))),
        Fact(say("splits"), str(run.result.get("splits", "–"))),
        Fact(say("trainings_each"), str(run.result.get("trials", "–"))),
        Fact(say("time"), seconds(run.result.get("seconds"))),
    )


def table(rows: list[Row], metric: parts.ScoreKind) -> PageTable:
    """Tabulate one row for each method, best first."""
    lines: list[tuple[Cell, ...]] = []
    for i, row in enumerate(rows):
        low, high = ends(row, metric)
        mark = Mark("plain", say("worse_than_best"))
        if i == 0 or row["tied"]:
            alone = not any(other["tied"] for other in rows[1:])
            mark = Mark("good", say("tied" if i else "best" if alone else "first"))
        lines.append(
            (
                Name(row["method"]),
                mark,
                number(shown(row["test"], metric)),
                "–" if low is None else "–".join(alike(low, high)),
                number(row.get("gap")),
                percent(row.get("zeros")),
                percent(row.get("size")),
                number(row.get("seed_std")),
                seconds(row.get("seconds")),
            )
        )
    keys = (
        "method",
        "verdict",
        "test",
        "interval",
        "train_test_gap",
        "zeros",
        "size_left",
        "seed_spread",
        "time",
    )
    empty = {"interval": "–", "size_left": "100%", "seed_spread": "–"}  # empty columns are dropped
    kept = [
        i
        for i, key in enumerate(keys)
        if key not in empty or any(line[i] != empty[key] for line in lines)
    ]
    shown_lines = tuple(tuple(line[i] for i in kept) for line in lines)
    return PageTable(say("compare_caption"), tuple(say(keys[i]) for i in kept), shown_lines)


def scores(rows: list[Row], metric: parts.ScoreKind) -> Chart:
    """Plot the test score of each method with its interval."""
    reach = [ends(row, metric) for row in rows]
    figure = charts.intervals(
        [Name(row["method"]) for row in rows],
        [shown(row["test"], metric) for row in rows],
        [low for low, _ in reach],
        [high for _, high in reach],
        parts.part_score(metric, "test"),
        ["series-2" if row["tied"] else "muted" for row in rows],
    )
    return Chart(
        parts.part_score(metric, "test"),
        figure,
        say("alt_compare"),
        say("compare_note"),
        wide=True,
    )


def recipes(rows: list[Row]) -> Section | None:
    """List the recipe chosen for each method on the first split."""
    lines = tuple(
        f"{row['method']}: {', '.join(settings(row))}" for row in rows if row.get("recipe")
    )
    return Section(say("recipes"), (CodeBlock(lines),), say("recipes_lead")) if lines else None


def settings(row: Row) -> list[str]:
    """List the settings of a recipe, penalties in command line notation."""
    recipe = {k: v for k, v in row["recipe"].items() if v not in (None, 0, 0.0, "", [], {}, ())}
    penalties = map(parts.inline, recipe.pop("penalties", []))
    others = (f"{name} {parts.inline(value)}" for name, value in recipe.items())
    return [f"lr {strength(row.get('lr'))}", *penalties, *others]


def architecture(found: Mapping[str, Any]) -> list[Section | None]:
    """Plot test score against strength, one line for each width, and for each depth and remedy."""
    rows: list[Row] = list(found.get("rows") or [])
    if not rows:
        return []
    key = next((k for k in ("test/accuracy", "test/rmse") if k in rows[0]), "test/loss")
    label = say(f"metric_{key.removeprefix('test/')}")
    sections: list[Section | None] = []
    for kind in ("width", "depth"):
        lines = grouped([row for row in rows if kind in row], kind, key)
        if not lines:
            continue
        strengths = sorted({row["strength"] for row in rows if kind in row})
        figure = charts.lines(
            [strength(s) for s in strengths],
            {name: [line.get(s) for s in strengths] for name, line in lines.items()},
            say("strength"),
            label,
        )
        chart = Chart(say(f"by_{kind}"), figure, say("alt_architecture"), wide=True)
        ratios = ratio_chart([row for row in rows if kind in row], kind)
        blocks = (chart, ratios) if ratios else (chart,)
        sections.append(Section(say(f"by_{kind}"), blocks, say(f"by_{kind}_lead")))
    return sections


def grouped(rows: Sequence[Row], kind: str, key: str) -> dict[str, dict[float, Number]]:
    """Return score by strength for each network."""
    lines: dict[str, dict[float, Number]] = {}
    for row in rows:
        name = " ".join(str(row[k]) for k in (kind, "remedy") if k in row)
        lines.setdefault(name, {})[row["strength"]] = row.get(key)
    return lines


def ratio_chart(rows: Sequence[Row], kind: str) -> Chart | None:
    """Plot the share of the backward signal that reaches the first layer, by network."""
    ratios = {
        " ".join(str(row[k]) for k in (kind, "remedy") if k in row): row.get("backprop_ratio")
        for row in rows
    }
    known = {n: v for n, v in ratios.items() if isinstance(v, float) and math.isfinite(v)}
    if not known:
        return None
    series = [(say("signal_first"), list(known.values()))]
    figure = layer_charts.by_layer(list(known), series, say("signal_first"))
    figure["layout"]["xaxis"]["title"] = {"text": say("network")}
    return Chart(say("signal_first"), figure, say("alt_ratio"), wide=True)
