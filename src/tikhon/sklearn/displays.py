"""Displays as in scikit-learn: `from_estimator(...)` computes, `.plot(ax=)` draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from tikhon import plotting
from tikhon.sklearn.learning import Inputs, Rows, summed_losses


@dataclass(eq=False)
class LearningCurveDisplay:
    """Objective by epoch and, with early stopping, validation score.

    Args:
        loss: (epochs,) objective during training.
        valid: (epochs,) validation scores, or None.
        name: of the estimator, for the title.

    >>> LearningCurveDisplay(np.array([1.0, 0.5]), None, "model").loss.tolist()
    [1.0, 0.5]
    """

    loss: np.ndarray
    valid: np.ndarray | None
    name: str
    ax_: plotting.Axes | None = field(default=None, init=False)

    @classmethod
    def from_estimator(
        cls, estimator: Any, *, ax: plotting.Axes | None = None
    ) -> LearningCurveDisplay:
        """Plot the curves of a fitted estimator."""
        scores = getattr(estimator, "validation_scores_", None)
        valid = np.array(scores) if scores else None
        return cls(np.array(estimator.loss_curve_), valid, type(estimator).__name__).plot(ax=ax)

    def plot(self, *, ax: plotting.Axes | None = None) -> LearningCurveDisplay:
        """Draw on `ax`, or on a new figure."""
        ax = plotting.canvas(ax).ax_
        epochs = np.arange(1, len(self.loss) + 1)
        ax.plot(epochs, self.loss, label="objective (training rows)")
        ax.set(xlabel="epoch", ylabel="objective", title=self.name)
        lines, labels = ax.get_legend_handles_labels()
        if self.valid is not None:
            right = ax.twinx()
            right.plot(epochs[: len(self.valid)], self.valid, color="C1", label="validation score")
            right.set_ylabel("validation score")
            more, names = right.get_legend_handles_labels()
            lines, labels = lines + more, labels + names
        ax.legend(lines, labels)
        self.ax_ = ax
        return self


@dataclass(eq=False)
class PathDisplay:
    """Test score and its standard deviation over folds, for each strength of a path.

    Args:
        alphas: (strengths,).
        mean, std: (strengths,) of the score over the folds.
        chosen: the selected strength.
        name: of the estimator, for the title.
    """

    alphas: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    chosen: float
    name: str
    ax_: plotting.Axes | None = field(default=None, init=False)

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: plotting.Axes | None = None) -> PathDisplay:
        """Plot the path of a fitted ...CV estimator."""
        found = estimator.cv_results_
        return cls(
            np.asarray(found["param_alpha"]),
            found["mean_test_score"],
            found["std_test_score"],
            estimator.alpha_,
            type(estimator).__name__,
        ).plot(ax=ax)

    def plot(self, *, ax: plotting.Axes | None = None) -> PathDisplay:
        """Draw on `ax`, or on a new figure."""
        ax = plotting.canvas(ax).ax_
        ax.plot(self.alphas, self.mean, marker="o")
        ax.fill_between(self.alphas, self.mean - self.std, self.mean + self.std, alpha=0.2)
        ax.axvline(self.chosen, linestyle="--", label=f"chosen: {self.chosen:.3g}")
        ax.set(xlabel="alpha", ylabel="score (mean and std over folds)", title=self.name)
        if (self.alphas > 0).all():
            ax.set_xscale("log")
        ax.legend()
        self.ax_ = ax
        return self


@dataclass(eq=False)
class GradientFlowDisplay:
    """Norm of the loss gradient, relative to the weight norm, of each layer.

    Args:
        layers: their names, from input to output.
        ratios: (layers,) gradient norm over weight norm.
        name: of the estimator, for the title.
    """

    layers: list[str]
    ratios: np.ndarray
    name: str
    ax_: plotting.Axes | None = field(default=None, init=False)

    @classmethod
    def from_estimator(
        cls, estimator: Any, X: Inputs, y: ArrayLike, *, ax: plotting.Axes | None = None
    ) -> GradientFlowDisplay:
        """Plot the gradients of a fitted estimator on rows X and targets y."""
        x, targets, weights = estimator._check(X, y, None, reset=False)
        network = estimator.network_
        rows = Rows.of(x, estimator._scale_targets(targets), weights)
        x, target, weight = rows.batch(slice(None))
        losses = summed_losses(estimator._loss, network(x), target)
        loss = (weight * losses).sum() / weight.sum()
        layers = list(network.linear)
        gradients = torch.autograd.grad(loss, [layer.weight for layer in layers])
        ratios = [
            float(g.norm() / layer.weight.detach().norm().clamp(min=1e-30))
            for g, layer in zip(gradients, layers, strict=True)
        ]
        names = [f"layer {i}" for i in range(1, len(layers) + 1)]
        return cls(names, np.array(ratios), type(estimator).__name__).plot(ax=ax)

    def plot(self, *, ax: plotting.Axes | None = None) -> GradientFlowDisplay:
        """Draw on `ax`, or on a new figure."""
        ax = plotting.canvas(ax).ax_
        ax.bar(self.layers, self.ratios)
        ax.set(yscale="log", ylabel="gradient norm / weight norm", title=self.name)
        self.ax_ = ax
        return self
