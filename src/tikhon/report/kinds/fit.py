"""The page of one training run."""

from __future__ import annotations

from typing import Any

from tikhon.report.charts import finite
from tikhon.report.kinds import answers, parts
from tikhon.report.kinds.parts import Metric
from tikhon.report.page import (
    Cell,
    Fact,
    Label,
    Level,
    Mark,
    Page,
    Section,
    Table,
    number,
    percent,
    say,
    seconds,
    strength,
)
from tikhon.report.saved import SavedRun

RISE_LIMIT = 1.1  # last validation loss over the smallest one


def page(run: SavedRun) -> Page:
    """Verdict table, learning curves, penalties over time, weights, how to reproduce."""
    metric = parts.metric_of(run.history)
    best = run.result.get("best_epoch")
    record = parts.final_record(run)
    rows = checks(run, metric, record)
    marks: list[Level] = [cell.level for row in rows for cell in row if isinstance(cell, Mark)]
    head = (say("check"), say("value"), say("limit"), say("verdict"))
    table = Table(say("checks_caption"), head, tuple(rows))
    penalties = parts.penalty_table(run.result.get("penalties") or {})
    summary = (table, penalties) if penalties else (table,)
    return Page(
        title=say("title_fit", data=parts.data_name(run)),
        level=parts.worst(marks) if run.result else "watch",
        verdict=verdict(run, metric, record),
        facts=facts(run, metric, record),
        about=parts.about(run),
        sections=parts.sections(
            Section(say("verdict"), summary),
            parts.curves(run, metric, best),
            parts.penalties_over_time(run),
            parts.weights(run.result.get("weights") or {}),
            answers.section(run.result.get("predictions") or {}),
            parts.reproduce(run),
        ),
    )


def gap(metric: Metric, record: dict[str, Any]) -> float | None:
    """Gap between train and validation score in one record."""
    train, valid = record.get(f"train/{metric.key}"), record.get(f"valid/{metric.key}")
    match finite([train, valid]):
        case [train, valid]:
            return metric.gap(train, valid)
    return None


def verdict(run: SavedRun, metric: Metric, record: dict[str, Any]) -> Label:
    """What the run shows, in one sentence."""
    if not run.result:
        return say("unfinished", epochs=len(run.history))
    values = {
        "metric": metric.label,
        "train": number(record.get(f"train/{metric.key}")),
        "valid": number(record.get(f"valid/{metric.key}")),
    }
    size = gap(metric, record)
    if size is None:
        return say("fit_no_valid", **values)
    return say("fit_memorises" if size > metric.limit else "fit_even", **values)


def checks(run: SavedRun, metric: Metric, record: dict[str, Any]) -> list[tuple[Cell, ...]]:
    """Value, limit and verdict of every check that this run allows."""
    size = gap(metric, record)
    rows: list[tuple[Cell, ...]] = [
        (
            say("check_gap") if metric.higher else say("check_ratio"),
            number(size),
            strength(metric.limit),
            parts.gap_mark(metric, size),
        )
    ]
    losses = finite(run.series("valid/loss"))
    if losses and min(losses) > 0:
        rise = losses[-1] / min(losses)
        level: Level = "good" if rise <= RISE_LIMIT else "watch"
        mark = Mark(level, say("rise_small" if level == "good" else "rise_large"))
        rows.append((say("check_rise"), number(rise), strength(RISE_LIMIT), mark))
    broken = [r.get("epoch") for r in run.history if not finite([r.get("train/loss")])]
    mark = Mark("good", say("all_finite"))
    if broken:
        mark = Mark("bad", say("diverged", epoch=broken[0]))
    rows.append((say("check_finite"), str(len(broken)), "0", mark))
    return rows


def facts(run: SavedRun, metric: Metric, record: dict[str, Any]) -> tuple[Fact, ...]:
    """The large figures: scores, gap, zeros, time."""
    found = [parts.score_fact(metric, record, part) for part in ("test", "valid", "train")]
    zeros = finite([p.get("zeros") for p in (run.result.get("penalties") or {}).values()])
    if zeros and max(zeros) > 0:
        found.append(Fact(say("zeros"), percent(max(zeros))))
    if run.result.get("best_epoch") is not None:
        found.append(Fact(say("best_epoch"), str(run.result["best_epoch"])))
    if run.result.get("seconds") is not None:
        found.append(Fact(say("time"), seconds(run.result["seconds"])))
    return tuple(fact for fact in found if fact is not None)
