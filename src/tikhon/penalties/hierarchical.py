"""The coupling of a skip connection with the first layer (LassoNet)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tikhon.arguments import check_field, is_count
from tikhon.penalties.base import Proximable, as_tensor, check_number, refuse_metric, upcast
from tikhon.penalties.group import row_factors


@dataclass(frozen=True, eq=False)
class Hierarchical(Proximable):
    """Chooses input features: a feature enters the network only if its skip connection does.

    Row j of w holds input feature j: first the `skip` weights v_j of its linear skip connection
    (one per output), then its column u_j of the first layer. The penalty is
    `strength * sum_j weights_j * |v_j|` (Euclidean norm) where `max|u_j| <= M * |v_j|` for every
    feature, and infinite elsewhere. `select(model, ("skip.weight", "fc1.weight"),
    rows="feature")` gives these rows.

    Args:
        M: hierarchy coefficient, > 0: how large a first-layer weight may be for a skip weight of
            1. Small values approach a linear model.
        skip: how many leading entries of a row are skip weights, >= 1.
        weights: factors >= 0, one per feature, shape (rows,).

    Reference: Lemhadri et al. (2021), https://www.jmlr.org/papers/v22/20-848.html.

    >>> w = torch.tensor([[2.0, 0.5, -0.25], [0.1, 0.3, 0.2]])
    >>> Hierarchical(1.0, M=1.0).prox(w, step=1.0)
    tensor([[ 1.0000,  0.5000, -0.2500],
            [ 0.0000,  0.0000,  0.0000]])
    """

    M: float = 10.0
    skip: int = 1
    weights: Tensor | None = None

    convex: ClassVar[bool] = False
    diagonal: ClassVar[bool] = False
    real: ClassVar[bool] = True
    rows: ClassVar[str] = "feature"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "M", 0)
        check_field(self, "skip", ">= 1", is_count, whole=True)

    def value(self, w: Tensor) -> Tensor:
        """strength * sum of weighted |v_j|, infinite where the hierarchy is violated."""
        norm, tail = self._parts(upcast(w))
        slack = 32 * torch.finfo(w.dtype).eps * (1 + self.M * norm)
        violated = (tail.abs() > self.M * norm + slack).any()
        return (self._strengths(norm) * norm).sum() + torch.where(violated, torch.inf, 0.0).to(
            norm.dtype
        )

    def grad(self, w: Tensor) -> Tensor:
        """strength * weights * v_j / |v_j| on the skip weights, 0 elsewhere."""
        norm, tail = self._parts(upcast(w))
        head = upcast(w)[:, : self.skip] / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return torch.cat([self._strengths(norm) * head, torch.zeros_like(tail)], 1).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """The global minimiser of each row, by sorting its first-layer weights.

        A feature that stays although its skip weights are all 0 gets its skip on the first output.
        """
        refuse_metric(self, step)
        norm, tail = self._parts(upcast(w))
        bound = self._bound(norm, tail, as_tensor(self._strengths(norm) * step, norm))
        first = (torch.arange(self.skip, device=w.device) == 0).to(norm.dtype)
        tiny = torch.finfo(norm.dtype).tiny
        direction = torch.where(norm > 0, upcast(w)[:, : self.skip] / norm.clamp_min(tiny), first)
        head = direction * (bound / self.M)
        return torch.cat([head, tail.clamp(-bound, bound)], 1).to(w.dtype)

    def _strengths(self, norm: Tensor) -> float | Tensor:
        return self.lam * row_factors(self.weights, norm)

    def _parts(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if w.ndim != 2 or w.shape[1] < self.skip:
            raise ValueError(
                f"Hierarchical needs rows of {self.skip} skip weights and one feature's first-"
                f'layer weights, received shape {tuple(w.shape)}; give the term rows="feature"'
            )
        head, tail = w[:, : self.skip], w[:, self.skip :]
        return torch.linalg.vector_norm(head, dim=1, keepdim=True), tail

    def _bound(self, norm: Tensor, tail: Tensor, threshold: Tensor) -> Tensor:
        """M * |v*| of each row, shape (rows, 1): the level at which its tail is clipped."""
        ordered = tail.abs().sort(dim=1, descending=True).values
        none = torch.zeros_like(norm)
        sums = torch.cat([none, ordered.cumsum(1)], 1)
        count = torch.arange(sums.shape[1], device=norm.device, dtype=norm.dtype)
        # with the s largest entries clipped; the bound over s is largest at the true s
        bounds = self.M * (norm - threshold + self.M * sums) / (1 + count * self.M**2)
        return bounds.amax(1, keepdim=True).clamp_min(0)
