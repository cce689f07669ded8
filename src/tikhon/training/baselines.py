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
from tikhon.data.rows import tensors
from tikhon.numbers import CERTAIN, certain
from tikhon.training import measures
from tikhon.training.losses import Loss
from tikhon.training.verdict import Scores

Part = tuple[Any, Tensor]
Answer = Callable[[Tensor], Tensor]

_CELLS = 4_000_000  # of the linear model's training table, at most, to keep it cheap
_IMBALANCE = 2.0  # ratio of the largest to the smallest class from which accuracy misleads
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
    rows = {name: len(part[1]) for name, part in parts.items()}
    judged = next((name for name in ("valid", "test") if name in parts), "train")
    x, y = parts["train"]
    one = None if loss.kind == "whole" else measures.outputs_of(model, x)
    if one is None:  # unknown which output predicts what
        losses = {
            f"{name}/loss": measures.mean_loss(model, *part, loss) for name, part in parts.items()
        }
        return Scores(losses, rows, {}, judged)
    told = imbalanced(y)
    outputs = {
        name: one if name == "train" else measures.predict(model, part[0])
        for name, part in parts.items()
    }
    metrics, errors = {}, {}
    for name, (_, known) in parts.items():
        found = measures.scores_of(outputs[name], known, loss, unit, imbalanced=told)
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
        errors |= {f"{name}/{key}": e for key, e in _errors(outputs[name], known, loss).items()}
    if not _answerable(outputs["train"], y, loss):
        return Scores(metrics, rows, errors, judged)
    answers = {"constant": constant(y, outputs["train"].shape[-1])}
    if (
        linear
        and isinstance(x, Tensor)
        and x.is_floating_point()
        and bool(torch.isfinite(x).all())
    ):
        answers["linear"] = linear_model(x, y, outputs["train"].shape[-1])
    scores: dict[str, dict[str, float]] = {name: {} for name in answers}
    margins = {}
    for name, answer in answers.items():
        for part in [part for part in parts if part != "train"] or ["train"]:
            rows_x, known = parts[part]
            given = answer(tensors(rows_x)[0])
            found = measures.scores_of(loss.outputs(given), known, loss, unit, imbalanced=told)
            scores[name] |= {f"{part}/{key}": value for key, value in found.items()}
            if part == judged:
                margins[name] = _margins(given, loss.answers(outputs[part]), known)
    if "linear" in scores and (some := len(x[:: _every(x)])) < len(x):
        scores["linear"]["train/rows"] = some
    most = None if y.is_floating_point() else int(y.bincount().argmax())
    paired = _by_row(parts[judged], loss.answers(outputs[judged]), unit)
    return Scores(metrics, rows, errors, judged, most, scores, margins, by_row=paired)


def _by_row(part: Part, answers: Tensor, unit: float) -> dict[str, object]:
    """Score of each row, with a fingerprint of the rows."""
    x, y = part
    rows = fingerprint(*tensors(x), y)
    if not y.is_floating_point():
        right = (answers.argmax(1) == y).flatten().tolist()
        return {"rows": rows, "accuracy": "".join("01"[one] for one in right)}
    squares = _squares(answers, y) * unit**2
    return {"rows": rows, "rmse": [float(f"{one:.6g}") for one in squares.tolist()]}


def imbalanced(y: Tensor) -> bool:
    """Return whether one class has at least twice the rows of another, so accuracy misleads."""
    if y.is_floating_point() or y.ndim != 1:
        return False
    counts = y.bincount()
    counts = counts[counts > 0]
    return len(counts) > 1 and int(counts.max()) >= _IMBALANCE * int(counts.min())


def constant(y: Tensor, outputs: int) -> Answer:
    """Predict class shares as logits, or the mean, without using features."""
    if y.is_floating_point():
        center = y.mean(0)
        return lambda x: center.expand(len(x), *y.shape[1:])
    shares = y.bincount(minlength=outputs) / len(y)
    logits = shares.clamp(min=_FLOOR).log()
    return lambda x: logits.expand(len(x), -1)


