"""The page of the demo: one model without regularization and with each method, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tikhon.report import charts
from tikhon.report.kinds import parts
from tikhon.report.page import (
    Cell,
    Chart,
    Fact,
    Label,
    Name,
    Page,
    Section,
    Table,
    number,
    percent,
    say,
    strength,
)
from tikhon.report.saved import SavedRun

Arm = Mapping[str, Any]
COLOURS = {"none": "muted", "l1": "series-1", "l2": "series-2", "dropout": "series-3"}


def page(run: SavedRun) -> Page:
    """Verdict table of the arms, test scores with intervals, curves, responses, zeros."""
    arms: list[Arm] = list(run.result.get("arms") or [])
    best = winner(arms)
    return Page(
        title=say("title_demo"),
        level="good" if arms and best is not baseline(arms) else "watch",
        verdict=verdict(arms, best),
        more=wrong_labels(run.result.get("setting") or {}),
        following=tuple(map(str, run.result.get("next") or ())),
        facts=facts(arms, best),
        about=about(run),
        sections=parts.sections(
            Section(say("verdict"), (table(arms, best), *scores(arms))),
            curves(arms),
            responses(arms),
            penalties(arms),
            parts.reproduce(run),
        ),
    )


def about(run: SavedRun) -> tuple[tuple[Label, Label | str], ...]:
    """The setting of the demo, then the usual small print."""
    setting = run.result.get("setting") or {}
    return ((say("about_setting"), parts.listed(setting)), *parts.about(run))


def wrong_labels(setting: Mapping[str, Any]) -> tuple[Label, ...]:
    """What makes the network overfit here: labels that are wrong on purpose."""
    share, rows = setting.get("wrong_labels"), setting.get("train_rows")
    if not share or not rows:
        return ()
    return (say("demo_wrong", share=percent(share), wrong=round(share * rows), rows=f"{rows:,}"),)


def label(arm: Arm) -> Label | Name:
    """An arm's name in the page's language where it is one of ours."""
    known = {"none", "l1", "l2", "dropout"}
    return say(f"arm_{arm['name']}") if arm["name"] in known else Name(str(arm["label"]))


def colour(arm: Arm) -> str:
    """One colour an arm, the same in every chart."""
    return COLOURS.get(arm["name"], "series-4")


def test(arm: Arm, key: str = "mean") -> float | None:
    """Test accuracy of an arm: its mean or an end of its interval."""
    value = (arm.get("test_accuracy") or {}).get(key)
    return value if charts.finite([value]) else None


def winner(arms: list[Arm]) -> Arm | None:
    """The arm that the validation rows prefer; the smaller validation loss breaks a tie."""

    def standing(arm: Arm) -> tuple[float, float]:
        at = next(
            (p for p in arm.get("grid") or [] if p.get("strength") == arm.get("chosen_strength")),
            {},
        )
        return arm.get("valid_accuracy") or 0.0, -(at.get("valid_loss") or 0.0)

    return max(arms, key=standing, default=None)


def baseline(arms: list[Arm]) -> Arm | None:
    """The arm without regularization."""
    return next((arm for arm in arms if arm["name"] == "none"), None)


def shown(name: Label | Name) -> Label | str:
    """An arm's name as a value inside another text."""
    return name if isinstance(name, Label) else name.text


def verdict(arms: list[Arm], best: Arm | None) -> Label:
    """What the demo showed, in one sentence."""
    bare = baseline(arms)
    if best is None or bare is None:
        return say("unfinished", epochs=0)
    values = {
        "train": number(bare.get("train_accuracy")),
        "valid": number(bare.get("valid_accuracy")),
        "before": number(test(bare)),
        "after": number(test(best)),
        "method": shown(label(best)),
    }
    return say("demo_unchanged" if best is bare else "demo_cured", **values)


def facts(arms: list[Arm], best: Arm | None) -> tuple[Fact, ...]:
    """Before, after, and the sparsest arm."""
    bare = baseline(arms)
    if best is None or bare is None:
        return ()
    sparsest = max(arms, key=lambda arm: arm.get("zeros") or 0.0)
    found = [
        Fact(say("test_without"), number(test(bare)), interval(bare), "bad"),
        Fact(
            say("test_with", method=shown(label(best))), number(test(best)), interval(best), "good"
        ),
    ]
    if sparsest.get("zeros"):
        note = say("with_method", method=shown(label(sparsest)))
        found.append(Fact(say("zeros"), percent(sparsest["zeros"]), note))
    return tuple(found)


def interval(arm: Arm) -> Label | None:
    """The interval of an arm's test accuracy, in words."""
    low, high = test(arm, "low"), test(arm, "high")
    seeds = len((arm.get("test_accuracy") or {}).get("seeds") or [])
    if low is None or high is None:
        return None
    return say("interval_over", low=number(low), high=number(high), seeds=seeds)


