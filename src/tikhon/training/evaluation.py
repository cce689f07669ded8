"""Evaluate a trained model on unseen rows: confusion matrix, calibration, residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.training.measures import predict

MOST_CLASSES = 30  # classes; a larger confusion matrix is unreadable
MOST_ROWS = 400  # (true, predicted) pairs kept at most
_BINS = 10  # confidence bins of the calibration


@torch.no_grad()
def evaluate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    classes: Sequence[str] = (),
    unit: float = 1.0,
    center: float = 0.0,
) -> dict[str, Any]:
    """Compute the confusion matrix and calibration of a classifier, or the errors of a regression.

    For class indices `y` (N,): `confusion[i][j]` counts rows of class i predicted as class j and
    `recall[i]` is the recall of class i, both for up to 30 classes; `calibration` has mean
    confidence, accuracy and row count of each non-empty confidence bin, ten in all.
    For numeric `y`: `pairs` (true, predicted) of at most 400 evenly spaced rows, median and
    largest error, in the target's own unit: `unit` and `center` undo its standardisation.
    """
    device = next(model.parameters()).device
    output, y = predict(model, x.to(device)).double().cpu(), y.cpu()
    if y.is_floating_point():
        return _of_numbers(output, y.double(), unit, center)
    confidence, predicted_class = output.softmax(1).max(1)
    calibration = _calibration(confidence, predicted_class == y)
    if len(classes) > MOST_CLASSES:
        return {"calibration": calibration}
    count = output.shape[1]
    cells = torch.bincount(y * count + predicted_class, minlength=count**2).view(count, count)
    return {
        "calibration": calibration,
        "classes": list(map(str, classes)),
        "confusion": cells.tolist(),
        "recall": (cells.diag() / cells.sum(1).clamp(min=1)).tolist(),
    }


def _calibration(confidence: Tensor, is_correct: Tensor) -> list[dict[str, float]]:
    bins = (confidence * _BINS).ceil().long().clamp(1, _BINS)
    return [
        {
            "confidence": float(confidence[bins == b].mean()),
            "accuracy": float(is_correct[bins == b].double().mean()),
            "rows": int((bins == b).sum()),
        }
        for b in bins.unique().tolist()
    ]


def _of_numbers(output: Tensor, y: Tensor, unit: float, center: float) -> dict[str, object]:
    true, predicted = (v.reshape(len(y), -1)[:, 0] * unit + center for v in (y, output))
    errors = (predicted - true).abs()
    stride = -(-len(true) // MOST_ROWS)
    return {
        "pairs": torch.stack([true, predicted], 1)[::stride].tolist(),
        "median_error": float(errors.median()),
        "largest_error": float(errors.max()),
    }
