"""Tabulate the scores of a model on each part of the data, and those of its baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tikhon.numbers import Z_95, format_share
from tikhon.report.page import Label, Name, PageTable, format_number, label
from tikhon.report.saved import SavedRun

PARTS = {"train": "training", "valid": "validation", "test": "test"}  # key -> name of the rows
KEYS = ("accuracy", "rmse", "r2", "balanced_accuracy", "average_precision", "loss")
SHARES = {"accuracy", "r2", "balanced_accuracy", "average_precision"}

ScoredRows = tuple[Label, Mapping[str, object], str]  # name, scores, part


def table(run: SavedRun, held: Sequence[ScoredRows], *, without: str = "") -> PageTable | None:
    """Tabulate one row for each model and part, then the baselines on the same rows."""
    held = [*held, *baseline_rows(run)]
    found = {key for _, record, part in held for key in KEYS if f"{part}/{key}" in record}
    keys = [key for key in KEYS if key in found and key != without]
    rows = tuple(
        (
            name,
            *(
                (format_share if key in SHARES else format_number)(record.get(f"{part}/{key}"))
                for key in keys
            ),
        )
        for name, record, part in held
        if any(f"{part}/{key}" in record for key in keys)
    )
    head = (label("rows"), *(label(f"metric_{key}") for key in keys))
    caption = label("scores_caption" if run.result.get("yardsticks") else "scores_alone_caption")
    return PageTable(caption, head, rows) if rows else None


def baseline_rows(run: SavedRun) -> list[ScoredRows]:
    """Return the scores of the constant and the linear baseline by part."""
    return [
        (baseline_name(run, name, label(f"rows_of_{PARTS[part]}")), record, part)
        for name, record in (run.result.get("yardsticks") or {}).items()
        for part in PARTS
    ]


def baseline_name(run: SavedRun, name: str, part: Label) -> Label:
    """Name a baseline with the rows it is scored on."""
    if name == "constant" and run.result.get("answer"):
        return label("yardstick_class", answer=run.result["answer"], part=part)
    if name == "constant":
        return label("yardstick_mean", part=part)
    some = (run.result.get("yardsticks") or {}).get(name, {}).get("train/rows")
    if some is not None:
        return label("yardstick_linear_some", rows=f"{some:,}", part=part)
    return label("yardstick_linear", part=part)


def recall_table(run: SavedRun) -> PageTable | None:
    """Tabulate the recall of each class, if classes are imbalanced."""
    found = run.result.get("predictions") or {}
    metrics = run.result.get("metrics") or {}
    if "recall" not in found or "test/balanced_accuracy" not in metrics:
        return None
    counts = [sum(row) for row in found["confusion"]]
    rows = tuple(
        (Name(name), f"{count:,}", format_number(recall if count else None))
        for name, count, recall in zip(found["classes"], counts, found["recall"])
    )
    head = (label("true_class"), label("test_rows"), label("recall"))
    return PageTable(label("recall_caption"), head, rows)


def learned_nothing(result: Mapping[str, Any]) -> bool:
    """Return whether the model is no better on test rows than a constant prediction.

    Better is what their noise does not explain; older runs kept no margins.
    """
    if margins := (result.get("margins") or {}).get("constant"):
        return not any(mean > Z_95 * error for mean, error in margins.values())
    metrics = result.get("metrics") or {}
    constant = (result.get("yardsticks") or {}).get("constant") or {}
    found = [
        metrics[at] <= constant[at] if better > 0 else metrics[at] >= constant[at]
        for at, better in (("test/accuracy", 1), ("test/rmse", -1), ("test/loss", -1))
        if at in metrics and at in constant
    ]
    return bool(found) and all(found)


def compare_to_baselines(run: SavedRun) -> Label | None:
    """Return a sentence with the test score and those of the baselines."""
    values = test_scores(run)
    if "constant" not in values:
        return None
    values["answer"] = run.result.get("answer") or label("the_mean")
    return label("score_beside" if "linear" in values else "score_beside_constant", **values)


def test_scores(run: SavedRun) -> dict[str, object]:
    """Return the test score of a run, with its metric, rows and the scores of the baselines."""
    metrics, held = run.result.get("metrics") or {}, run.result.get("yardsticks") or {}
    key = next((k for k in ("accuracy", "rmse") if f"test/{k}" in metrics), None)
    if key is None:
        return {}
    at = f"test/{key}"
    rows = (run.result.get("rows") or {}).get("test", 0)
    found = {name: format_number(scores[at]) for name, scores in held.items() if at in scores}
    score = format_number(metrics[at])
    return {"metric": label(f"metric_{key}"), "score": score, "rows": f"{rows:,}", **found}