def table(arms: list[Arm], best: Arm | None) -> Table:
    """One row an arm: what it scored and what it cost in zeros."""
    accuracy = parts.Metric("accuracy", say("metric_accuracy"), higher=True)
    rows: list[tuple[Cell, ...]] = [
        (
            label(arm),
            strength(arm.get("chosen_strength")),
            number(arm.get("train_accuracy")),
            number(arm.get("valid_accuracy")),
            number(arm.get("gap")),
            percent(arm.get("zeros")),
            number(test(arm)),
            f"{number(test(arm, 'low'))} – {number(test(arm, 'high'))}",
            parts.gap_mark(accuracy, arm.get("gap")),
        )
        for arm in arms
    ]
    keys = ("method", "chosen_strength", "train", "valid", "gap", "zeros", "test", "interval")
    head = (*(say(key) for key in keys), say("verdict"))
    chosen = next((i for i, arm in enumerate(arms) if arm is best), None)
    return Table(say("arms_caption"), head, tuple(rows), chosen)


def scores(arms: list[Arm]) -> tuple[Chart, ...]:
    """Test accuracy of every arm with its interval."""
    if not arms:
        return ()
    figure = charts.intervals(
        [label(arm) for arm in arms],
        [test(arm) for arm in arms],
        [test(arm, "low") for arm in arms],
        [test(arm, "high") for arm in arms],
        say("test_accuracy"),
        [colour(arm) for arm in arms],
    )
    return (Chart(say("test_accuracy"), figure, say("alt_arms"), say("arms_note"), wide=True),)


def curves(arms: list[Arm]) -> Section | None:
    """Accuracy over the epochs of every arm, on one scale, with the gap shaded."""
    blocks = []
    known = [
        v
        for arm in arms
        for r in history(arm)
        for v in (r.get("train/accuracy"), r.get("valid/accuracy"))
    ]
    low = min(charts.finite(known), default=0.0)
    for arm in filter(history, arms):
        epochs, train, valid = (
            [r.get(key) for r in history(arm)]
            for key in ("epoch", "train/accuracy", "valid/accuracy")
        )
        figure = charts.learning_curves(
            epochs,
            train,
            valid,
            say("metric_accuracy"),
            higher=True,
            range=[max(0, low - 0.02), 1.02],
        )
        alt = say(
            "alt_curves",
            metric=say("metric_accuracy"),
            train=number(train[-1]),
            valid=number(valid[-1]),
        )
        blocks.append(Chart(label(arm), figure, alt))
    if not blocks:
        return None
    return Section(say("learning_curves"), tuple(blocks), say("demo_curves_lead"))


def history(arm: Arm) -> list[dict[str, Any]]:
    """The records of an arm's chosen run."""
    return list(arm.get("history") or [])


def responses(arms: list[Arm]) -> Section | None:
    """Validation accuracy over the strength, an arm a chart, the chosen strength ringed."""
    bare = baseline(arms)
    tried = [arm for arm in arms if len(arm.get("grid") or []) > 1]
    values = [p.get("valid_accuracy") for arm in tried for p in arm["grid"]]
    known = charts.finite([*values, (bare or {}).get("valid_accuracy")])
    if not known:
        return None
    reach = [min(known) - 0.02, min(1.0, max(known) + 0.02)]
    blocks = []
    for arm in tried:
        grid = arm["grid"]
        response = charts.Response(
            strengths=[p["strength"] for p in grid],
            scores=[p.get("valid_accuracy") for p in grid],
            chosen=arm.get("chosen_strength"),
            zeros=[p.get("zeros") for p in grid],
            x=say("dropout_rate" if arm["name"] == "dropout" else "strength"),
            y=say("valid_accuracy"),
            baseline=bare.get("valid_accuracy") if bare else None,
            colour=colour(arm),
        )
        alt = say("alt_response", chosen=strength(arm.get("chosen_strength")))
        blocks.append(Chart(label(arm), charts.score_against_strength(response, range=reach), alt))
    return Section(say("responses"), tuple(blocks), say("responses_lead"))


def penalties(arms: list[Arm]) -> Section | None:
    """Exact zeros over the epochs of every arm that makes some."""
    series: dict[str, list[Any]] = {}
    epochs: list[Any] = []
    for arm in arms:
        records = history(arm)
        keys = [k for k in (records[-1] if records else {}) if k.endswith("/zeros")]
        for key in keys:
            values = [r.get(key) for r in records]
            if any(charts.finite(values)):
                series[key.removeprefix("penalty/").removesuffix("/zeros")] = values
                epochs = [r.get("epoch") for r in records]
    if not series:
        return None
    figure = charts.over_time(epochs, series, say("zeros"), range=[-0.02, 1.02], tickformat=".0%")
    last = ", ".join(f"{name} {percent(values[-1])}" for name, values in series.items())
    chart = Chart(
        say("zeros"), figure, say("alt_over_time", what=say("zeros"), last=last), wide=True
    )
    return Section(say("penalties_over_time"), (chart,), say("demo_zeros_lead"))
