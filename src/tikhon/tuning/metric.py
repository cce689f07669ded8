"""Metrics to compare trials by other than the loss: a scorer or a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tikhon.data.splits import assign_parts
from tikhon.errors import InputError, unknown_name
from tikhon.training.losses import Loss, loss_name

BLOCKS = 20  # blocks of validation rows, for the standard error of a metric
LEAST_BLOCKED = 4  # rows: two blocks of two
DIRECTIONS = ("minimize", "maximize")


@dataclass(frozen=True, eq=False)
class Metric:
    """A function of outputs (rows, ...) and targets (rows, ...); its `score` is minimised."""

    name: str
    function: Callable[[Tensor, Tensor], float]
    maximised: bool

    def signed(self, score: float) -> float:
        """Return a score with the metric's own sign."""
        return 0.0 - score if self.maximised else score  # avoids -0

    @torch.no_grad()
    def score(self, output: Tensor, y: Tensor) -> float:
        """Return the metric, negated if maximised; NaN for non-finite outputs."""
        if not bool(torch.isfinite(output).all()):
            return math.nan
        try:
            return self.signed(float(self.function(output, y)))
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
            raise InputError(
                f"the metric {self.name} failed on {len(y)} validation rows, with outputs of "
                f"shape {tuple(output.shape)} and targets of shape {tuple(y.shape)}, "
                f"{'numbers' if y.is_floating_point() else 'classes'}: {error}"
            ) from error

    def pseudo_values(self, output: Tensor, y: Tensor) -> Tensor:
        """Return pseudo-values, in place of row losses, for a metric that is not a mean over rows.

        The delete-a-group jackknife (Quenouille, 1956): `m * all - (m - 1) * all but block k`, for
        `m` blocks with similar targets, shifted to have the metric as their mean; their spread
        gives its standard error.
        """
        blocks = blocks_of(y)
        block = assign_parts(y, blocks).to(y.device)
        total = self.score(output, y)
        left_out = [self.score(output[block != k], y[block != k]) for k in range(blocks)]
        found = (1 - blocks) * torch.tensor(left_out, dtype=torch.float64)
        return found - found.mean() + total


