"""Baselines of a score: a constant prediction, and a linear model on the same rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tikhon.data.dataset import fingerprint
from tikhon.data.nested import take_rows, tensors
from tikhon.errors import InputError
from tikhon.numbers import Z_95, t_quantile
from tikhon.training import measures
from tikhon.training.losses import Loss
from tikhon.training.verdict import Scores

Part = tuple[Any, Tensor]
Predictor = Callable[[Tensor], Tensor]

_CELLS = 4_000_000  # of the linear model's training table, at most, to keep it cheap
_IMBALANCE = 2.0  # ratio of the largest to the smallest class from which accuracy misleads
_TRIMMED = 20  # one row in so many may blur by how much a model beats a constant
_FLOOR = 1e-12  # probability assigned to classes absent from the rows


def assess(
    model: nn.Module,
    parts: Mapping[str, Part],
    loss: Loss,
    *,
    unit: float = 1.0,
    linear: bool = True,
) -> Scores:
    """Score a model and its baselines on the same rows.

    Args:
        model: the trained model.
        parts: (x, y) of "train" and, if present, "valid" and "test".
        loss: the training loss.
        unit: standard deviation of a standardised target.
        linear: whether to fit a linear model as a baseline.
    """
    parts = {name: _labelled(part, loss.ignored) for name, part in parts.items()}
    rows = {name: len(part[1]) for name, part in parts.items()}
    scored = next((name for name in ("valid", "test") if name in parts), "train")
    x, y = parts["train"]
    train_outputs = None if loss.kind == "whole" else measures.try_predict(model, x)
    if train_outputs is None:  # unknown which output predicts what
        losses = {
            f"{name}/loss": measures.mean_loss(model, *part, loss) for name, part in parts.items()
        }
        return Scores(losses, rows, {}, scored)

    def score(output: Tensor, targets: Tensor) -> dict[str, float]:
        return measures.score_outputs(output, targets, loss, unit, imbalanced=imbalanced)

    imbalanced = is_imbalanced(y)
    metrics, errors, predictions = {}, {}, {}
    for name, (inputs, targets) in parts.items():
        output = train_outputs if name == "train" else measures.predict(model, inputs)
        metrics |= _prefixed(name, score(output, targets))
        errors |= _prefixed(name, _standard_errors(output, targets, loss))
        predictions[name] = loss.predictions(output)
    count = train_outputs.shape[-1]
    if not _has_single_predictions(train_outputs, y, loss):
        return Scores(metrics, rows, errors, scored)
    predictors = {"constant": constant_predictor(y, count)}
    if linear and _is_numeric(x):
        predictors["linear"] = linear_predictor(x, y, count)
    scores: dict[str, dict[str, float]] = {name: {} for name in predictors}
    margins = {}
    for name, predictor in predictors.items():
        for part in [part for part in parts if part != "train"] or ["train"]:
            inputs, targets = parts[part]
            baseline = predictor(tensors(inputs)[0])
            scores[name] |= _prefixed(part, score(loss.outputs(baseline), targets))
            if part == scored:
                margins[name] = _paired_margins(name, baseline, predictions[part], targets, unit)
    if "linear" in scores and (fitted := len(x[:: _row_stride(x)])) < len(x):
        scores["linear"]["train/rows"] = fitted
    most_frequent = None if y.is_floating_point() else int(y.bincount().argmax())
    by_row = _row_scores(parts[scored], predictions[scored], unit)
    return Scores(metrics, rows, errors, scored, most_frequent, scores, margins, by_row=by_row)


def _labelled(part: Part, ignored: int) -> Part:
    """Return the rows whose target is not the class that the loss leaves out."""
    y = part[1]
    if y.is_floating_point() or y.ndim != 1 or not bool((y == ignored).any()):
        return part
    labelled = (y != ignored).nonzero()[:, 0]
    if not len(labelled):
        raise InputError(f"no row has a class: all targets are {ignored}, the loss ignores them")
    return take_rows(part, labelled)


def _prefixed(part: str, scores: Mapping[str, float]) -> dict[str, float]:
    return {f"{part}/{key}": value for key, value in scores.items()}


def _is_numeric(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and bool(torch.isfinite(x).all())


def _row_scores(part: Part, predictions: Tensor, unit: float) -> dict[str, object]:
    """Score of each row, with a fingerprint of the rows."""
    x, y = part
    rows = fingerprint(*tensors(x), y)
    if not y.is_floating_point():
        is_right = (predictions.argmax(1) == y).flatten().tolist()
        return {"rows": rows, "accuracy": "".join("01"[right] for right in is_right)}
    squares = _squares(predictions, y) * unit**2
    return {"rows": rows, "rmse": [float(f"{square:.6g}") for square in squares.tolist()]}


def is_imbalanced(y: Tensor) -> bool:
    """Return whether one class has at least twice the rows of another, so accuracy misleads."""
    if y.is_floating_point() or y.ndim != 1:
        return False
    counts = y.bincount()
    counts = counts[counts > 0]
    return len(counts) > 1 and int(counts.max()) >= _IMBALANCE * int(counts.min())


def constant_predictor(y: Tensor, outputs: int) -> Predictor:
    """Predict class shares as logits, or the mean, without using features."""
    if y.is_floating_point():
        center = y.mean(0)
        return lambda x: center.expand(len(x), *y.shape[1:])
    shares = y.bincount(minlength=outputs) / len(y)
    logits = shares.clamp(min=_FLOOR).log()
    return lambda x: logits.expand(len(x), -1)


def linear_predictor(x: Tensor, y: Tensor, outputs: int) -> Predictor:
    """Fit scikit-learn's logistic regression or ridge on standardised columns."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    stride = _row_stride(x)
    table, targets = _as_table(x[::stride]), y[::stride].cpu().numpy()
    classes = not y.is_floating_point()
    if classes and len(set(targets.tolist())) < 2:
        return constant_predictor(y, outputs)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression() if classes else Ridge())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pipeline.fit(table, targets)

    def predictor(rows: Tensor) -> Tensor:
        if not classes:
            predictions = pipeline.predict(_as_table(rows))
            return torch.as_tensor(predictions, dtype=y.dtype, device=y.device).reshape(
                -1, *y.shape[1:]
            )
        logits = torch.full((len(rows), outputs), math.log(_FLOOR), device=y.device)
        columns = torch.as_tensor(pipeline.classes_, device=y.device)
        with np.errstate(divide="ignore"):  # log(0), clamped below
            logits[:, columns] = torch.as_tensor(pipeline.predict_log_proba(_as_table(rows))).to(
                logits
            )
        return logits.clamp(min=math.log(_FLOOR))

    return predictor


