"""The page of a search: the choice, its reliability, and the trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median

from tikhon.options import with_mode
from tikhon.report import charts, search_charts
from tikhon.report.kinds import columns, elements, scores
from tikhon.report.page import (
    Cell,
    Chart,
    Fact,
    Label,
    Level,
    Mark,
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
from tikhon.runs.documents import SavedAudit, SavedTrial

SHOWN = 12  # rows in the table of trials


@dataclass(frozen=True)
class Member:
    """One configuration over all its rungs."""

    config: Mapping[str, object]
    budget: int
    score: float | None
    error: float | None
    curve: tuple[tuple[float, float | None], ...]
    strengths: Mapping[str, object]
    failed: bool


def page(run: SavedRun) -> Page:
    """Build the page: verdict, audit, rungs, responses, parallel coordinates, trials."""
    run = with_own_sign(run)
    found = members(run.result.get("trials") or [])
    config = dict(run.result.get("config") or {})
    chosen = next((i for i, m in enumerate(found) if dict(m.config) == config), None)
    audit: SavedAudit = run.result.get("audit") or {}
    summary = (scores.table(run, scored_models(run)), choice_table(run), audit_table(audit))
    return Page(
        title=label("title_tune", data=elements.data_name(run)),
        level=level(run, audit),
        verdict=verdict(run, audit),
        remarks=remarks(run, audit),
        next_commands=run.next_commands,
        facts=facts(run, found, audit),
        about=elements.about_run(run),
        sections=elements.without_missing(
            Section(label("verdict"), tuple(t for t in summary if t)),
            rungs(run, found, chosen),
            responses(run, found, chosen),
            table(run, found, chosen),
            columns.section(run),
            elements.command_section(run),
        ),
    )


def maximised(run: SavedRun) -> bool:
    """Return whether trials are compared by a score to maximise.

    A running search has no audit yet; then it is one of the command line, whose metrics are
    scorers.
    """
    audit: SavedAudit = run.result.get("audit") or {}
    return audit["maximised"] if "maximised" in audit else metric_of(run) is not None


def with_own_sign(run: SavedRun) -> SavedRun:
    """Undo the negation of scores stored by a maximising search."""
    if not maximised(run):
        return run
    trials = [
        trial
        | {"score": negated(trial["score"])}
        | {"curve": [[epoch, negated(v)] for epoch, v in trial.get("curve") or []]}
        for trial in run.result.get("trials") or []
    ]
    return replace(run, result={**run.result, "trials": trials})


def negated(value: float | None) -> float | None:
    """Negate a number, keeping 0 positive."""
    return None if value is None else 0.0 - value


def best_score(run: SavedRun, values: list[float]) -> float | None:
    """Return the best of some scores."""
    return (max if maximised(run) else min)(values, default=None)


def metric_of(run: SavedRun) -> str | None:
    """Return the metric that trials are compared by, None for the loss."""
    name = run.result.get("metric")
    return None if name in (None, "loss") else str(name)


def measure(run: SavedRun) -> Label:
    """Name the metric as a title."""
    name = metric_of(run)
    return label("compared_by", metric=name) if name else label("compared_by_loss")


def measure_word(run: SavedRun) -> Label:
    """Name the metric within a sentence."""
    name = metric_of(run)
    return label("compared_by_word", metric=name) if name else label("compared_by_word_loss")


def level(run: SavedRun, audit: Mapping[str, object]) -> Level:
    """Return "good" if the search improved on the default, "plain" while it runs, else "watch"."""
    if not run.result.get("config"):
        return "plain"
    gained = audit.get("worth_it") and not scores.learned_nothing(run.result)
    return "good" if gained and not audit.get("edges") else "watch"


def scored_models(run: SavedRun) -> list[scores.ScoredRows]:
    """Return the test scores of the chosen model and of the average."""
    held = [("chosen_model", run.result.get("metrics")), ("average", run.result.get("average"))]
    return [(label(key), found, "test") for key, found in held if found]


def remarks(run: SavedRun, audit: SavedAudit) -> tuple[Label, ...]:
    """Return what the test rows show, then doubts about the choice."""
    found = [scores.compare_to_baselines(run)]
    if audit.get("best_score") != audit.get("chosen_score"):
        found.append(label("tune_near_best", best=format_number(audit.get("best_score"))))
    if edges := audit.get("edges"):
        found.append(label("tune_edge", names=", ".join(edges)))
    if run.result.get("stopped"):
        found.append(label("tune_stopped", trials=len(run.result.get("trials") or [])))
    return tuple(sentence for sentence in found if sentence)


def members(trials: list[SavedTrial]) -> list[Member]:
    """Group trials by configuration; later rungs extend the curve."""
    grouped: dict[str, list[SavedTrial]] = {}
    for trial in trials:
        grouped.setdefault(json.dumps(trial["config"], sort_keys=True), []).append(trial)
    found = []
    for rows in grouped.values():
        rows = sorted(rows, key=lambda row: row["budget"])
        last = rows[-1]
        curve = {epoch: loss for row in rows for epoch, loss in row.get("curve") or []}
        found.append(
            Member(
                last["config"],
                last["budget"],
                last["score"],
                last.get("error"),
                tuple(sorted(curve.items())),
                last.get("strengths") or {},
                last["score"] is None,
            )
        )
    return found


def full_budget(found: list[Member]) -> int:
    """Return the epochs of a full training."""
    return max((m.budget for m in found), default=0)


def verdict(run: SavedRun, audit: Mapping[str, object]) -> Label:
    """Return the result of the search in one sentence."""
    config = run.result.get("config")
    if not config:
        losses = [trial["score"] for trial in run.result.get("trials") or []]
        best = format_number(best_score(run, charts.finite(losses)))
        measured = measure_word(run)
        return label("unfinished_search", trials=len(losses), measure=measured, score=best)
    values = {
        "measure": measure_word(run),
        "config": ", ".join(f"{with_mode(k)} {short(v)}" for k, v in config.items()),
        "score": format_number(run.result.get("score")),
        "default": format_number(audit.get("default_score")),
        "epoch": audit.get("default_epoch") or "–",
        "gain": format_number(audit.get("gain")),
        "error": format_number(audit.get("gain_error")),
    }
    if scores.learned_nothing(run.result):
        answer = run.result.get("answer") or label("the_mean")
        return label("tune_nothing", **values | {"answer": answer})
    if audit.get("gain") is None:
        return label(
            "tune_default_short" if audit.get("default_epoch") else "tune_alone", **values
        )
    if audit.get("candidates") == 1 and audit.get("failed"):
        return label("tune_only_default", **values)
    return label("tune_better" if audit.get("worth_it") else "tune_same", **values)


def short(value: object) -> str:
    """Format a hyperparameter value."""
    return strength(value) if isinstance(value, float) else str(value)


def facts(run: SavedRun, found: list[Member], audit: SavedAudit) -> tuple[Fact, ...]:
    """Return score, gain, trials and time."""
    metrics = run.result.get("metrics") or {}
    tested = elements.score_fact(elements.metric_of([metrics]), metrics, "test")
    shown = [] if tested is None else [tested]
    if run.result.get("score") is not None:
        shown.append(Fact(measure(run), format_number(run.result["score"])))
    if (gain := audit.get("gain")) is not None:
        better = audit.get("worth_it")
        note = label("plus_minus", error=format_number(audit.get("gain_error")))
        shown.append(
            Fact(
                label("gain_score" if audit.get("maximised") else "gain"),
                format_number(gain),
                note,
                "good" if better else "watch",
            )
        )
    shown.append(Fact(label("tried"), str(len(found))))
    return (*shown, *elements.time_fact(run))


def choice_table(run: SavedRun) -> PageTable | None:
    """Tabulate the chosen hyperparameters with their search ranges."""
    config, space = run.result.get("config") or {}, run.result.get("space") or {}
    rows: list[tuple[Cell, ...]] = [
        (Name(with_mode(name)), short(value), range_cell(space.get(name)))
        for name, value in config.items()
    ]
    head = (label("hyperparameter"), label("value"), label("searched"))
    return PageTable(label("choice_caption"), head, tuple(rows)) if rows else None


def range_cell(range_: object) -> Cell:
    """Format a search range."""
    if not isinstance(range_, Mapping):
        return "–" if range_ is None else Name(str(range_))
    if "low" in range_:
        ends = {end: short(range_[end]) for end in ("low", "high")}
        return label("range_log" if range_.get("kind") == "log" else "range_even", **ends)
    return Name(", ".join(map(str, range_.get("options", range_.get("values", [])))))


def audit_table(audit: SavedAudit) -> PageTable | None:
    """Tabulate the uncertainty of the choice."""
    if not audit:
        return None
    edges, failed = audit.get("edges") or [], audit.get("failed")
    noise, chosen = audit.get("noise", 0.0), audit.get("chosen_score")
    share = noise / chosen if chosen else None
    gain = f"{format_number(audit.get('gain'))} ± {format_number(audit.get('gain_error'))}"
    clear = "better_than_default" if audit.get("worth_it") else "no_better_than_default"
    small = "noise_small" if share is not None and share <= 0.02 else "noise_large"
    at_edge = label("at_edge", names=", ".join(edges)) if edges else label("inside")
    lost = Mark("plain", label("left_out")) if failed else Mark("good", label("none_failed"))
    spread = f"{format_number(noise)} ({percent(share)})"
    rows = [
        (label("audit_noise"), spread, _mark(small == "noise_small", label(small))),
        (label("audit_edges"), str(len(edges)), _mark(not edges, at_edge)),
        (label("audit_failed"), str(failed or 0), lost),
    ]
    if audit.get("gain") is not None:
        check = label("audit_gain_score" if audit.get("maximised") else "audit_gain")
        rows.insert(0, (check, gain, _mark(audit.get("worth_it"), label(clear))))
    head = (label("check"), label("value"), label("verdict"))
    return PageTable(label("audit_caption"), head, tuple(rows))


def _mark(fine: object, words: Label) -> Mark:
    return Mark("good" if fine else "watch", words)


def rungs(run: SavedRun, found: list[Member], chosen: int | None) -> Section | None:
    """Plot validation curves by outcome, and tabulate the rungs."""
    longest = full_budget(found)
    curves = []
    for i, m in enumerate(found):
        if i == chosen:
            fate = label("chosen")
        elif m.failed:
            fate = label("diverged_trials")
        else:
            fate = label("finished" if m.budget >= longest else "stopped_early")
        curves.append(([e for e, _ in m.curve], [v for _, v in m.curve], fate))
    if not any(x for x, _, _ in curves):
        return None
    colours = {"stopped_early": "muted", "diverged_trials": "series-5", "finished": "series-1"}
    figure = search_charts.curves_by_outcome(curves, measure(run), {**colours, "chosen": "chosen"})
    alt = label("alt_rungs", measure=measure(run), trials=len(found), epochs=longest)
    chart = Chart(label("rungs"), figure, alt, wide=True)
    return Section(label("rungs"), (chart, rung_table(run)), label("rungs_lead"))


def rung_table(run: SavedRun) -> PageTable:
    """Tabulate trials, failures and scores for each budget."""
    budgets: dict[int, list[float | None]] = {}
    for trial in run.result["trials"]:
        budgets.setdefault(trial["budget"], []).append(trial["score"])
    rows = []
    for budget, losses in sorted(budgets.items()):
        known = charts.finite(losses)
        rows.append(
            (
                str(budget),
                str(len(losses)),
                str(len(losses) - len(known)),
                format_number(best_score(run, known)),
                format_number(median(known) if known else None),
            )
        )
    keys = ("epochs", "tried", "diverged_trials", "best_score", "median_score")
    return PageTable(label("rungs_caption"), tuple(label(key) for key in keys), tuple(rows))


def responses(run: SavedRun, found: list[Member], chosen: int | None) -> Section | None:
    """Plot the score against each hyperparameter, then in parallel coordinates."""
    shown = [i for i, m in enumerate(found) if m.score is not None]
    names = list(dict.fromkeys(n for i in shown for n in found[i].config))
    varying = [n for n in names if len({str(found[i].config.get(n)) for i in shown}) > 1]
    if not varying:
        return None
    longest = full_budget(found)
    blocks = []
    for name in varying:
        figure = search_charts.scatter(
            [found[i].config.get(name) for i in shown],
            [found[i].score for i in shown],
            Name(with_mode(name)),
            measure(run),
            shown.index(chosen) if chosen in shown else None,
            faint=[found[i].budget < longest for i in shown],
            log=name in logarithmic(run),
        )
        alt = label("alt_scatter", measure=measure(run), name=name)
        blocks.append(Chart(Name(with_mode(name)), figure, alt))
    if chosen in shown and len(varying) > 1:
        blocks.append(coordinates(run, found, shown, varying, chosen))
    return Section(label("hyperparameters"), tuple(blocks), label("hyperparameters_lead"))


def logarithmic(run: SavedRun) -> set[str]:
    """Return the hyperparameters searched on a log scale."""
    space = run.result.get("space") or {}
    return {n for n, e in space.items() if isinstance(e, Mapping) and e.get("kind") == "log"}


def coordinates(
    run: SavedRun, found: list[Member], shown: list[int], names: list[str], chosen: int
) -> Chart:
    """Plot hyperparameters and score in parallel coordinates."""
    columns = {name: [found[i].config.get(name) for i in shown] for name in names}
    scores = [found[i].score for i in shown]
    axes = []
    for name, values in (*columns.items(), ("", scores)):
        places = search_charts.relative_positions(values, name in logarithmic(run))
        ends = [v for v in values if v is not None]
        numbers = charts.finite(ends)
        ends = sorted(numbers) if len(numbers) == len(ends) else sorted(ends, key=str)
        reach = short(ends[0]), short(ends[-1])
        title = with_mode(name) if name else measure(run)
        axes.append(search_charts.Coordinate(title, places, *reach))
    order = sorted(
        range(len(shown)), key=lambda k: found[shown[k]].score or 0.0, reverse=maximised(run)
    )
    rank = {k: position / len(shown) for position, k in enumerate(order)}
    figure = search_charts.parallel(
        axes, [rank[k] for k in range(len(shown))], shown.index(chosen)
    )
    return Chart(
        label("parallel"), figure, label("alt_parallel"), label("parallel_note"), wide=True
    )


def table(run: SavedRun, found: list[Member], chosen: int | None) -> Section | None:
    """Tabulate the best trials with configuration and training length."""
    losses = [run.result["score"] if i == chosen else m.score for i, m in enumerate(found)]
    sign = -1.0 if maximised(run) else 1.0
    order = sorted(
        range(len(found)),
        key=lambda i: (found[i].failed, -found[i].budget, sign * (losses[i] or 0.0)),
    )[:SHOWN]
    names = list(dict.fromkeys(n for m in found for n in m.config))
    if not order:
        return None
    rows = tuple(
        (
            str(position + 1),
            *(short(found[i].config.get(n, "–")) for n in names),
            str(found[i].budget),
            format_number(losses[i]),  # the final evaluation for the chosen one
            format_number(found[i].error or None),
        )
        for position, i in enumerate(order)
    )
    head = (
        label("rank"),
        *(Name(with_mode(name)) for name in names),
        label("epochs"),
        measure(run),
        label("standard_error"),
    )
    mark = order.index(chosen) if chosen in order else None
    measured = measure_word(run)
    caption = label("trials_caption", measure=measured, shown=len(order), all=len(found))
    return Section(label("trials_title"), (PageTable(caption, head, rows, mark),))
