"""Several runs on one page, compared if they share data and metric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev

from tikhon.numbers import Z_95, t_quantile
from tikhon.report import charts
from tikhon.report.kinds import elements
from tikhon.report.page import (
    Block,
    Cell,
    Chart,
    Label,
    Mark,
    Name,
    Page,
    PageTable,
    Section,
    format_number,
    label,
    percent,
    seconds,
)
from tikhon.report.saved import SavedRun
from tikhon.runs.documents import Epoch, Number


@dataclass(frozen=True)
class RunGroup:
    """Runs on the same data with the same metric, with their pages and scores."""

    runs: tuple[SavedRun, ...]
    pages: tuple[Page, ...]
    records: tuple[Epoch, ...]
    metric: elements.ScoreKind
    data: str

    @property
    def scores(self) -> list[Number]:
        """Validation score of each run."""
        return [record.get(f"valid/{self.metric.key}") for record in self.records]

    @property
    def leader(self) -> int | None:
        """Index of the run with the best validation score."""
        known = charts.finite(self.scores)
        if not known:
            return None
        return self.scores.index((max if self.metric.higher else min)(known))

    def tied(self) -> list[str]:
        """Names of the runs not significantly different from the leader on validation rows."""
        best = self.leader
        if best is None:
            return []
        return [
            run.name
            for i, run in enumerate(self.runs)
            if i != best and not self._apart(best, i) and charts.finite([self.scores[i]])
        ]

    def _apart(self, first: int, second: int) -> bool:
        held = [self.runs[i].result.get("by_row") or {} for i in (first, second)]
        if self.metric.key in held[0] and held[0].get("rows") == held[1].get("rows"):
            return differ_by_row(*(each[self.metric.key] for each in held))
        key = f"valid/{self.metric.key}"
        errors = [
            (self.runs[i].result.get("score_errors") or {}).get(key) for i in (first, second)
        ]
        known = charts.finite(errors)
        scores = charts.finite(self.scores[i] for i in (first, second))
        if len(known) < 2 or len(scores) < 2:
            return False
        if not self.metric.higher:  # their standard errors are on a log scale
            scores = [math.log(max(score, 1e-300)) for score in scores]
        return abs(scores[0] - scores[1]) > Z_95 * math.hypot(*known)


def differ_by_row(first: str | Sequence[float], second: str | Sequence[float]) -> bool:
    """Return whether two runs differ significantly, paired by row.

    Strings hold "1" for each correct prediction (with half a row added to each cell, as for the
    baselines), numbers are squared errors.
    """
    differences = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    count, total = len(differences), sum(differences)
    if count < 2:
        return False
    if isinstance(first, str):
        count += 2
        spread = sum(map(abs, differences)) + 1 - total**2 / count
        return abs(total) > Z_95 * math.sqrt(spread)
    return abs(total) / count > t_quantile(count) * stdev(differences) / math.sqrt(count)


def page(runs: Sequence[SavedRun], pages: Sequence[Page]) -> Page:
    """Compare runs; `pages` are their own pages in the same order."""
    groups = group_runs(runs, pages)
    compared = [group for group in groups if len(group.runs) > 1]
    sections = [section for group in compared for section in group_sections(group)]
    title = label("title_several", runs=len(runs)) if compared else label("title_beside")
    return Page(
        title=title,
        level="plain",
        verdict=verdict(runs, groups),
        sections=elements.without_missing(*sections, verdicts(runs, pages)),
    )


def group_runs(runs: Sequence[SavedRun], pages: Sequence[Page]) -> list[RunGroup]:
    """Group runs by metric, data fingerprint and task, in the given order."""
    found: dict[tuple[object, ...], list[int]] = {}
    records = [elements.final_record(run) for run in runs]
    metrics = [elements.metric_of([record]) for record in records]
    for i, run in enumerate(runs):
        held = elements.as_mapping(run.config.get("data"))
        same = held.get("fingerprint") or (elements.data_name(run), str(held.get("rows")))
        key = (metrics[i].key, str(same), held.get("task"), run.kind == "fit" or run.path)
        found.setdefault(key, []).append(i)
    return [
        RunGroup(
            tuple(runs[i] for i in members),
            tuple(pages[i] for i in members),
            tuple(records[i] for i in members),
            metrics[members[0]],
            elements.data_name(runs[members[0]]),
        )
        for members in found.values()
    ]


def verdict(runs: Sequence[SavedRun], groups: Sequence[RunGroup]) -> Label:
    """Name the best run where runs are comparable."""
    if len(groups) > 1:
        shared = any(len(group.runs) > 1 for group in groups)
        key = "several_groups" if shared else "several_apart"
        return label(key, runs=len(runs), groups=len(groups))
    [group] = groups
    best = group.leader
    if best is None:
        return label("several_unscored", runs=len(runs))
    values = {
        "metric": elements.metric_word(group.metric),
        "run": group.runs[best].name,
        "score": format_number(group.scores[best]),
        "runs": len(runs),
    }
    if equal := group.tied():
        return label("several_tied", equal=", ".join(equal), **values)
    return label("several_best", **values)


def group_sections(group: RunGroup) -> list[Section]:
    """Return scores, differing settings and curves of comparable runs."""
    blocks: list[Block] = [table(group)]
    if differing := settings(group):
        blocks.append(differing)
    title = label("several_on", data=group.data, metric=elements.metric_word(group.metric))
    lead = None if _same_rows(group) else label("several_rows")
    found = [Section(title, tuple(blocks), lead)]
    return found + [section for section in (curves(group),) if section]


def _same_rows(group: RunGroup) -> bool:
    """Return whether the runs used the same validation rows."""
    cuts = {
        (run.config.get("seed"), str(elements.as_mapping(run.config.get("data")).get("split")))
        for run in group.runs
    }
    return len(cuts) == 1


def table(group: RunGroup) -> PageTable:
    """Tabulate one row for each run; "best" only if it differs significantly from all others."""
    metric, rows = group.metric, []
    for run, own, record in zip(group.runs, group.pages, group.records):
        zeros = charts.finite(
            [p.get("zeros") for p in (run.result.get("penalties") or {}).values()]
        )
        cells: tuple[Cell, ...] = (
            Name(run.name),
            Name(group.data),
            *(
                format_number(record.get(f"{part}/{metric.key}"))
                for part in ("train", "valid", "test")
            ),
            percent(max(zeros, default=None)),
            seconds(run.result.get("seconds")),
            Mark(own.level, label(f"level_{own.level}")),
        )
        rows.append(cells)
    keys = ("about_run", "about_data", "train", "valid", "test", "zeros", "time", "verdict")
    caption = label("several_caption", metric=metric.label)
    best = None if group.tied() else group.leader
    return PageTable(caption, tuple(label(key) for key in keys), tuple(rows), best, tag="best")


def settings(group: RunGroup) -> PageTable | None:
    """Tabulate the settings that differ."""
    held = [_settings_of(run.config) for run in group.runs]
    names = list(dict.fromkeys(name for found in held for name in found))
    differing = [n for n in names if len({found.get(n) for found in held}) > 1]
    if not differing:
        return None
    rows = tuple(
        (
            title if isinstance(title, Label) else Name(title),
            *(Name(found[name], 40) if name in found else label("setting_none") for found in held),
        )
        for name in differing
        for title in [elements.named(f"setting_name_{name}", name)]
    )
    head = (label("setting"), *(Name(run.name) for run in group.runs))
    return PageTable(label("settings_caption"), head, rows)


def _settings_of(config: Mapping[str, object]) -> dict[str, str]:
    """Return the user's settings of a run, under one name each; those not set are left out."""
    found: dict[str, object] = {}
    for key in ("model", "optimizer", "recipe"):
        for name, value in elements.as_mapping(config.get(key)).items():
            if name not in ("shape", "outputs"):
                found[key if name == "name" else name] = value
    found["split"] = elements.as_mapping(config.get("data")).get("split")
    found["seed"] = config.get("seed")
    return {
        name: elements.format_value(value)
        for name, value in found.items()
        if value not in (None, {}, [])
    }


def curves(group: RunGroup) -> Section | None:
    """Plot validation scores over epochs, one line for each run."""
    metric = group.metric
    drawn = [run for run in group.runs if charts.finite(run.series(f"valid/{metric.key}"))]
    if len(drawn) < 2:
        return None
    longest = max(drawn, key=lambda run: len(run.history))
    series = {run.name: run.series(f"valid/{metric.key}") for run in drawn}
    figure = charts.lines_over_epochs(longest.series("epoch"), series, metric.label)
    alt = elements.describe_lines(metric.label, series)
    chart = Chart(elements.part_score(metric, "valid"), figure, alt, wide=True)
    return Section(label("learning_curves"), (chart,))


def verdicts(runs: Sequence[SavedRun], pages: Sequence[Page]) -> Section:
    """Tabulate the verdict of each run."""
    rows = tuple(
        (Name(run.name), Name(run.kind), Name(elements.data_name(run)), own.verdict)
        for run, own in zip(runs, pages)
    )
    head = (label("about_run"), label("kind"), label("about_data"), label("verdict"))
    return Section(label("verdicts"), (PageTable(label("verdicts_caption"), head, rows),))
