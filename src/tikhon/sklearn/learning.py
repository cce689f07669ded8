"""Train an estimator by epochs, with batches, steps and losses of `tikhon.fit`.

Unlike `fit`, weighting a row equals repeating it, rows of weight zero are ignored, `partial_fit`
continues training, and the dtype of the inputs is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tikhon.data.stream import Stream
from tikhon.regularizer.regularizer import Regularizer, regularize
from tikhon.regularizer.terms import Terms
from tikhon.sklearn.network import Network
from tikhon.training.losses import Loss
from tikhon.training.measures import predict
from tikhon.training.step import Step

_CHUNK = 4096  # sparse rows converted to dense at once


class Sparse(Protocol):
    """A scipy.sparse matrix or array, which has no type stubs."""

    shape: tuple[int, ...]

    def tocsr(self) -> Any:
        """Convert to CSR."""


Inputs = ArrayLike | Sparse  # rows (n, features) in any form of scikit-learn


@dataclass(frozen=True, eq=False)
class Rows:
    """Inputs (dense or CSR), targets (rows, outputs) and weights, without zero-weight rows."""

    x: Any
    y: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, x: object, y: np.ndarray, weights: np.ndarray) -> Rows:
        """Drop rows with weight zero, so that they do not consume random numbers."""
        there = weights > 0
        rows = cls(x, y, weights)
        return rows if there.all() else rows.take(there)

    def take(self, rows: np.ndarray) -> Rows:
        """Select rows by index or mask."""
        return Rows(self.x[rows], self.y[rows], self.weights[rows])

    def __len__(self) -> int:
        return len(self.y)

    @cached_property
    def _dense(self) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.from_numpy(np.require(self.x, requirements=["C", "W"]))
        y, weights = (torch.from_numpy(part).to(x.dtype) for part in (self.y, self.weights))
        return x, y, weights

    @cached_property
    def equal_weights(self) -> bool:
        """Whether all weights are equal."""
        return bool((self.weights == self.weights[0]).all())

    def batch(self, rows: Tensor | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return dense tensors of some rows."""
        if not hasattr(self.x, "toarray"):
            x, y, weights = self._dense
            return x[rows], y[rows], weights[rows]
        index = rows.numpy() if isinstance(rows, Tensor) else rows
        x = torch.from_numpy(self.x[index].toarray())
        y, weights = (torch.from_numpy(part[index]).to(x.dtype) for part in (self.y, self.weights))
        return x, y, weights


def summed_losses(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """Return losses (rows,) summed over outputs, as in scikit-learn; over classes there is one."""
    return loss.rows(output, target) * _losses_per_row(loss, target)


def _losses_per_row(loss: Loss, target: Tensor) -> int:
    """Return the number of losses summed for each row."""
    return 1 if loss.kind == "classes" else target.shape[1]


class Learner:
    """Train one network on its rows, with its optimizer and penalty, epoch by epoch."""

    def __init__(
        self,
        network: Network,
        loss: Loss,
        rows: Rows,
        terms: Terms | None,
        *,
        lr: float,
        size: int,
        seed: int,
        optimizer_state: dict[str, object] | None = None,
    ) -> None:
        self.network, self.loss, self.rows = network, loss, rows
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
        if optimizer_state is not None:
            self.optimizer.load_state_dict(optimizer_state)
        self.regularizer: Regularizer | None = None
        if terms:
            self.regularizer = regularize(network, self.optimizer, terms)
        indices = torch.arange(len(rows))
        self._stream = Stream((indices, indices), size=size, seed=seed)
        self._weight = rows.weights.sum() / len(rows)
        self._step = Step(network, self.optimizer, self._objective)

    def _objective(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y, weights = self.rows.batch(batch[0])
        if self.rows.equal_weights:  # one fused call: small batches are dominated by overhead
            value, parts = self.loss(self.network(x), y), _losses_per_row(self.loss, y)
            return value if parts == 1 else value * parts
        losses = summed_losses(self.loss, self.network(x), y)
        return (weights * losses).sum() / (self._weight * len(x))

    def epoch(self, number: int) -> float:
        """Train one epoch; return the mean objective (loss and penalty) during it."""
        total = 0.0
        self.network.train()
        for batch in self._stream.epoch(number):
            total += self._step(batch).item() * len(batch[0]) / len(self.rows)
        self.network.eval()
        if self.regularizer is not None:
            total += float(self.regularizer.value())
        return total

    @torch.no_grad()
    def score(self, rows: Rows) -> float:
        """Weighted mean loss in evaluation mode; lower is better."""
        found = outputs(self.network, rows.x)
        y, weights = (torch.from_numpy(part).to(found) for part in (rows.y, rows.weights))
        return float((weights * summed_losses(self.loss, found, y)).sum() / weights.sum())

    def close(self) -> dict[str, object]:
        """Remove the hooks; return the optimizer's state, for resuming."""
        if self.regularizer is not None:
            self.regularizer.remove()
        return self.optimizer.state_dict()


def outputs(network: Network, x: Any) -> Tensor:
    """Return the network's outputs for dense or CSR rows, in standardised units."""
    if not hasattr(x, "toarray"):
        return predict(network, torch.from_numpy(np.array(x)).to(network.shift.dtype))
    chunks = (x[start : start + _CHUNK].toarray() for start in range(0, x.shape[0], _CHUNK))
    return torch.cat([outputs(network, chunk) for chunk in chunks])


def predictions(network: Network, x: object) -> np.ndarray:
    """Return the network's predictions for dense or CSR rows, in the target's own units."""
    return (outputs(network, x) * network.unit + network.offset).numpy()
