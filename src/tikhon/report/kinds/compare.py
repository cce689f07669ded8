"""The page of a comparison: scores of the methods, and which ones tie with the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tikhon.numbers import format_interval
from tikhon.report import charts, layer_charts
from tikhon.report.kinds import columns, elements
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
    format_number,
    label,
    percent,
    saved_text,
    seconds,
    strength,
)
from tikhon.report.saved import SavedRun
from tikhon.runs.documents import Number

Row = Mapping[str, Any]


def page(run: SavedRun) -> Page:
    """Build the page: verdict table, test scores with intervals, recipes, architecture."""
    result = run.result
    rows: list[Row] = list(result.get("methods") or [])
    higher = result.get("metric") == "accuracy"
    name = "accuracy" if higher else "rmse"
    metric = elements.ScoreKind(name, label(f"metric_{name}"), higher)
    networks: list[Row] = list((result.get("architecture") or {}).get("rows") or [])
    grids = [grid for kind in ("width", "depth") if (grid := score_grid(networks, kind))]
    return Page(
        title=label("title_compare", data=elements.data_name(run)),
        level="plain",
        verdict=_saved_sentence(run, "verdict")
        if rows
        else label("unfinished", epochs=len(run.history)),
        remarks=remarks(run, rows, metric),
        next_commands=run.next_commands,
        facts=facts(run, rows, metric),
        about=elements.about_run(run),
        sections=elements.without_missing(
            Section(label("verdict"), (table(rows, metric), *grids, scores(run, rows, metric)))
            if rows
            else None,
            *architecture(networks),
            recipes(rows),
            columns.section(run),
            elements.command_section(run),
        ),
    )


def displayed_score(value: Number, metric: elements.ScoreKind) -> Number:
    """Return a score for display: errors are stored negated, so that more is better."""
    return value if value is None or metric.higher else -value


def score_interval(row: Row, metric: elements.ScoreKind) -> tuple[Number, Number]:
    """Return the interval of a test score, clipped to [0, 1] for accuracies and to >= 0."""
    low, high = displayed_score(row.get("low"), metric), displayed_score(row.get("high"), metric)
    if low is None or high is None:
        return None, None
    low, high = max(min(low, high), 0.0), max(low, high)
    return low, min(high, 1.0) if metric.higher else high


def _saved_sentence(run: SavedRun, part: str) -> Label | Name:
    """Return a sentence of the comparison; older runs store it in English."""
    saved = run.result.get("sentences") or {}
    return saved_text(saved.get(part) or run.result[part])


def constant_values(run: SavedRun, metric: elements.ScoreKind) -> dict[str, object]:
    """Return the constant prediction and its score; empty for older runs."""
    found = run.result.get("constant")
    if not found:
        return {}
    answer = found.get("answer") or label("the_mean")
    return {"answer": answer, "constant": format_number(displayed_score(found["test"], metric))}


def remarks(
    run: SavedRun, rows: list[Row], metric: elements.ScoreKind
) -> tuple[Label | Name, ...]:
    """Return the score of a constant prediction, and what exceeded the budget."""
    found: list[Label | Name] = []
    constant = constant_values(run, metric)
    if rows and constant and run.result["constant"]["beaten"]:
        found.append(label("compare_beside", **constant))
    if run.result.get("notice"):
        found.append(_saved_sentence(run, "notice"))
    return tuple(found)


def facts(run: SavedRun, rows: list[Row], metric: elements.ScoreKind) -> tuple[Fact, ...]:
    """Return the best score, and the size of the comparison."""
    if not rows:
        return ()
    low, high = score_interval(rows[0], metric)
    left, right = format_interval(low, high)
    note = None if low is None else label("interval_95", low=left, high=right)
    return (
        Fact(
            elements.part_score(metric, "test"),
            format_number(displayed_score(rows[0]["test"], metric)),
            note,
        ),
        Fact(label("methods"), str(len(rows))),
        Fact(label("splits"), str(run.result.get("splits", "–"))),
        Fact(label("trainings_each"), str(run.result.get("trials", "–"))),
        Fact(label("time"), seconds(run.result.get("seconds"))),
    )


def table(rows: list[Row], metric: elements.ScoreKind) -> PageTable:
    """Tabulate one row for each method, best first."""
    lines: list[tuple[Cell, ...]] = []
    for i, row in enumerate(rows):
        low, high = score_interval(row, metric)
        mark = Mark("plain", label("worse_than_best"))
        if i == 0 or row["tied"]:
            alone = not any(other["tied"] for other in rows[1:])
            mark = Mark("good", label("tied" if i else "best" if alone else "first"))
        lines.append(
            (
                Name(row["method"]),
                mark,
                format_number(displayed_score(row["test"], metric)),
                "–" if low is None else "–".join(format_interval(low, high)),
                format_number(row.get("gap")),
                percent(row.get("zeros")),
                percent(row.get("size")),
                format_number(row.get("seed_std")),
                seconds(row.get("seconds")),
            )
        )
    keys = ("method", "verdict", "test", "interval", "train_test_gap", "zeros", "size_left")
    keys = (*keys, "seed_spread", "time")
    empty = {"interval": "–", "size_left": "100%", "seed_spread": "–"}  # empty columns are dropped
    filled = zip(keys, *lines)
    table = {k: cells for k, *cells in filled if any(cell != empty.get(k) for cell in cells)}
    note = label("tied_note_seeds" if "seed_spread" in table else "tied_note")
    rows_shown = tuple(zip(*table.values()))
    return PageTable(label("compare_caption"), tuple(map(label, table)), rows_shown, note=note)


def scores(run: SavedRun, rows: list[Row], metric: elements.ScoreKind) -> Chart:
    """Plot the test score of each method with its interval, and that of a constant not beaten."""
    reach = [score_interval(row, metric) for row in rows]
    constant = run.result.get("constant")
    names: list[Label | Name] = [Name(row["method"]) for row in rows]
    means = [displayed_score(row["test"], metric) for row in rows]
    if constant and not constant["beaten"]:
        answer = constant.get("answer") or label("the_mean")
        names.append(label("compare_always", answer=answer))
        means.append(displayed_score(constant["test"], metric))
        reach.append((None, None))
    figure = charts.intervals(
        names,
        means,
        [low for low, _ in reach],
        [high for _, high in reach],
        elements.part_score(metric, "test"),
        [*("series-2" if row["tied"] else "muted" for row in rows), "series-1"],
    )
    return Chart(
        elements.part_score(metric, "test"),
        figure,
        label("alt_compare"),
        label("compare_note" if charts.finite(high for _, high in reach) else "compare_note_one"),
        wide=True,
    )


def recipes(rows: list[Row]) -> Section | None:
    """List the recipe chosen for each method on the first split."""
    lines = tuple(
        f"{row['method']}: {', '.join(settings(row))}" for row in rows if row.get("recipe")
    )
    return Section(label("recipes"), (CodeBlock(lines),), label("recipes_lead")) if lines else None


def settings(row: Row) -> list[str]:
    """List the settings of a recipe, penalties in command line notation."""
    recipe = {k: v for k, v in row["recipe"].items() if v not in (None, 0, 0.0, "", [], {}, ())}
    penalties = map(elements.format_nested, recipe.pop("penalties", []))
    others = (f"{name} {elements.format_nested(value)}" for name, value in recipe.items())
    return [f"lr {strength(row.get('lr'))}", *penalties, *others]


def architecture(networks: list[Row]) -> list[Section | None]:
    """Plot test score against strength, one line for each width, and for each depth and remedy."""
    sections: list[Section | None] = []
    for kind in ("width", "depth"):
        rows = [row for row in networks if kind in row]
        if not rows:
            continue
        metric, strengths, lines = scores_by_network(rows)
        figure = charts.lines_over_names(
            [strength(s) for s in strengths],
            {name: [line.get(s) for s in strengths] for name, line in lines.items()},
            label("strength"),
            label(f"metric_{metric}"),
        )
        chart = Chart(label(f"by_{kind}"), figure, label("alt_architecture"), wide=True)
        ratios = ratio_chart(rows)
        blocks = (chart, ratios) if ratios else (chart,)
        sections.append(Section(label(f"by_{kind}"), blocks, label(f"by_{kind}_lead")))
    return sections


def scores_by_network(
    rows: Sequence[Row],
) -> tuple[str, list[float], dict[str, dict[float, Number]]]:
    """Return the metric, the strengths, and the test score at each strength by network."""
    metric = next((m for m in ("accuracy", "rmse") if f"test/{m}" in rows[0]), "loss")
    lines: dict[str, dict[float, Number]] = {}
    for row in rows:
        lines.setdefault(network_name(row), {})[row["strength"]] = row.get(f"test/{metric}")
    return metric, sorted({row["strength"] for row in rows}), lines


def network_name(row: Row) -> str:
    """Return the width of a network, or its depth and remedy."""
    return " ".join(str(row[key]) for key in ("width", "depth", "remedy") if key in row)


def score_grid(networks: list[Row], kind: str) -> PageTable | None:
    """Tabulate test scores by strength, one line for each network of varied width or depth."""
    rows = [row for row in networks if kind in row]
    if not rows:
        return None
    metric, strengths, lines = scores_by_network(rows)
    ratios = backward_ratios(rows)
    more = (label("signal_first"),) if ratios else ()
    head = (label("network"), *more, *(Name(f"L2 {s:g}") for s in strengths))
    cells = tuple(
        (
            Name(name),
            *((format_number(ratios.get(name)),) if ratios else ()),
            *(format_number(scores.get(s)) for s in strengths),
        )
        for name, scores in lines.items()
    )
    return PageTable(label("grid_caption", metric=label(f"metric_{metric}_word")), head, cells)


def backward_ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Return the share of the backward signal that reaches the first layer, by network."""
    ratios = {network_name(row): row.get("backprop_ratio") for row in rows}
    return {n: v for n, v in ratios.items() if isinstance(v, float) and math.isfinite(v)}


def ratio_chart(rows: Sequence[Row]) -> Chart | None:
    """Plot the share of the backward signal that reaches the first layer, by network."""
    known = backward_ratios(rows)
    if not known:
        return None
    series = [(label("signal_first"), list(known.values()))]
    figure = layer_charts.lines_over_layers(list(known), series, label("signal_first"))
    figure["layout"]["xaxis"]["title"] = {"text": label("network")}
    return Chart(label("signal_first"), figure, label("alt_ratio"), wide=True)
