"""The network that the estimators train, its losses and its penalties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tikhon.layers import Dropout
from tikhon.penalties import L1, L2, ElasticNet, GroupLasso
from tikhon.penalties.base import Penalty
from tikhon.regularizer.terms import Term

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "logistic": torch.sigmoid,
    "identity": lambda x: x,
}
PENALTIES = ("elastic_net", "group_lasso")


class Network(nn.Module):
    """Linear layers with an activation and dropout between them; inputs are standardised first.

    `shift` and `scale` (features,) are applied to the inputs, `unit` and `offset` (outputs,) to
    the outputs by `answer`: training sees standardised targets.
    """

    shift: Tensor
    scale: Tensor
    unit: Tensor
    offset: Tensor

    def __init__(self, sizes: Sequence[int], activation: str, rate: float, dtype: torch.dtype):
        super().__init__()
        self.sizes, self.activation = tuple(sizes), activation
        pairs = list(pairwise(sizes))
        self.linear = nn.ModuleList(nn.Linear(a, b, dtype=dtype) for a, b in pairs)
        self.dropout = nn.ModuleList(Dropout(rate) for _ in pairs[1:])
        for name, size in (("shift", sizes[0]), ("offset", sizes[-1])):
            self.register_buffer(name, torch.zeros(size, dtype=dtype))
        for name, size in (("scale", sizes[0]), ("unit", sizes[-1])):
            self.register_buffer(name, torch.ones(size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, features) -> (rows, outputs), standardised."""
        x = (x - self.shift) / self.scale
        activation = ACTIVATIONS[self.activation]
        for linear, dropout in zip(self.linear, self.dropout, strict=False):
            x = dropout(activation(linear(x)))
        return self.linear[-1](x)

    def answer(self, x: Tensor) -> Tensor:
        """The outputs in the target's own unit."""
        return self(x) * self.unit + self.offset


def moments(x: Any, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and standard deviation of every column; sparse columns are not centred."""
    total = weights.sum()
    if hasattr(x, "tocsr"):
        squares = np.asarray(x.multiply(x).T @ weights).ravel() / total
        return np.zeros(x.shape[1]), _positive(np.sqrt(squares), 0.0)
    wide = x.astype(np.float64)
    mean = weights @ wide / total
    spread = np.sqrt(weights @ (wide - mean) ** 2 / total)
    return mean, _positive(spread, 1e-12 * np.abs(mean))


def _positive(scale: np.ndarray, threshold: Any) -> np.ndarray:
    return np.where(scale > threshold, scale, 1.0)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """(rows,) of one-hot targets."""
    return -(target * torch.log_softmax(output, 1)).sum(1)


def binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """(rows,) of 0/1 targets, summed over the labels."""
    return F.binary_cross_entropy_with_logits(output, target, reduction="none").sum(1)


def half_squares(output: Tensor, target: Tensor) -> Tensor:
    """(rows,) half squared errors, summed over the outputs: Lasso's 1/(2n)."""
    return 0.5 * (output - target).square().sum(1)


def terms(kind: str, strength: Any, l1_ratio: float) -> dict[str, Term] | None:
    """The penalty of the estimators: on all weights, or on the columns of the first layer."""
    if isinstance(strength, float | int) and strength == 0:
        return None
    if kind == "group_lasso":
        return {"linear.0.weight": Term(GroupLasso(strength), rows="in")}
    penalty: Penalty = L2(strength)
    if l1_ratio == 1:
        penalty = L1(strength)
    elif l1_ratio > 0:
        penalty = ElasticNet(strength, l1_ratio=l1_ratio)
    return {"linear.*": Term(penalty)}
