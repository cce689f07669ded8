"""Measure a model: scores on data, penalties and norms of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tikhon.data.forward import call_model
from tikhon.data.nested import iterate_slices
from tikhon.errors import InputError
from tikhon.regularizer.regularizer import Regularizer
from tikhon.runs.documents import SavedPenalty
from tikhon.training.losses import IGNORED, Kind, Loss
from tikhon.wrappers import modes_restored

Epoch = dict[str, float]  # one row of the history: "epoch", "valid/loss", "penalty/l1/zeros"

_BINS = 41


def predict(model: nn.Module, x: object) -> Tensor:
    """Return the model's outputs in eval mode, restoring its modes.

    Raises `InputError` for a model that does not return one tensor.
    """
    output = try_predict(model, x)
    if output is None:
        raise InputError(f"{type(model).__name__} returns something other than one tensor")
    return output


def try_predict(model: nn.Module, x: object) -> Tensor | None:
    """Like `predict`, but return None where the outputs are not one tensor."""
    found = []
    with eval_mode(model):
        for part in iterate_slices(x):
            found.append(call_model(model, part))
            if not isinstance(found[0], Tensor):
                return None
    return torch.cat(found)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients, and restore the modes."""
    with modes_restored(model), torch.no_grad():
        model.eval()
        yield


def score(
    model: nn.Module, x: object, y: Tensor, loss: Loss, unit: float = 1.0
) -> dict[str, float]:
    """Score the model; only the mean loss where outputs are not one tensor."""
    output = None if loss.kind == "whole" else try_predict(model, x)
    if output is None:
        return {"loss": mean_loss(model, x, y, loss)}
    return score_outputs(output, y, loss, unit)


def mean_loss(model: nn.Module, x: object, y: Tensor, loss: Loss) -> float:
    """Mean loss in eval mode, batches weighted by their rows; restores the modes."""
    with eval_mode(model):
        parts = iterate_slices((x, y))
        return sum(float(loss.on(model, part)) * len(part[1]) for part in parts) / len(y)


@torch.no_grad()
def score_outputs(
    output: Tensor, y: Tensor, loss: Loss, unit: float = 1.0, *, imbalanced: bool = False
) -> dict[str, float]:
    """Loss and accuracy; for numeric targets the root mean squared error in their unit, and R2.

    `imbalanced` adds balanced accuracy (the mean recall) and scikit-learn's average precision: of
    the rarer class, or the mean over more than two. R2 is omitted where all targets are equal.
    """
    found = {
        "loss": float(loss(output, y)),
        **task_scores(loss.predictions(output), y, loss.kind, unit, ignored=loss.ignored),
    }
    if imbalanced and output.ndim == 2 and output.shape[1] > 1 and "accuracy" in found:
        found |= _imbalance_scores(output, y)
    return found


def task_scores(
    output: Tensor, y: Tensor, kind: Kind, unit: float = 1.0, *, ignored: int = IGNORED
) -> dict[str, float]:
    """`accuracy` for classes and binary logits; `rmse` in the target's unit and `r2` for numbers.

    A custom loss is scored by its targets: floats are numbers, integers are classes. Outputs
    without exactly one prediction for each target (a mean and a variance, say) get no score.
    Targets of the class `ignored` are left out.
    """
    numbers = kind == "numbers" or (kind == "custom" and y.is_floating_point())
    single = output.numel() == y.numel()
    if numbers and single:
        return _regression_scores(output.reshape(y.shape), y.to(output.dtype), unit)
    if kind == "binary" or (kind == "custom" and single and not numbers):
        return {"accuracy": float(((output.reshape(y.shape) > 0) == (y > 0.5)).double().mean())}
    if numbers or output.ndim < 2:
        return {}
    predicted = output.argmax(1)
    whole = y.shape != output.shape and not y.is_floating_point()
    classes = y.reshape(predicted.shape) if whole else y.argmax(1)
    accuracy = class_accuracy(predicted, classes, ignored)
    return {} if accuracy is None else {"accuracy": accuracy}


def class_accuracy(predicted: Tensor, classes: Tensor, ignored: int = IGNORED) -> float | None:
    """Return the share of correct classes among those not `ignored`, None if there are none."""
    counted = classes != ignored
    return float((predicted == classes)[counted].double().mean()) if bool(counted.any()) else None


def _regression_scores(output: Tensor, y: Tensor, unit: float) -> dict[str, float]:
    error = float((output - y).square().mean())
    spread = float((y - y.mean(0)).square().mean())
    found = {"rmse": error**0.5 * unit}
    return found | ({"r2": 1 - error / spread} if spread > 0 else {})


def _imbalance_scores(output: Tensor, y: Tensor) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, recall_score

    targets, present = y.cpu().numpy(), y.unique().tolist()
    probabilities = output.double().softmax(1).cpu().numpy()
    recall = recall_score(targets, output.argmax(1).cpu().numpy(), labels=present, average="macro")
    found = {"balanced_accuracy": float(recall)}
    if len(present) > 1:  # any ranking is perfect with one class
        scored = (
            present if output.shape[1] > 2 else [min(present, key=lambda k: (targets == k).sum())]
        )
        precisions = [average_precision_score(targets == k, probabilities[:, k]) for k in scored]
        found["average_precision"] = float(sum(precisions) / len(precisions))
    return found


@torch.no_grad()
def penalty_readings(regularizer: Regularizer | None) -> dict[str, SavedPenalty]:
    """Value, strength, mode and share of exact zeros of each term on each parameter."""
    if regularizer is None:
        return {}
    return {
        term.name: {
            "value": term.value,
            "strength": term.strength,
            "how": term.how,
            "zeros": term.zeros,
        }
        for term in regularizer.trace()
    }


@torch.no_grad()
def weight_norms(model: nn.Module, names: list[str]) -> dict[str, dict[str, float]]:
    """L1 and L2 norms of the named parameters."""
    params = dict(model.named_parameters())
    return {
        name: {"l1": float(params[name].abs().sum()), "l2": float(params[name].norm())}
        for name in names
        if name in params
    }


@torch.no_grad()
def weight_summaries(model: nn.Module) -> dict[str, dict[str, object]]:
    """Zeros, norms and a histogram of each weight with two or more dimensions."""
    found = {}
    for name, param in model.named_parameters():
        if param.ndim < 2:
            continue
        values = param.detach().float().flatten().cpu()
        largest = float(values.abs().max()) or 1.0
        edges = torch.linspace(-largest, largest, _BINS + 1)
        counts = torch.histc(values, _BINS, min=-largest, max=largest)
        found[name] = {
            "shape": list(param.shape),
            "zeros": float((values == 0).double().mean()),
            "l1": float(values.abs().sum()),
            "l2": float(values.norm()),
            "histogram": {"edges": edges.tolist(), "counts": counts.long().tolist()},
        }
    return found


def zero_share(model: nn.Module) -> float:
    """Share of exact zeros among all weights with two or more dimensions."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return 1 - sum(int(w.count_nonzero()) for w in matrices) / sum(w.numel() for w in matrices)


def first_non_finite(model: nn.Module) -> str:
    """Name the first non-finite weight or gradient, for the error message of a diverged loss."""
    for name, param in model.named_parameters():
        if not torch.isfinite(param).all():
            return f"the weight {name!r}"
    for name, param in model.named_parameters():
        if param.grad is not None and not torch.isfinite(param.grad).all():
            return f"the gradient of {name!r}"
    return "the loss itself: weights and gradients are finite"
