"""Several runs on one page: a table, their validation curves together, then each verdict."""

from __future__ import annotations

from collections.abc import Sequence

from tikhon.report import charts
from tikhon.report.kinds import parts
from tikhon.report.page import (
    Cell,
    Chart,
    Mark,
    Name,
    Page,
    Section,
    Table,
    number,
    percent,
    say,
    seconds,
)
from tikhon.report.saved import SavedRun


def page(runs: Sequence[SavedRun], pages: Sequence[Page]) -> Page:
    """Compare runs; `pages` are their own pages, in the same order."""
    fits = [run for run in runs if run.kind == "fit"]
    records = [parts.final_record(run) if run in fits else {} for run in runs]
    metric = parts.metric_of(records)
    scores = [record.get(f"valid/{metric.key}") for record in records]
    known = charts.finite(scores)
    top = (max if metric.higher else min)(known) if known else None
    best = None if top is None else scores.index(top)
    verdict = say("several_unscored", runs=len(runs))
    if best is not None:
        values = {"run": runs[best].name, "score": number(scores[best]), "runs": len(runs)}
        verdict = say("several_best", metric=parts.word(metric), **values)
    return Page(
        title=say("title_several", runs=len(runs)),
        level="plain",
        verdict=verdict,
        sections=parts.sections(
            Section(say("verdict"), (table(runs, pages, records, metric, best),)),
            curves(fits, metric),
            verdicts(runs, pages),
        ),
    )


def table(runs, pages, records, metric, best) -> Table:
    """One row a run."""
    rows: list[tuple[Cell, ...]] = []
    for run, own, record in zip(runs, pages, records):
        zeros = charts.finite(
            [p.get("zeros") for p in (run.result.get("penalties") or {}).values()]
        )
        rows.append((
            Name(run.name), Name(run.kind),
            *(number(record.get(f"{part}/{metric.key}")) for part in ("train", "valid", "test")),
            percent(max(zeros, default=None)), seconds(run.result.get("seconds")),
            Mark(own.level, say(f"level_{own.level}")),
        ))  # fmt: skip
    keys = ("about_run", "kind", "train", "valid", "test", "zeros", "time", "verdict")
    caption = say("several_caption", metric=metric.label)
    return Table(caption, tuple(say(key) for key in keys), tuple(rows), best, tag="best")


def curves(runs: Sequence[SavedRun], metric: parts.Metric) -> Section | None:
    """Validation scores over the epochs, a line a run."""
    drawn = [run for run in runs if charts.finite(run.series(f"valid/{metric.key}"))]
    if not drawn:
        return None
    longest = max(drawn, key=lambda run: len(run.history))
    series = {run.name: run.series(f"valid/{metric.key}") for run in drawn}
    figure = charts.over_time(longest.series("epoch"), series, metric.label)
    last = ", ".join(f"{name} {number(values[-1])}" for name, values in series.items())
    alt = say("alt_over_time", what=metric.label, last=last)
    chart = Chart(parts.part_score(metric, "valid"), figure, alt, wide=True)
    return Section(say("learning_curves"), (chart,))


def verdicts(runs: Sequence[SavedRun], pages: Sequence[Page]) -> Section:
    """What each run's own page says."""
    rows = tuple((Name(run.name), own.verdict) for run, own in zip(runs, pages))
    head = (say("about_run"), say("verdict"))
    return Section(say("verdicts"), (Table(say("verdicts_caption"), head, rows),))
