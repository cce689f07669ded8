"""A training loop with sample weights, in the float type of the inputs.

`tikhon.fit` has neither: an estimator promises that weighting a row is repeating it, that a row
of weight zero is not there, and that `partial_fit` continues.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tikhon.regularizer.regularizer import Regularizer, regularize
from tikhon.sklearn.network import Network

Losses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs (dense or CSR), targets (rows, outputs) and weights, without rows of weight zero."""

    x: Any
    y: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, x: Any, y: np.ndarray, weights: np.ndarray) -> Rows:
        """The rows that count: random numbers are not spent on the others."""
        there = weights > 0
        rows = cls(x, y, weights)
        return rows if there.all() else rows.take(there)

    def take(self, rows: np.ndarray) -> Rows:
        """Some of the rows, by index or mask."""
        return Rows(self.x[rows], self.y[rows], self.weights[rows])

    def __len__(self) -> int:
        return len(self.y)

    @cached_property
    def _dense(self) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.from_numpy(np.require(self.x, requirements=["C", "W"]))
        y, weights = (torch.from_numpy(part).to(x.dtype) for part in (self.y, self.weights))
        return x, y, weights

    def batch(self, rows: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Dense tensors of some rows."""
        if not hasattr(self.x, "toarray"):
            x, y, weights = self._dense
            return x[rows], y[rows], weights[rows]
        x = torch.from_numpy(self.x[rows].toarray())
        y, weights = (torch.from_numpy(part[rows]).to(x.dtype) for part in (self.y, self.weights))
        return x, y, weights


class Learner:
    """One network, its optimizer and its penalty, trained epoch by epoch."""

    def __init__(
        self,
        network: Network,
        losses: Losses,
        terms: Any,
        *,
        lr: float,
        optimizer_state: Any = None,
    ) -> None:
        self.network, self.losses = network, losses
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
        if optimizer_state is not None:
            self.optimizer.load_state_dict(optimizer_state)
        self.regularizer: Regularizer | None = None
        if terms:
            self.regularizer = regularize(network, self.optimizer, terms)

    def epoch(self, rows: Rows, size: int, rng: np.random.RandomState) -> float:
        """One pass; the objective (loss and penalty) as it was on the way."""
        count = len(rows)
        mean_weight = rows.weights.sum() / count
        if size >= count:
            batches: list[Any] = [slice(None)]
        else:
            order = rng.permutation(count)
            batches = [order[i : i + size] for i in range(0, count, size)]
        total = 0.0
        self.network.train()
        for batch in batches:
            x, y, weights = rows.batch(batch)
            loss = (weights * self.losses(self.network(x), y)).sum() / (mean_weight * len(x))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(x) / count
        self.network.eval()
        if self.regularizer is not None:
            total += float(self.regularizer.value())
        return total

    @torch.no_grad()
    def loss(self, rows: Rows) -> float:
        """Weighted mean loss in evaluation mode."""
        x, y, weights = rows.batch(slice(None))
        self.network.eval()
        return float((weights * self.losses(self.network(x), y)).sum() / weights.sum())

    def close(self) -> Any:
        """Take the hooks off; the optimizer's state, to continue from."""
        if self.regularizer is not None:
            self.regularizer.remove()
        return self.optimizer.state_dict()


@torch.no_grad()
def answers(network: Network, x: Any, size: int = 4096) -> np.ndarray:
    """The network's answers for dense or CSR rows."""
    parts = []
    for start in range(0, x.shape[0], size):
        part = x[start : start + size]
        part = part.toarray() if hasattr(part, "toarray") else part
        dtype = network.shift.dtype
        parts.append(network.answer(torch.from_numpy(np.array(part)).to(dtype)).numpy())
    return np.concatenate(parts)
