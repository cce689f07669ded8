"""The page of the demo: one model without regularization and with each method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tikhon.report import charts
from tikhon.report.kinds import elements
from tikhon.report.page import (
    Cell,
    Chart,
    Fact,
    Label,
    Name,
    Page,
    PageTable,
    Section,
    format_number,
    label,
    percent,
    strength,
)
from tikhon.report.saved import SavedRun
from tikhon.runs.documents import Epoch, Number

Method = Mapping[str, Any]
COLOURS = {"none": "muted", "l1": "series-1", "l2": "series-2", "dropout": "series-3"}


def page(run: SavedRun) -> Page:
    """Build the page: verdict table, test scores with intervals, curves, responses, zeros."""
    methods: list[Method] = list(run.result.get("arms") or [])
    best = best_method(methods)
    return Page(
        title=label("title_demo"),
        level="good" if methods and best is not baseline(methods) else "watch",
        verdict=verdict(methods),
        remarks=wrong_labels(run.result.get("setting") or {}),
        next_commands=run.next_commands,
        facts=facts(methods, best),
        about=about(run),
        sections=elements.without_missing(
            Section(label("verdict"), (table(methods, best), *scores(methods))),
            curves(methods),
            responses(methods),
            penalties(methods),
            elements.command_section(run),
        ),
    )


def about(run: SavedRun) -> tuple[tuple[Label, Label | str], ...]:
    """Return the setting of the demo, then the general details."""
    setting = elements.format_settings(run.result.get("setting") or {})
    return (*(((label("about_setting"), setting),) if setting else ()), *elements.about_run(run))


def wrong_labels(setting: Mapping[str, Any]) -> tuple[Label, ...]:
    """Report the deliberately wrong labels that make the network overfit."""
    share, rows = setting.get("wrong_labels"), setting.get("train_rows")
    if not share or not rows:
        return ()
    return (
        label("demo_wrong", share=percent(share), wrong=round(share * rows), rows=f"{rows:,}"),
    )


def method_label(method: Method) -> Label | Name:
    """Return a method's name, translated if it is built in."""
    known = {"none", "l1", "l2", "dropout"}
    return (
        label(f"arm_{method['name']}") if method["name"] in known else Name(str(method["label"]))
    )


def colour(method: Method) -> str:
    """Return the colour of a method, the same in every chart."""
    return COLOURS.get(method["name"], "series-4")


def test_accuracy(method: Method, key: str = "mean") -> float | None:
    """Return the test accuracy of a method: its mean or an end of its interval."""
    value = (method.get("test_accuracy") or {}).get(key)
    return value if charts.finite([value]) else None


def best_method(methods: list[Method]) -> Method | None:
    """Return the method with the best validation accuracy, ties broken by validation loss."""

    def standing(method: Method) -> tuple[float, float]:
        chosen = method.get("chosen_strength")
        at = next((p for p in method.get("grid") or [] if p.get("strength") == chosen), {})
        return method.get("valid_accuracy") or 0.0, -(at.get("valid_loss") or 0.0)

    return max(methods, key=standing, default=None)


def baseline(methods: list[Method]) -> Method | None:
    """Return the method without regularization."""
    return next((method for method in methods if method["name"] == "none"), None)


def verdict(methods: list[Method]) -> Label:
    """Return the result of the demo in one sentence."""
    best, bare = best_method(methods), baseline(methods)
    if best is None or bare is None:
        return label("unfinished", epochs=0)
    values = {
        "train": percent(bare.get("train_accuracy")),
        "before": format_number(test_accuracy(bare)),
        "after": format_number(test_accuracy(best)),
        "method": method_label(best),
    }
    return label("demo_unchanged" if best is bare else "demo_cured", **values)


def facts(methods: list[Method], best: Method | None) -> tuple[Fact, ...]:
    """Return accuracy before and after, and the sparsest method."""
    bare = baseline(methods)
    if best is None or bare is None:
        return ()
    sparsest = max(methods, key=lambda method: method.get("zeros") or 0.0)
    found = [
        Fact(label("test_without"), format_number(test_accuracy(bare)), interval(bare), "bad"),
        Fact(
            label("test_with", method=method_label(best)),
            format_number(test_accuracy(best)),
            interval(best),
            "good",
        ),
    ]
    if sparsest.get("zeros"):
        note = label("with_method", method=method_label(sparsest))
        found.append(Fact(label("zeros"), percent(sparsest["zeros"]), note))
    return tuple(found)


def interval(method: Method) -> Label | None:
    """Format the interval of a method's test accuracy."""
    low, high = test_accuracy(method, "low"), test_accuracy(method, "high")
    seeds = len((method.get("test_accuracy") or {}).get("seeds") or [])
    if low is None or high is None:
        return None
    return label("interval_over", low=format_number(low), high=format_number(high), seeds=seeds)