def _row_stride(x: Tensor) -> int:
    """Stride of the rows that the linear model is trained on."""
    return max(1, -(-x.numel() // _CELLS))


def _as_table(x: Tensor) -> object:
    return x.flatten(1).cpu().double().numpy()


def _has_single_predictions(output: Tensor, y: Tensor, loss: Loss) -> bool:
    """Return whether each row has one prediction: class logits, or one number per target."""
    numbers = y.is_floating_point()
    if loss.kind != ("numbers" if numbers else "classes") or loss.name == "nll":
        return False
    if numbers:
        return output.numel() == y.numel() and y.ndim <= 2
    return y.ndim == 1 and output.ndim == 2


def _standard_errors(output: Tensor, y: Tensor, loss: Loss) -> dict[str, float]:
    """Standard error of the accuracy, or of the log of the rmse."""
    if not _has_single_predictions(output, y, loss):
        return {}
    if y.is_floating_point():
        squares = _squares(loss.predictions(output), y)
        mean = float(squares.mean())
        if len(squares) < 2 or not mean > 0:
            return {}
        return {"rmse": _mean_and_error(squares)[1] / (2 * mean)}
    is_right = (output.argmax(1) == y).double().flatten()
    # Two more rows of each outcome, or an accuracy of 1 would have no error.
    # Agresti, Coull, "Approximate is better than exact", 1998.
    count = len(is_right) + 4
    share = (float(is_right.sum()) + 2) / count
    return {"accuracy": math.sqrt(share * (1 - share) / count)}


def _squares(output: Tensor, y: Tensor) -> Tensor:
    return (output.reshape(y.shape) - y).double().square().reshape(len(y), -1).mean(1)


def _paired_margins(
    name: str, baseline: Tensor, own: Tensor, y: Tensor, unit: float
) -> dict[str, tuple[float, float]]:
    """Mean and standard error of the paired difference, positive where ours is better."""
    if y.is_floating_point():
        gains = (_squares(baseline, y) - _squares(own, y)) * unit**2
        least = gains.sort().values[: len(gains) - len(gains) // _TRIMMED]
        found = [_mean_and_error(some) for some in (gains, least)]
        # Without its largest gains better all the more with them, which only blur the mean.
        is_better = least.numel() > 1 and found[1][0] > Z_95 * found[1][1]
        return {"rmse": found[1] if is_better and name == "constant" else found[0]}
    is_right = [(output.argmax(1) == y).double() for output in (own, baseline)]
    losses = [
        nn.functional.cross_entropy(output.double(), y, reduction="none")
        for output in (baseline, own)
    ]
    return {
        "accuracy": _paired_share(is_right[0] - is_right[1]),
        "loss": _mean_and_error(losses[0] - losses[1]),
    }


def _mean_and_error(difference: Tensor) -> tuple[float, float]:
    """Mean and standard error, widened for few rows so that 1.96 of them cover 95 %."""
    mean, count = float(difference.mean()), len(difference)
    if count < 2:
        return mean, math.inf
    return mean, float(difference.std()) / math.sqrt(count) * t_quantile(count) / Z_95


def _paired_share(difference: Tensor) -> tuple[float, float]:
    """Compare paired shares with half a row added to each cell, as few rows would prove too much.

    Agresti, Min, "Effects and non-effects of paired identical observations", 2004.
    """
    count, better = len(difference) + 2, float(difference.sum())
    differing = float(difference.abs().sum()) + 1
    return better / count, math.sqrt(differing - better**2 / count) / count