def blocks_of(y: Tensor) -> int:
    """Return the number of blocks: at least two, of at least two rows if possible."""
    return max(min(BLOCKS, len(y) // 2), 2)


def metric_of(metric: Any, direction: str | None, loss: Loss) -> Metric:
    """Build from the name of a scikit-learn scorer, a scorer, or a function of (output, target).

    A function needs a direction, unless it is a torch loss or has `higher_is_better`.

    Raises `InputError` for an unknown name, a missing or contradictory direction, and functions of
    `sklearn.metrics`, which take (y_true, y_pred) of labels or probabilities: a scorer says which.
    """
    if direction is not None and direction not in DIRECTIONS:
        raise InputError(unknown_name("direction", direction, DIRECTIONS))
    if isinstance(metric, str):
        from sklearn.metrics import get_scorer, get_scorer_names

        if metric not in get_scorer_names():
            raise InputError(unknown_name("metric", metric, get_scorer_names()))
        return _scorer(metric, get_scorer(metric), direction, loss)
    if hasattr(metric, "_score_func"):
        return _scorer(str(metric), metric, direction, loss)
    if not callable(metric):
        raise InputError(f"metric must be a scorer's name or a function, received {metric!r}")
    name = loss_name(metric)
    if getattr(metric, "__module__", "").startswith("sklearn.metrics"):
        raise InputError(
            f"{name} takes (y_true, y_pred), and a metric here takes (output, target) as a loss "
            f"does: give the name of its scorer, or sklearn.metrics.make_scorer({name})"
        )
    function = cast("Callable[[Tensor, Tensor], float]", metric)
    return Metric(name, function, _direction(metric, name, direction) == "maximize")


def _direction(metric: object, name: str, direction: str | None) -> str:
    """Return the direction, as given or as the metric declares."""
    higher = getattr(metric, "higher_is_better", None)  # from torchmetrics
    if isinstance(higher, bool):
        declared = DIRECTIONS[higher]
        if direction not in (None, declared):
            raise InputError(
                f"the metric {name} says higher_is_better={higher}, but direction={direction!r}: "
                "leave direction out"
            )
        return declared
    is_torch_loss = isinstance(metric, nn.modules.loss._Loss) or (
        getattr(metric, "__module__", "") == "torch.nn.functional"
    )
    if direction is None and not is_torch_loss:
        raise InputError(
            f"the metric {name} does not say which way is better: give direction='maximize' or "
            "direction='minimize'"
        )
    return direction or "minimize"


def _scorer(name: str, scorer: Any, direction: str | None, loss: Loss) -> Metric:
    if direction == "minimize":
        raise InputError(
            f"the scorer {name} is greater where a model is better, by scikit-learn's rule: leave "
            "direction out"
        )

    def function(output: Tensor, y: Tensor) -> float:
        predictions, target = _as_estimator(loss.predictions(output).cpu(), y.cpu(), loss.kind)
        return float(scorer(predictions, np.zeros((len(target), 1)), target))

    return Metric(name, function, True)


def _as_estimator(output: Tensor, y: Tensor, kind: str) -> tuple[Any, np.ndarray]:
    """Return the outputs as a fitted estimator, and its targets."""
    if kind == "custom" and output.numel() == y.numel() and len(y.unique()) == 2:
        return _Ranks(output.reshape(-1).double().numpy()), (y == y.max()).reshape(-1).numpy()
    if kind == "numbers" or (kind == "custom" and y.is_floating_point()):
        return _Numbers(output.reshape(y.shape).double().numpy()), y.double().numpy()
    if kind == "binary" and y.ndim == 2 and y.shape[1] > 1:
        return _Labels(output.reshape(y.shape).double().numpy()), (y > 0.5).long().numpy()
    if kind == "binary" or output.numel() == y.numel():
        logit = output.reshape(-1).double()
        logits = torch.stack([torch.zeros_like(logit), logit], dim=1)
        return _Classes(logits.numpy()), (y.reshape(-1) > 0.5).long().numpy()
    targets = y.argmax(1) if y.is_floating_point() else y
    logits = output.double()
    if logits.ndim > 2:  # (rows, classes, ...)
        logits = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return _Classes(logits.numpy()), targets.reshape(-1).numpy()


class _FittedOutputs:
    """The interface of a fitted estimator that scorers use."""

    def __init__(self, predictions: np.ndarray) -> None:
        self.predictions = predictions

    def fit(self, x: object, y: object = None) -> _FittedOutputs:
        """Return self; already fitted."""
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> object:
        from sklearn.utils import ClassifierTags, RegressorTags, Tags, TargetTags

        classifies = hasattr(self, "classes_")
        return Tags(
            estimator_type="classifier" if classifies else "regressor",
            target_tags=TargetTags(required=True),
            classifier_tags=ClassifierTags() if classifies else None,
            regressor_tags=None if classifies else RegressorTags(),
        )


class _Numbers(_FittedOutputs):
    def predict(self, x: object) -> np.ndarray:
        """Return the outputs."""
        return self.predictions


class _Ranks(_Numbers):
    """Two classes under a user's own loss: an order without a threshold."""

    classes_ = np.array([False, True])

    def decision_function(self, x: object) -> np.ndarray:
        """Return the outputs."""
        return self.predictions

    def predict(self, x: object) -> np.ndarray:
        """Raise, as the threshold is unknown."""
        raise ValueError(
            "with a loss of your own nobody knows from which output on the answer is the second "
            "class: give a function of (output, target), or the loss by name ('bce')"
        )


class _Classes(_FittedOutputs):
    """Logits (rows, classes)."""

    def __init__(self, predictions: np.ndarray) -> None:
        super().__init__(predictions)
        self.classes_ = np.arange(predictions.shape[1])

    def decision_function(self, x: object) -> np.ndarray:
        """Return log-odds (rows,) for two classes, otherwise logits (rows, classes)."""
        if len(self.classes_) == 2:
            return self.predictions[:, 1] - self.predictions[:, 0]
        return self.predictions

    def predict_proba(self, x: object) -> np.ndarray:
        """Return probabilities (rows, classes)."""
        return torch.from_numpy(self.predictions).softmax(1).numpy()

    def predict(self, x: object) -> np.ndarray:
        """Return the most probable class."""
        return self.predictions.argmax(1)


class _Labels(_Classes):
    """Logits of non-exclusive labels, (rows, labels)."""

    def decision_function(self, x: object) -> np.ndarray:
        """Return logits (rows, labels)."""
        return self.predictions

    def predict_proba(self, x: object) -> np.ndarray:
        """Return probabilities (rows, labels)."""
        return torch.from_numpy(self.predictions).sigmoid().numpy()

    def predict(self, x: object) -> np.ndarray:
        """Return labels with probability above one half."""
        return (self.predictions > 0).astype(int)
