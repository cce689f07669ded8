"""The network trained by the estimators, with scaling and penalties."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tikhon.layers import Dropout
from tikhon.penalties import L1, L2, ElasticNet, GroupLasso
from tikhon.penalties.base import Proximable
from tikhon.regularizer.terms import Term

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "logistic": torch.sigmoid,
    "identity": lambda x: x,
}
PENALTIES = ("elastic_net", "group_lasso")


class Network(nn.Module):
    """Linear layers with activation and dropout in between, on standardised inputs.

    `shift` and `scale` (features,) standardise inputs; `unit` and `offset` (outputs,) convert
    outputs to predictions, as training uses standardised targets.
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
        """(rows, features) -> (rows, outputs), both standardised."""
        x = (x - self.shift) / self.scale
        activation = ACTIVATIONS[self.activation]
        for linear, dropout in zip(self.linear, self.dropout, strict=False):
            x = dropout(activation(linear(x)))
        return self.linear[-1](x)


def moments(x: Any, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and standard deviation of each column; sparse columns are not centred."""
    total = weights.sum()
    if hasattr(x, "tocsr"):
        squares = np.asarray(x.multiply(x).T @ weights).ravel() / total
        return np.zeros(x.shape[1]), _positive(np.sqrt(squares), 0.0)
    wide = x.astype(np.float64)
    mean = weights @ wide / total
    spread = np.sqrt(weights @ (wide - mean) ** 2 / total)
    return mean, _positive(spread, 1e-12 * np.abs(mean))


def _positive(scale: np.ndarray, threshold: object) -> np.ndarray:
    return np.where(scale > threshold, scale, 1.0)


def terms(
    kind: str, strength: object, l1_ratio: float, *, layers: int, unit: float = 1.0
) -> dict[str, Term]:
    """Return the estimators' penalty: on all weights, or on columns of the first layer.

    If targets are divided by `unit`, the last weights scale by 1 / unit and the objective by its
    square: strengths are adjusted so that the minimum is the same.
    """
    by_weight = {}
    for layer in range(1 if kind == "group_lasso" else layers):
        size = unit if layer == layers - 1 else 1.0
        penalty = penalty_of(
            kind, strength, l1_ratio, linear=size / unit**2, square=size**2 / unit**2
        )
        if penalty is not None:
            rows = "in" if kind == "group_lasso" else "tensor"
            by_weight[f"linear.{layer}.weight"] = Term(penalty, rows=rows)
    return by_weight


def penalty_of(
    kind: str, strength: object, l1_ratio: float, *, linear: float = 1.0, square: float = 1.0
) -> Proximable | None:
    """Return the penalty of one layer; `linear` and `square` scale its terms of those orders.

    Strengths tuned during training are not scaled.
    """
    if not isinstance(strength, float | int):
        if kind == "group_lasso":
            return GroupLasso(strength)
        if 0 < l1_ratio < 1:
            return ElasticNet(strength, l1_ratio=l1_ratio)
        return L1(strength) if l1_ratio else L2(strength)
    if kind == "group_lasso":
        return GroupLasso(strength * linear) if strength else None
    first, second = strength * l1_ratio * linear, strength * (1 - l1_ratio) * square
    if not first:
        return L2(second) if second else None
    return ElasticNet(first + second, l1_ratio=first / (first + second)) if second else L1(first)
