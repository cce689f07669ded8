"""The page of a path: which features enter as the penalty weakens, and what they improve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tikhon.report import charts
from tikhon.report.kinds import columns, elements, scores
from tikhon.report.page import (
    Chart,
    Fact,
    Label,
    Name,
    Page,
    PageTable,
    Section,
    format_number,
    label,
    strength,
)
from tikhon.report.saved import SavedRun

LINES = 12  # features with their own line; the others share one colour
ROWS = 20  # approximate rows in the table of models
_MUCH = 1 / 3  # share of what the best model gains that a sparse one gives up


def page(run: SavedRun) -> Page:
    """Build the page: verdict, score and importances over strength, selected features."""
    result = run.result
    chosen = result.get("chosen")
    return Page(
        title=label("title_path", data=elements.data_name(run), penalty=result.get("penalty", "")),
        level="good" if chosen is not None and result["counts"][chosen] else "plain",
        verdict=verdict(run, chosen),
        remarks=remarks(run, chosen),
        next_commands=run.next_commands,
        facts=facts(run, chosen),
        about=elements.about_run(run),
        sections=elements.without_missing(
            summary(run, chosen),
            responses(run, chosen),
            importances(run),
            columns.section(run),
            elements.command_section(run),
        ),
    )


def best_of(run: SavedRun) -> int | None:
    """Return the index of the lowest score, of the chosen model among equals."""
    scored = [i for i, s in enumerate(run.result.get("scores") or []) if s is not None]
    chosen = run.result.get("chosen")
    return min(scored, key=lambda i: (run.result["scores"][i], i != chosen), default=None)


def of_weights(run: SavedRun) -> bool:
    """Return whether the path removes weights of a network, not features."""
    return run.result.get("of") == "weights"


def total(run: SavedRun) -> int:
    """Return the number of features, or of penalised weights."""
    if of_weights(run):
        return run.result["weights"]
    rows = run.result.get("importances") or []
    return len(rows[0]) if rows else len(run.result.get("feature_names") or [])


def verdict(run: SavedRun, chosen: int | None) -> Label:
    """Return the result of the path in one sentence."""
    result = run.result
    if not result:
        return label("unfinished", epochs=len(run.history))
    if chosen is None:
        return label("path_unscored", strengths=len(result.get("strengths") or []))
    best = best_of(run)
    values = {
        "kept": f"{result['counts'][chosen]:,}",
        "all": f"{total(run):,}",
        "score": format_number(result["scores"][chosen]),
        "strength": strength(result["strengths"][chosen]),
    }
    if not result["counts"][chosen] and best is not None and any(result["counts"]):
        return label("path_weights_none" if of_weights(run) else "path_none", **values)
    weights = of_weights(run)
    if best is None or best == chosen:
        return label("path_weights_lowest" if weights else "path_lowest", **values)
    values |= {
        "best": format_number(result["scores"][best]),
        "most": f"{result['counts'][best]:,}",
    }
    if _loses_much(result, chosen, best):
        return label("path_unsure", **values)
    return label("path_weights_chosen" if weights else "path_chosen", **values)


def _loses_much(result: Mapping[str, Any], chosen: int, best: int) -> bool:
    """Return whether the choice gives up much of what the best gains over the smallest model."""
    smallest = min(range(len(result["counts"])), key=result["counts"].__getitem__)
    first, score, lowest = (result["scores"][i] for i in (smallest, chosen, best))
    return first is not None and score - lowest > _MUCH * (first - lowest)


def remarks(run: SavedRun, chosen: int | None) -> tuple[Label, ...]:
    """Report the test cost of leaving features out, and whether the range was wide enough."""
    found = []
    tested = scores.test_scores(run)
    if chosen is not None and of_weights(run):
        if tested:
            dense = format_number(run.result["test_scores"][0])
            tested = {"constant": "–", **tested}
            found.append(label("path_weights_cost", dense=dense, all=f"{total(run):,}", **tested))
        if not run.result["strengths"][chosen]:
            found.append(label("path_weights_dense"))
        return tuple(found)
    if chosen is not None and "linear" in tested:
        found.append(label("path_cost", all=total(run), **tested))
    strengths = run.result.get("strengths") or []
    if chosen is not None and len(strengths) > 1 and strengths[chosen] == min(strengths):
        key = "path_edge" if run.result["counts"][chosen] == total(run) else "path_edge_few"
        found.append(label(key, strength=strength(strengths[chosen])))
    return tuple(found)


def facts(run: SavedRun, chosen: int | None) -> tuple[Fact, ...]:
    """Return kept features, score, strength and time."""
    result, shown, all_of_them = run.result, [], f"{total(run):,}"
    if chosen is not None:
        error = result["errors"][chosen]
        note = label("plus_minus", error=format_number(error)) if error is not None else None
        metrics = result.get("metrics") or {}
        tested = elements.score_fact(elements.metric_of([metrics]), metrics, "test")
        shown = [
            *((tested,) if tested else ()),
            Fact(kept(run), f"{result['counts'][chosen]:,}", label("of_all", all=all_of_them)),
            Fact(label("valid_loss"), format_number(result["scores"][chosen]), note),
            Fact(
                label("chosen_strength"),
                strength(result["strengths"][chosen]),
                label("mode_objective"),
            ),
        ]
    return (*shown, *elements.time_fact(run))


def kept(run: SavedRun) -> Label:
    """Return the name of what is counted."""
    return label("kept_weights") if of_weights(run) else label("kept")


def summary(run: SavedRun, chosen: int | None) -> Section | None:
    """Tabulate test scores against all features, models along the path, selected features."""
    held = [(label("chosen_model"), run.result.get("metrics") or {}, "test")]
    # the path's own regression loss is half the mean squared error, which would confuse here
    other = "loss" if "test/rmse" in (run.result.get("metrics") or {}) else ""
    table = scores.table(run, held, without=other)
    tables = (table, steps(run, chosen), features(run, chosen))
    found = tuple(one for one in tables if one)
    return Section(label("verdict"), found) if found else None


def steps(run: SavedRun, chosen: int | None) -> PageTable | None:
    """Tabulate strength, validation loss and test score for each number of features."""
    result = run.result
    tests = result.get("test_scores") or []
    if not tests:
        return None
    counts = result["counts"]
    changed = [i for i, count in enumerate(counts) if not i or count != counts[i - 1]]
    thin = 1 + (len(changed) - 1) // ROWS
    shown = sorted({*changed[::thin], changed[-1], *(() if chosen is None else (chosen,))})
    rows = tuple(
        (
            f"{counts[i]:,}",
            strength(result["strengths"][i]),
            format_number(result["scores"][i]),
            format_number(tests[i]),
        )
        for i in shown
    )
    mark = None if chosen is None else shown.index(chosen)
    metric = elements.metric_of([result.get("metrics") or {}, {"train/loss": 0}])
    head = (
        kept(run),
        label("strength"),
        label("valid_loss"),
        elements.part_score(metric, "test"),
    )
    return PageTable(label("steps_caption"), head, rows, mark)


def features(run: SavedRun, chosen: int | None) -> PageTable | None:
    """Tabulate the selected features by importance, with the strength where each entered."""
    result = run.result
    if chosen is None or not result.get("selected"):
        return None
    lines = tuple(
        (Name(name), format_number(weight), strength(entered))
        for name, (weight, entered) in selected(result).items()
    )
    head = (label("feature"), label("importance"), label("entered_at"))
    return PageTable(label("features_caption"), head, lines)


def selected(result: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """Return importance and entry strength of each selected feature."""
    rows = result.get("importances") or []
    names = list(result.get("feature_names") or map(str, range(len(rows[0]) if rows else 0)))
    found: dict[str, tuple[float | None, float | None]] = {}
    for name in result.get("selected") or ():
        column = names.index(name)
        entered = [s for s, row in zip(result["strengths"], rows) if row[column]]
        weight = rows[result["chosen"]][column] if rows else None
        found[name] = weight, max(entered, default=None)
    return found


def responses(run: SavedRun, chosen: int | None) -> Section | None:
    """Plot validation loss with its error, and the number of features, over the strength."""
    result, best = run.result, best_of(run)
    if best is None:
        return None
    marks = {"lowest_loss": best} | ({} if chosen is None else {"chosen": chosen})
    figure = charts.score_with_band(
        result["strengths"],
        result["scores"],
        result["errors"],
        label("strength"),
        label("valid_loss"),
        marks,
    )
    alt = label(
        "alt_path",
        best=strength(result["strengths"][best]),
        chosen="–" if chosen is None else strength(result["strengths"][chosen]),
    )
    counts = charts.steps_over_strength(
        result["strengths"], result["counts"], label("strength"), kept(run)
    )
    blocks = (
        *sizes(run, marks),
        Chart(label("valid_loss"), figure, alt),
        Chart(kept(run), counts, label("alt_counts")),
    )
    return Section(label("responses"), blocks, label("path_lead"))


def sizes(run: SavedRun, marks: Mapping[str, int]) -> tuple[Chart, ...]:
    """Plot the validation accuracy with its error over the number of weights, the knee marked."""
    result = run.result
    pairs = result.get("accuracies")
    if not pairs:
        return ()
    values, errors = zip(*pairs)
    marks = {**marks, "knee": result["knee"]}
    title = elements.part_score(elements.metric_of([{"valid/accuracy": 1.0}]), "valid")
    figure = charts.score_with_band(
        result["counts"], values, errors, kept(run), title, marks, is_reversed=False
    )
    alt = label("alt_sizes", knee=f"{result['counts'][result['knee']]:,}")
    return (Chart(title, figure, alt, label("knee_note"), wide=True),)


def importances(run: SavedRun) -> Section | None:
    """Plot importances over the strength; selected features are named, then the largest."""
    result = run.result
    rows = result.get("importances") or []
    if not rows:
        return None
    names = list(result.get("feature_names") or map(str, range(total(run))))
    leading = [names.index(name) for name in result.get("selected") or ()]
    title = label("layer_shares") if of_weights(run) else label("importance")
    figure = charts.importance_lines(
        result["strengths"], rows, names, title, LINES, first=leading[:LINES]
    )
    alt = label("alt_layer_shares") if of_weights(run) else label("alt_importance")
    lead = label("layer_shares_lead") if of_weights(run) else label("importance_lead")
    return Section(label("path_title"), (Chart(title, figure, alt, wide=True),), lead)
