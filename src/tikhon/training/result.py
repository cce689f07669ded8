"""What a run came to, in one document and one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tikhon.training import measures
from tikhon.training.fit import Run

_GAP = 0.03  # of accuracy between training and validation rows that is called overfitting
_RATIO = 1.25  # of their root mean square errors


def result_of(run: Run) -> dict[str, Any]:
    """The `result.json` of a fit."""
    return {
        "kind": "fit",
        "verdict": verdict(run.metrics or {}),
        "metrics": dict(run.metrics or {}),
        "penalties": dict(run.penalties or {}),
        "weights": measures.weights(run.model),
        "best_epoch": run.best_epoch,
        "epochs": len(run.history),
        "ended": run.ended,
        "seconds": run.seconds,
        "next": next_commands(run),
    }


def verdict(metrics: Mapping[str, float]) -> str:
    """Overfitting or not, by the gap between training and validation.

    >>> verdict({"train/accuracy": 1.0, "valid/accuracy": 0.8})
    'Overfits: accuracy 1.000 on training rows, 0.800 on validation rows (gap 0.200).'
    """
    if "valid/accuracy" in metrics:
        train, valid = metrics["train/accuracy"], metrics["valid/accuracy"]
        gap = train - valid
        judged = "Overfits" if gap > _GAP else "Does not overfit"
        return (
            f"{judged}: accuracy {train:.3f} on training rows, {valid:.3f} on validation rows "
            f"(gap {gap:.3f})."
        )
    if "valid/rmse" in metrics:
        train, valid = metrics["train/rmse"], metrics["valid/rmse"]
        judged = "Overfits" if valid > _RATIO * train else "Does not overfit"
        return (
            f"{judged}: root mean square error {train:.4g} on training rows, {valid:.4g} on "
            f"validation rows (ratio {valid / train if train else float('inf'):.2f})."
        )
    name = next((k for k in ("train/accuracy", "train/rmse") if k in metrics), None)
    score = f"{name.removeprefix('train/')} {metrics[name]:.4g}, " if name else ""
    return f"Trained: {score}without validation rows, so overfitting cannot be judged."


def next_commands(run: Run) -> list[str]:
    """What to run next."""
    if run.path is None:
        return []
    return [f"tikhon report {run.path}"]
