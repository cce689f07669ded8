"""The page of one training run."""

from __future__ import annotations

from collections.abc import Mapping

from tikhon.numbers import format_duration
from tikhon.report.charts import finite
from tikhon.report.kinds import columns, elements, predictions, scores
from tikhon.report.kinds.elements import ScoreKind
from tikhon.report.page import (
    Fact,
    Label,
    Level,
    Name,
    Page,
    Section,
    format_number,
    label,
    percent,
)
from tikhon.report.saved import SavedRun


def page(run: SavedRun) -> Page:
    """Build the page: verdict, scores, learning curves, penalties, weights, predictions."""
    metric = elements.metric_of([*run.history, run.result.get("metrics") or {}])
    best = elements.kept_epoch(run)
    record = elements.final_record(run)
    sentences = verdict(run, metric, record)
    penalties = elements.penalty_table(run.result.get("penalties") or {})
    left = run.result.get("sparsity")
    thinned = elements.sparsity_table(left) if left else None
    tables = (
        scores.table(run, [(label(f"part_{part}"), record, part) for part in scores.PARTS]),
        scores.recall_table(run),
        penalties,
        thinned,
    )
    return Page(
        title=label("title_fit", data=elements.data_name(run)),
        level=level(run),
        verdict=sentences[0],
        remarks=sentences[1:],
        next_commands=run.next_commands,
        facts=facts(run, metric, record),
        about=elements.about_run(run),
        sections=elements.without_missing(
            Section(label("scores"), tuple(table for table in tables if table)),
            elements.learning_curves(run, metric, best),
            columns.importances(run),
            elements.penalties_over_time(run),
            elements.weight_section(run.result.get("weights") or {}),
            predictions.section(run.result.get("predictions") or {}),
            columns.section(run),
            elements.command_section(run),
        ),
    )


def level(run: SavedRun) -> Level:
    """Return the worst level of the sentences; plain for an unfinished run."""
    if broken(run):
        return "bad"
    if not run.result:
        return "plain"
    levels = [found["level"] for found in run.result.get("statements") or ()]
    return elements.worst(levels)


def last_epoch(run: SavedRun) -> int:
    """Return the last epoch of the history, which may be thinned."""
    return int(run.history[-1].get("epoch") or len(run.history)) if run.history else 0


def broken(run: SavedRun) -> object:
    """Return the first epoch with a non-finite loss."""
    known = (r for r in run.history if "train/loss" in r)
    return next((r.get("epoch") for r in known if not finite([r["train/loss"]])), None)


def verdict(
    run: SavedRun, metric: ScoreKind, record: Mapping[str, object]
) -> tuple[Label | Name, ...]:
    """Return the sentences of the run, most important first."""
    if (epoch := broken(run)) is not None:
        return (label("diverged", epoch=epoch),)
    if not run.result:
        most = (run.config.get("optimizer") or {}).get("epochs")
        return (unfinished(run, most),)
    found = [sentence(entry) for entry in run.result.get("statements") or ()]
    if found:
        last = columns.important_columns(run)
        return tuple(found) if last is None else (*found, last)
    values = {
        part: format_number(record.get(f"{part}/{metric.key}")) for part in ("train", "valid")
    }
    key = "fit_plain" if values["valid"] != "–" else "fit_no_valid"
    return (label(key, metric=metric.label, **values),)  # from a version that stored no sentences


def unfinished(run: SavedRun, most: int | None) -> Label:
    """Report the progress of a run, and the time left at its average pace."""
    done = last_epoch(run)
    passed = run.history[-1].get("seconds") if run.history else None
    if not most:
        return label("unfinished", epochs=f"{done:,}")
    if not done or not isinstance(passed, int | float):
        return label("unfinished_of", epochs=f"{done:,}", all=f"{most:,}")
    left, budget = passed / done * (most - done), run.config.get("budget")
    early = (run.config.get("recipe") or {}).get("early_stopping")
    if isinstance(budget, int | float) and budget - passed < left:
        left, early = max(budget - passed, 0.0), True  # fewer epochs than planned
    key = "unfinished_at_most" if early else "unfinished_left"
    return label(key, epochs=f"{done:,}", all=f"{most:,}", left=format_duration(left))


def sentence(entry: Mapping[str, object]) -> Label:
    """Translate a stored sentence."""
    values = {k: v for k, v in entry.items() if k not in ("code", "level")}
    if "part" in values:
        values["part"] = label(f"rows_of_{values['part']}")
    for kind in ("units", "cost"):
        if values.get(kind):
            values[kind] = label(f"{kind}_{values[kind]}")
    return label(f"verdict_{entry['code']}", **values)


def facts(run: SavedRun, metric: ScoreKind, record: Mapping[str, object]) -> tuple[Fact, ...]:
    """Return the main figures: scores, gap, zeros, time."""
    found = [elements.score_fact(metric, record, part) for part in ("test", "valid", "train")]
    zeros = finite([p.get("zeros") for p in (run.result.get("penalties") or {}).values()])
    if zeros and max(zeros) > 0:
        found.append(Fact(label("zeros"), percent(max(zeros))))
    if (best := run.result.get("best_epoch")) is not None:
        last = elements.kept_epoch(run) is None and run.result.get("epochs") not in (best, None)
        note = label("best_not_kept") if last else None
        found.append(Fact(label("best_epoch"), str(best), note))
    return (*(fact for fact in found if fact is not None), *elements.time_fact(run))
