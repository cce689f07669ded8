"""What a run came to, in one document and one sentence."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tikhon.training import measures
from tikhon.training.fit import Run

_GAP = 0.03  # of accuracy between training and validation rows that is called overfitting
_RATIO = 1.25  # of their root mean square errors
_RISE = 1.1  # of the validation loss over its lowest value


def result_of(run: Run) -> dict[str, Any]:
    """The `result.json` of a fit."""
    metrics = dict(run.metrics or {})
    return {
        "kind": "fit",
        "verdict": verdict(metrics, run.history),
        "metrics": metrics,
        "penalties": dict(run.penalties or {}),
        "weights": measures.weights(run.model),
        "best_epoch": run.best_epoch,
        "epochs": len(run.history),
        "ended": run.ended,
        "seconds": run.seconds,
        "next": next_commands(run),
    }


def verdict(metrics: Mapping[str, float], history: Sequence[Mapping[str, Any]] = ()) -> str:
    """Overfitting or not, by the gap between training and validation and by the loss's turn.

    >>> verdict({"train/accuracy": 1.0, "valid/accuracy": 0.8})
    'Overfits: accuracy 1.000 on training rows, 0.800 on validation rows (gap 0.200).'
    """
    judged = "Overfits" if overfits(metrics) else "Does not overfit"
    if "valid/accuracy" in metrics:
        train, valid = metrics["train/accuracy"], metrics["valid/accuracy"]
        text = (
            f"{judged}: accuracy {train:.3f} on training rows, {valid:.3f} on validation rows "
            f"(gap {train - valid:.3f})"
        )
    elif "valid/rmse" in metrics:
        train, valid = metrics["train/rmse"], metrics["valid/rmse"]
        text = (
            f"{judged}: root mean square error {train:.4g} on training rows, {valid:.4g} on "
            f"validation rows (ratio {valid / train if train else math.inf:.2f})"
        )
    else:
        name = next((k for k in ("train/accuracy", "train/rmse") if k in metrics), None)
        score = f"{name.removeprefix('train/')} {metrics[name]:.4g}, " if name else ""
        return f"Trained: {score}without validation rows, so overfitting cannot be judged."
    low = lowest(history)
    if low is not None and metrics["valid/loss"] > _RISE * low["valid/loss"]:
        text += (
            f"; the validation loss has risen from {low['valid/loss']:.4f} in epoch "
            f"{low['epoch']} to {metrics['valid/loss']:.4f}"
        )
    return text + "."


def overfits(metrics: Mapping[str, float]) -> bool:
    """Whether the gap between training and validation rows is beyond the limit."""
    if "valid/accuracy" in metrics:
        return metrics["train/accuracy"] - metrics["valid/accuracy"] > _GAP
    return "valid/rmse" in metrics and metrics["valid/rmse"] > _RATIO * metrics["train/rmse"]


def lowest(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The epoch of the lowest validation loss."""
    return min(
        (row for row in history if "valid/loss" in row),
        key=lambda row: row["valid/loss"],
        default=None,
    )


def next_commands(run: Run) -> list[str]:
    """What to run next: the same with an answer to what was found."""
    if run.path is None or not run.command:
        return []
    again = list(run.command)
    if "--output" in again:
        at = again.index("--output")
        del again[at : at + 2]
    again = [a for a in again if a not in ("--overwrite", "--json", "--quiet", "-q")]
    low = lowest(run.history)
    metrics = run.metrics or {}
    found = []
    if overfits(metrics) and "--l2" not in again:
        found.append(shlex.join([*again, "--l2", "auto"]))
    final = metrics.get("valid/loss", 0.0)  # absent after a refit: the rows were trained on
    if low is not None and final > _RISE * low["valid/loss"]:
        if "--early-stopping" not in again:
            found.append(shlex.join([*again, "--early-stopping", "5"]))
    target = again[again.index("--target") :][:2] if "--target" in again else []
    return found or [shlex.join(["tikhon", "compare", *run.command[2:3], *target])]
