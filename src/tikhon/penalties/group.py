"""Penalties whose groups are the rows of w (all dimensions but the first make one row).

A w with fewer than two dimensions is one group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tikhon.penalties.base import Proximable, is_metric, weighted, wide


def as_rows(w: Tensor) -> Tensor:
    """w as a matrix whose rows are the groups."""
    return w.flatten(1) if w.ndim >= 2 else w.reshape(1, -1)


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norm of each row, shape (rows, 1)."""
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True)


def shrink_rows(rows: Tensor, step: float | Tensor, strength: float | Tensor) -> Tensor:
    """Prox of `strength * sum of row norms`; `step` is one number or of the rows' shape.

    With one number it is `max(0, 1 - step*strength/|row|) * row`. In a diagonal metric a row is
    zero if `|row/step| <= strength`, otherwise `row * t / (t + strength*step)`, t being the root
    of `|row / (t + strength*step)| = 1`, the norm of the solution.
    """
    tiny = torch.finfo(rows.dtype).tiny
    if not is_metric(step):
        return rows * (1 - step * strength / row_norms(rows).clamp_min(tiny)).clamp_min(0)
    shift = strength * step
    norm = _norm_after(rows, shift, tiny)
    kept = row_norms(rows / step.clamp_min(tiny)) > strength
    return torch.where(kept, rows * (norm / (norm + shift).clamp_min(tiny)), 0)


def _norm_after(rows: Tensor, shift: Tensor, tiny: float, iterations: int = 8) -> Tensor:
    """Root t of `|rows / (t + shift)| = 1` for each row, shape (rows, 1).

    `1/|rows / (t + shift)|` is concave and increasing in t, so Newton's iterates from a lower
    bound of the root rise to it without overshooting (the secular equation of trust regions).
    """
    if not rows.numel():
        return rows.new_zeros(rows.shape[0], 1)
    size = rows.abs()
    t = torch.maximum(
        (size - shift).amax(1, keepdim=True), row_norms(rows) - shift.amax(1, keepdim=True)
    ).clamp_min(0)
    for _ in range(iterations):
        denominator = (t + shift).clamp_min(tiny)
        ratio = size / denominator
        norm = row_norms(ratio).clamp_min(tiny)
        slope = (ratio.square() / denominator).sum(1, keepdim=True).clamp_min(tiny)
        t = t + (norm - 1).clamp_min(0) * norm.square() / slope
    return t


@dataclass(frozen=True, eq=False)
class GroupLasso(Proximable):
    """Zeros in whole rows: neurons, filters, input features.

    `strength * sum_g weights_g * |w_g|`, |w_g| the Euclidean norm of row g.

    Args:
        strength: lambda >= 0.
        weights: factors >= 0 (not checked), one a row, shape (rows,), or a mapping from
            parameter names to such tensors.
        scale_by_size: multiply by sqrt(entries of a row), the convention of Yuan and Lin.

    Reference: Yuan and Lin (2006), https://doi.org/10.1111/j.1467-9868.2005.00532.x.

    >>> w = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    >>> GroupLasso(1.0).value(w)
    tensor(5.5000)
    >>> GroupLasso(1.0).prox(w, step=1.0)
    tensor([[2.4000, 3.2000],
            [0.0000, 0.0000]])
    """

    weights: Tensor | Mapping[str, Tensor] | None = None
    scale_by_size: bool = False

    rows: ClassVar[str] = "out"
    reference: ClassVar[str] = "Yuan and Lin 2006"

    def value(self, w: Tensor) -> Tensor:
        """strength * sum of weighted row norms."""
        rows = as_rows(wide(w))
        return (self._strengths(rows) * row_norms(rows)).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * weights * w_g / |w_g|, 0 for a zero row."""
        rows = as_rows(wide(w))
        tiny = torch.finfo(rows.dtype).tiny
        gradient = self._strengths(rows) * rows / row_norms(rows).clamp_min(tiny)
        return gradient.reshape(w.shape).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Each row shrunk by its norm; in a diagonal metric one scalar equation a row."""
        rows = as_rows(wide(w))
        if is_metric(step):
            step = as_rows(step.to(rows.dtype))
        shrunk = shrink_rows(rows, step, self._strengths(rows))
        return shrunk.reshape(w.shape).to(w.dtype)

    def _strengths(self, rows: Tensor) -> float | Tensor:
        strength = self.lam * rows.shape[1] ** 0.5 if self.scale_by_size else self.lam
        strength = weighted(strength, self.weights)
        return strength if self.weights is None else strength.reshape(-1, 1)