def table(methods: list[Method], best: Method | None) -> PageTable:
    """Tabulate scores and zeros, one row for each method."""
    rows: list[tuple[Cell, ...]] = [
        (
            method_label(method),
            strength(method.get("chosen_strength")),
            format_number(method.get("train_accuracy")),
            format_number(method.get("valid_accuracy")),
            format_number(method.get("gap")),
            percent(method.get("zeros")),
            format_number(test_accuracy(method)),
            "–".join(format_number(test_accuracy(method, end)) for end in ("low", "high")),
        )
        for method in methods
    ]
    keys = ("method", "chosen_strength", "train", "valid", "gap", "zeros", "test", "interval")
    head = tuple(map(label, keys))
    chosen = next((i for i, method in enumerate(methods) if method is best), None)
    return PageTable(label("arms_caption"), head, tuple(rows), chosen)


def scores(methods: list[Method]) -> tuple[Chart, ...]:
    """Plot the test accuracy of each method with its interval."""
    if not methods:
        return ()
    figure = charts.intervals(
        [method_label(method) for method in methods],
        [test_accuracy(method) for method in methods],
        [test_accuracy(method, "low") for method in methods],
        [test_accuracy(method, "high") for method in methods],
        label("test_accuracy"),
        [colour(method) for method in methods],
    )
    return (
        Chart(label("test_accuracy"), figure, label("alt_arms"), label("arms_note"), wide=True),
    )


def curves(methods: list[Method]) -> Section | None:
    """Plot accuracy over epochs for each method on one scale, with the gap shaded."""
    blocks = []
    keys = ("epoch", "train/accuracy", "valid/accuracy")
    drawn = [
        (m, [[r.get(key) for r in history(m)] for key in keys]) for m in methods if history(m)
    ]
    low = min(
        charts.finite(v for _, (_, *both) in drawn for one in both for v in one), default=0.0
    )
    reach = [max(0, low - 0.02), 1.02]
    for method, (epochs, train, valid) in drawn:
        accuracy = label("metric_accuracy")
        figure = charts.learning_curves(epochs, train, valid, accuracy, higher=True, range=reach)
        alt = elements.describe_curves(label("metric_accuracy"), train[-1], valid[-1])
        blocks.append(Chart(method_label(method), figure, alt))
    if not blocks:
        return None
    return Section(label("learning_curves"), tuple(blocks), label("demo_curves_lead"))


def history(method: Method) -> list[Epoch]:
    """Return the history of a method's chosen run."""
    return list(method.get("history") or [])


def responses(methods: list[Method]) -> Section | None:
    """Plot validation accuracy against strength for each method, ringing the chosen one."""
    bare = baseline(methods)
    tried = [method for method in methods if len(method.get("grid") or []) > 1]
    values = [p.get("valid_accuracy") for method in tried for p in method["grid"]]
    known = charts.finite([*values, (bare or {}).get("valid_accuracy")])
    if not known:
        return None
    reach = [min(known) - 0.02, min(1.0, max(known) + 0.02)]
    blocks = []
    for method in tried:
        grid = method["grid"]
        response = charts.Response(
            strengths=[p["strength"] for p in grid],
            scores=[p.get("valid_accuracy") for p in grid],
            chosen=method.get("chosen_strength"),
            zeros=[p.get("zeros") for p in grid],
            x=label("dropout_rate" if method["name"] == "dropout" else "strength"),
            y=label("valid_accuracy"),
            baseline=bare.get("valid_accuracy") if bare else None,
            colour=colour(method),
        )
        alt = label("alt_response", chosen=strength(method.get("chosen_strength")))
        blocks.append(
            Chart(method_label(method), charts.score_against_strength(response, range=reach), alt)
        )
    return Section(label("responses"), tuple(blocks), label("responses_lead"))


def penalties(methods: list[Method]) -> Section | None:
    """Plot the share of exact zeros over epochs for each method that has any."""
    series: dict[str, list[Number]] = {}
    epochs: list[Number] = []
    for method in methods:
        records = history(method)
        keys = [k for k in (records[-1] if records else {}) if k.endswith("/zeros")]
        for key in keys:
            values = [r.get(key) for r in records]
            if any(charts.finite(values)):
                series[key.removeprefix("penalty/").removesuffix("/zeros")] = values
                epochs = [r.get("epoch") for r in records]
    if not series:
        return None
    figure = charts.lines_over_epochs(
        epochs, series, label("zeros"), range=[-0.02, 1.02], tickformat=".0%"
    )
    alt = elements.describe_lines(label("zeros"), series)
    chart = Chart(label("zeros"), figure, alt, wide=True)
    return Section(label("penalties_over_time"), (chart,), label("demo_zeros_lead"))
