"""The smooth part of a penalised linear model: data, loss and derivatives.

The mean loss over W (outputs, features) and an unpenalised intercept, in float64: squared loss
1/(2n)|y - Xw - b|^2, logistic or multinomial loss, optionally weighted by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tikhon.paths.active_set import Gram

Kind = Literal["squared", "logistic", "multinomial"]
_CURVATURE = {"squared": 1.0, "logistic": 0.25, "multinomial": 0.5}
SEPARATED = 1e-5  # mean loss of classes below which they count as separated
SEPARABLE = (
    "the classes are separable, so that without a penalty the weights grow without end: they are "
    "where the solver stopped; take a strength above 0"
)
_ROUNDING = 1e-13  # relative spread below which a column is constant up to rounding


@dataclass(frozen=True)
class Fit:
    """A solution: weights (outputs, features), intercepts, distance to optimality, steps.

    The intercept refers to the centred data of `LinearProblem`; `raw_bias` converts it. `residual`
    is the largest proximal-gradient residual, scaled by `LinearProblem.distance`.
    """

    weight: Tensor
    bias: Tensor
    residual: float
    steps: int


class LinearProblem:
    """Centred float64 data with the loss, its gradient and curvature bound.

    `unit` (features,) is the standard deviation of each column and `spread` that of the targets.
    Tolerances are relative to them, so that results do not depend on the units of the data.
    """

    def __init__(
        self, x: Tensor, y: Tensor, kind: Kind, *, outputs: int, weights: Tensor | None = None
    ) -> None:
        self.kind: Kind = kind
        self.outputs = outputs
        x = x.reshape(len(x), -1).double()
        self.weights = None if weights is None else weights.double() / weights.double().mean()
        self.mean = self.average(x)
        x = x - self.mean
        unit = self.average(x.square()).sqrt()
        self.constant = unit <= _ROUNDING * self.mean.abs()
        self.x = torch.where(self.constant, 0.0, x)
        self.unit = torch.where(self.constant, 1.0, unit)
        self._targets(y)

    def _targets(self, y: Tensor) -> None:
        """Prepare targets, the intercept of the empty model, and the spread to explain."""
        self.offset = self.x.new_zeros(self.outputs)
        if self.kind == "multinomial":
            self.y = y.long()
            shares = self.average(F.one_hot(self.y, self.outputs).double())
            start = shares.clamp_min(0.5 / len(y)).log()
            self.start_bias = start - start.mean()
            self.spread = float((1 - shares.square().sum()).clamp_min(0).sqrt())
            return
        y = y.double().reshape(len(y), -1)
        mean = self.average(y)
        self.spread = float(self.average((y - mean).square()).sum().sqrt())
        if self.kind == "logistic":
            self.y = y
            least = 0.5 / len(y)
            self.start_bias = torch.logit(mean.clamp(least, 1 - least))
            return
        if self.spread <= _ROUNDING * float(mean.abs().max()):
            self.y, self.spread = torch.zeros_like(y), 0.0
        else:
            self.y = y - mean
        self.offset, self.start_bias = mean, torch.zeros_like(mean)

    def average(self, values: Tensor) -> Tensor:
        """Weighted mean over rows."""
        if self.weights is None:
            return values.mean(0)
        return self.weights @ values.flatten(1) / len(values)

    @cached_property
    def gram(self) -> Gram:
        """Products of standardised columns with each other and with standardised targets."""
        root = (self.weights if self.weights is not None else self.x.new_ones(len(self.x))) ** 0.5
        rows = (root / len(self.x) ** 0.5)[:, None]
        targets = rows * self.y / (self.spread or 1.0)
        return Gram((rows * self.x / self.unit).numpy(), targets.numpy())

    @cached_property
    def step(self) -> float:
        """Largest step in the weights for which gradient descent always decreases the loss."""
        return 1 / (_CURVATURE[self.kind] * (self._largest(self.x) or 1.0))

    @cached_property
    def steps(self) -> float | Tensor:
        """The same for each column, (features,), where units differ."""
        if float(self.unit.max()) < 1.5 * float(self.unit.min()):
            return self.step
        largest = self._largest(self.x / self.unit) or 1.0
        return 1 / (_CURVATURE[self.kind] * largest * self.unit.square())

    @property
    def largest_step(self) -> float:
        """Largest of `steps`."""
        return float(torch.as_tensor(self.steps, dtype=torch.float64).max())

    @property
    def bias_step(self) -> float:
        """Step for intercepts, which centring decouples from weights."""
        return 1 / _CURVATURE[self.kind]

    def _largest(self, x: Tensor) -> float:
        """Largest eigenvalue of the weighted mean of x x'."""
        x = x if self.weights is None else x * self.weights.sqrt()[:, None]
        gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
        return float(torch.linalg.eigvalsh(gram)[-1]) / len(x)

    def distance(self, weight: Tensor, bias: Tensor) -> float:
        """Largest entry of a gradient or residual, relative to its possible maximum.

        By Cauchy-Schwarz, no entry of the gradient at the empty model exceeds the standard
        deviation of its column times that of the targets.
        """
        worst = max(float((weight / self.unit).abs().max()), float(bias.abs().max()))
        return worst / (self.spread or 1.0)

    def move(self, weight: Tensor) -> float:
        """Relative change of the outputs caused by a change of the weights, at its largest."""
        return float((weight.abs() * self.unit).max()) / (self.spread if self.regression else 1.0)

    @property
    def regression(self) -> bool:
        """Whether outputs have the unit of the targets, unlike logits."""
        return self.kind == "squared" and self.spread > 0

    def loss(self, weight: Tensor, bias: Tensor, columns: Tensor | None = None) -> Tensor:
        """Mean loss; with `columns`, of a model restricted to those features."""
        x = self.x if columns is None else self.x[:, columns]
        return self.average(linear_loss(x @ weight.T + bias, self.y, self.kind)[:, None])[0]

    def gradient(
        self, weight: Tensor, bias: Tensor, columns: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the mean loss in weights and intercepts; `columns` as in `loss`."""
        x = self.x if columns is None else self.x[:, columns]
        z = x @ weight.T + bias
        if self.kind == "squared":
            r = z - self.y
        elif self.kind == "logistic":
            r = torch.sigmoid(z) - self.y
        else:
            r = torch.softmax(z, 1)
            r[torch.arange(len(r)), self.y] -= 1
        r = r / len(r) if self.weights is None else r * (self.weights / len(r))[:, None]
        return r.T @ x, r.sum(0)

    def hessian(self, weight: Tensor, bias: Tensor, columns: Tensor, free: Tensor) -> Tensor:
        """Hessian in the weights marked by `free` (outputs, columns), then the intercepts.

        For softmax with probabilities p it is a block X' diag(p_k) X for each output minus Z' Z,
        where Z has a column x_j p_k for each weight (k, j).
        """
        x = torch.cat([self.x[:, columns], torch.ones_like(self.x[:, :1])], dim=1)
        marked = torch.cat([free, torch.zeros_like(free[:, :1])], dim=1)
        intercepts = torch.zeros_like(marked)
        intercepts[:, -1] = True
        output, column = torch.cat([marked.nonzero(), intercepts.nonzero()]).T
        shares = self._curvature(x[:, :-1] @ weight.T + bias)
        counts = 1 / len(x) if self.weights is None else (self.weights / len(x))[:, None]
        found = x.new_zeros(len(output), len(output))
        for k in range(self.outputs):
            own = (output == k).nonzero().squeeze(1)
            part = x[:, column[own]]
            found[own[:, None], own] = (part * (counts * shares[:, k : k + 1])).T @ part
        if self.kind == "multinomial":
            seen = x[:, column] * shares[:, output]
            found -= (seen * counts).T @ seen
        return found

    def _curvature(self, z: Tensor) -> Tensor:
        """Curvature of each row's loss by output; for softmax without the shared term."""
        if self.kind == "multinomial":
            return torch.softmax(z, 1)
        p = torch.sigmoid(z)
        return torch.ones_like(z) if self.kind == "squared" else p - p * p

    def centred(self, bias: Tensor) -> Tensor:
        """Centre multinomial intercepts, which are determined up to a constant."""
        return bias - bias.mean() if self.kind == "multinomial" else bias

    def empty(self) -> Fit:
        """Return the model without features."""
        weight = self.x.new_zeros(self.outputs, self.x.shape[1])
        return Fit(weight, self.start_bias.clone(), float("inf"), 0)

    def raw_bias(self, fit: Fit) -> Tensor:
        """Return the intercept for uncentred inputs and targets."""
        return fit.bias - fit.weight @ self.mean + self.offset

    def centred_bias(self, weight: Tensor, raw: Tensor) -> Tensor:
        """Invert `raw_bias`."""
        return raw + weight @ self.mean - self.offset


def linear_loss(z: Tensor, y: Tensor, kind: Kind) -> Tensor:
    """Loss of each row: half the squared error, or the negative log-likelihood."""
    if kind == "squared":
        return 0.5 * (z - y.reshape(len(z), -1)).square().sum(1)
    if kind == "logistic":
        target = y.reshape(len(z), -1).to(z.dtype)
        return F.binary_cross_entropy_with_logits(z, target, reduction="none").sum(1)
    return F.cross_entropy(z, y.long(), reduction="none")