def linear_model(x: Tensor, y: Tensor, outputs: int) -> Answer:
    """Fit scikit-learn's logistic regression or ridge on standardised columns."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    every = _every(x)
    table, known = _table(x[::every]), y[::every].cpu().numpy()
    classes = not y.is_floating_point()
    if classes and len(set(known.tolist())) < 2:
        return constant(y, outputs)
    made = make_pipeline(StandardScaler(), LogisticRegression() if classes else Ridge())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        made.fit(table, known)

    def answer(rows: Tensor) -> Tensor:
        if not classes:
            given = made.predict(_table(rows))
            return torch.as_tensor(given, dtype=y.dtype, device=y.device).reshape(-1, *y.shape[1:])
        logits = torch.full((len(rows), outputs), math.log(_FLOOR), device=y.device)
        columns = torch.as_tensor(made.classes_, device=y.device)
        with np.errstate(divide="ignore"):  # log(0), clamped below
            logits[:, columns] = torch.as_tensor(made.predict_log_proba(_table(rows))).to(logits)
        return logits.clamp(min=math.log(_FLOOR))

    return answer


def _every(x: Tensor) -> int:
    """Stride of the rows that the linear model is trained on."""
    return max(1, -(-x.numel() // _CELLS))


def _table(x: Tensor) -> object:
    return x.flatten(1).cpu().double().numpy()


def _answerable(output: Tensor, y: Tensor, loss: Loss) -> bool:
    """Return whether each row has one prediction: class logits, or one number per target."""
    numbers = y.is_floating_point()
    if loss.kind != ("numbers" if numbers else "classes") or loss.name == "nll":
        return False
    if numbers:
        return output.numel() == y.numel() and y.ndim <= 2
    return y.ndim == 1 and output.ndim == 2


def _errors(output: Tensor, y: Tensor, loss: Loss) -> dict[str, float]:
    """Standard error of the accuracy, or of the log of the rmse."""
    if not _answerable(output, y, loss):
        return {}
    if y.is_floating_point():
        squares = _squares(loss.answers(output), y)
        mean = float(squares.mean())
        if len(squares) < 2 or not mean > 0:
            return {}
        return {"rmse": _paired(squares)[1] / (2 * mean)}
    right = (output.argmax(1) == y).double().flatten()
    # Two more rows of each outcome, or an accuracy of 1 would have no error.
    # Agresti, Coull, "Approximate is better than exact", 1998.
    count = len(right) + 4
    share = (float(right.sum()) + 2) / count
    return {"accuracy": math.sqrt(share * (1 - share) / count)}


def _squares(output: Tensor, y: Tensor) -> Tensor:
    return (output.reshape(y.shape) - y).double().square().reshape(len(y), -1).mean(1)


def _margins(theirs: Tensor, ours: Tensor, y: Tensor) -> dict[str, tuple[float, float]]:
    """Mean and standard error of the paired difference, positive where ours is better."""
    if y.is_floating_point():
        return {"rmse": _paired(_squares(theirs, y) - _squares(ours, y))}
    right = [(output.argmax(1) == y).double() for output in (ours, theirs)]
    losses = [
        nn.functional.cross_entropy(output.double(), y, reduction="none")
        for output in (theirs, ours)
    ]
    return {
        "accuracy": _discordant(right[0] - right[1]),
        "loss": _paired(losses[0] - losses[1]),
    }


def _paired(difference: Tensor) -> tuple[float, float]:
    """Mean and standard error, widened for few rows so that 1.96 of them cover 95 %."""
    mean, count = float(difference.mean()), len(difference)
    if count < 2:
        return mean, math.inf
    return mean, float(difference.std()) / math.sqrt(count) * certain(count) / CERTAIN


def _discordant(difference: Tensor) -> tuple[float, float]:
    """Compare paired shares with half a row added to each cell, as few rows would prove too much.

    Agresti, Min, "Effects and non-effects of paired identical observations", 2004.
    """
    count, better = len(difference) + 2, float(difference.sum())
    apart = float(difference.abs().sum()) + 1
    return better / count, math.sqrt(apart - better**2 / count) / count
