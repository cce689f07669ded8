"""Penalties whose groups are the rows of w (all dimensions but the first make one row).

A w with fewer than two dimensions is one group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tikhon.penalties.base import (
    Proximable,
    Slopes,
    as_tensor,
    is_metric,
    refuse_metric,
    upcast,
    weighted,
)
from tikhon.penalties.elementwise import L1, mcp_prox, mcp_value


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
    return shrink_rows_by(rows, (strength * step).to(rows.dtype.to_real()))


def shrink_rows_by(rows: Tensor, shift: Tensor) -> Tensor:
    """The same from `shift = strength * step`, of the rows' shape."""
    shift = shift.clamp_min(torch.finfo(rows.dtype).tiny)
    norm = _norm_after(rows, shift)
    gone = row_norms(rows / shift) <= 1  # not for NaN: it must show
    return torch.where(gone, 0, rows * (norm / (norm + shift)))


def _norm_after(rows: Tensor, shift: Tensor) -> Tensor:
    """Root t of `|rows / (t + shift)| = 1` for each row, shape (rows, 1).

    `1/|rows / (t + shift)|` is concave and increasing in t, so Newton's iterates from a lower
    bound of the root rise to it without overshooting (the secular equation of trust regions).
    Four iterations leave 1e-13 where steps differ by factors of e^20.
    """
    if not rows.numel():
        return rows.new_zeros(rows.shape[0], 1)
    size = rows.abs()
    t = torch.maximum(
        (size - shift).amax(1, keepdim=True), row_norms(rows) - shift.amax(1, keepdim=True)
    ).clamp_min(0)
    tiny = torch.finfo(rows.dtype).tiny
    for _ in range(6):
        inverse = (t + shift).reciprocal_()
        ratio = size * inverse  # at most 1: t is at least each size less its shift
        squares = ratio.mul_(ratio)
        square = squares.sum(1, keepdim=True)
        slope = torch.linalg.vecdot(squares, inverse, dim=1)[:, None].clamp_min(tiny)
        t = t + (square.sqrt() - 1).clamp_min(0) * square / slope
    return t


def row_factors(weights: Tensor | Mapping[str, Tensor] | None, w: Tensor) -> float | Tensor:
    """One factor per row, shaped to multiply w; 1 without weights."""
    if weights is None:
        return 1.0
    factors = weighted(1, weights).to(w.device, w.dtype.to_real()).reshape(-1)
    rows = w.shape[0] if w.ndim >= 2 else 1
    if len(factors) not in (1, rows):
        raise ValueError(
            f"weights have {len(factors)} factors for {rows} rows; give one a row, or one for all"
        )
    return factors.reshape(-1, *[1] * (w.ndim - 1)) if w.ndim >= 2 else factors


@dataclass(frozen=True, eq=False)
class GroupLasso(Proximable):
    """Zeros in whole rows: neurons, filters or input features.

    `strength * sum_g weights_g * |w_g|`, |w_g| the Euclidean norm of row g.

    Args:
        weights: factors >= 0, one per row, shape (rows,), or a mapping from
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
    flags: ClassVar[tuple[str, ...]] = ("scale_by_size",)

    def value(self, w: Tensor) -> Tensor:
        """strength * sum of weighted row norms."""
        rows = as_rows(upcast(w))
        return (self._strengths(rows) * row_norms(rows)).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * weights * w_g / |w_g|, 0 for a zero row."""
        rows = as_rows(upcast(w))
        tiny = torch.finfo(rows.dtype).tiny
        gradient = self._strengths(rows) * rows / row_norms(rows).clamp_min(tiny)
        return gradient.reshape(w.shape).to(w.dtype)

    def slopes(self, w: Tensor) -> Slopes:
        """strength * weights, on rows."""
        return Slopes(rows=self._strengths(as_rows(w)))

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Each row shrunk by its norm; in a diagonal metric by one scalar equation per row."""
        rows = as_rows(upcast(w))
        if is_metric(step):
            step = as_rows(step.to(rows.dtype.to_real()))
        shrunk = shrink_rows(rows, step, self._strengths(rows))
        return shrunk.reshape(w.shape).to(w.dtype)

    def _strengths(self, rows: Tensor) -> float | Tensor:
        strength = self.lam * rows.shape[1] ** 0.5 if self.scale_by_size else self.lam
        return strength * row_factors(self.weights, rows)


@dataclass(frozen=True, eq=False)
class SparseGroupLasso(Proximable):
    """The sum of L1 and GroupLasso: zero rows, and zeros within the rows that stay.

    `strength * sum_g weights_g * (l1_ratio * sum|w_g| + (1 - l1_ratio) * |w_g|)`.

    Args:
        l1_ratio: share of the L1 part, in [0, 1].
        scale_by_size: multiply the row norms by sqrt(entries of a row).
        weights: factors >= 0, one per row, shape (rows,), or a mapping.

    Reference: Simon et al. (2013), https://doi.org/10.1080/10618600.2012.681250.

    >>> w = torch.tensor([[3.5, 0.25], [0.5, 0.5]])
    >>> SparseGroupLasso(1.0, l1_ratio=0.5).prox(w, step=1.0)
    tensor([[2.5000, 0.0000],
            [0.0000, 0.0000]])
    """

    l1_ratio: float = 0.5
    scale_by_size: bool = False
    weights: Tensor | Mapping[str, Tensor] | None = None

    rows: ClassVar[str] = "out"
    shares: ClassVar[tuple[str, ...]] = ("l1_ratio",)
    flags: ClassVar[tuple[str, ...]] = ("scale_by_size",)

    def value(self, w: Tensor) -> Tensor:
        """Sum of the two parts."""
        single, group = self._parts(w)
        return single.value(w) + group.value(w)

    def grad(self, w: Tensor) -> Tensor:
        """Sum of the two gradients."""
        single, group = self._parts(w)
        return single.grad(w) + group.grad(w)

    def slopes(self, w: Tensor) -> Slopes:
        """The slopes of both parts."""
        single, group = self._parts(w)
        return Slopes(single.slopes(w).entries, group.slopes(w).rows)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Soft threshold first, then the rows; the other order is not the prox."""
        single, group = self._parts(w)
        return group.prox(single.prox(upcast(w), step), step).to(w.dtype)

    def _parts(self, w: Tensor) -> tuple[L1, GroupLasso]:
        single, group = self.l1_ratio * self.lam, (1 - self.l1_ratio) * self.lam
        factors = row_factors(self.weights, w)
        return (
            L1(single, weights=factors if isinstance(factors, Tensor) else None),
            GroupLasso(group, weights=self.weights, scale_by_size=self.scale_by_size),
        )


@dataclass(frozen=True, eq=False)
class GroupMCP(Proximable):
    """Minimax concave penalty of the row norms: zero rows, large rows not shrunk.

    `sum_g weights_g * mcp(|w_g|)`, with `mcp` as in `MCP(strength, gamma)`. The prox is exact for
    one step per row; a step that differs within a row is refused.

    Args:
        strength: lambda >= 0, the norm under which rows become zero.
        gamma: concavity, > 0.
        weights: factors >= 0, one per row, shape (rows,), or a mapping.

    Reference: Huang, Breheny and Ma (2012), https://doi.org/10.1214/12-STS392.

    >>> GroupMCP(1.0).prox(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), step=1.0)
    tensor([[3., 4.],
            [0., 0.]])
    """

    gamma: float = 3.0
    weights: Tensor | Mapping[str, Tensor] | None = None

    convex: ClassVar[bool] = False
    diagonal: ClassVar[bool] = False
    rows: ClassVar[str] = "out"
    above: ClassVar[dict[str, float]] = {"gamma": 0}

    def value(self, w: Tensor) -> Tensor:
        """Sum over rows of the penalty of their norm."""
        rows = as_rows(upcast(w))
        values = mcp_value(row_norms(rows), self.lam, self.gamma)
        return (row_factors(self.weights, rows) * values).sum()

    def grad(self, w: Tensor) -> Tensor:
        """max(strength - |w_g|/gamma, 0) * w_g / |w_g|, 0 for a zero row."""
        rows = as_rows(upcast(w))
        norms = row_norms(rows)
        slope = row_factors(self.weights, rows) * (self.lam - norms / self.gamma).clamp_min(0)
        unit = rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)
        return (slope * unit).reshape(w.shape).to(w.dtype)

    def slopes(self, w: Tensor) -> Slopes:
        """strength * weights, on rows."""
        return Slopes(rows=row_factors(self.weights, as_rows(w)) * self.lam)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Each row scaled to the prox of its norm."""
        refuse_metric(self, step)
        rows = as_rows(upcast(w))
        norms = row_norms(rows)
        step = as_tensor(step * row_factors(self.weights, rows), norms)
        scale = mcp_prox(norms, step, self.lam, self.gamma)
        scale = scale / norms.clamp_min(torch.finfo(rows.dtype).tiny)
        return (rows * scale).reshape(w.shape).to(w.dtype)


@dataclass(frozen=True, eq=False)
class LInf(Proximable):
    """Largest entry of each row: evens out its large weights, or zeroes the row as a whole.

    `strength * sum_g weights_g * max|w_g|`.

    Args:
        weights: factors >= 0, one per row, shape (rows,), or a mapping.

    Reference: Turlach, Venables and Wright (2005), https://doi.org/10.1198/004017005000000139.

    >>> LInf(1.0).prox(torch.tensor([[3.0, 2.5], [0.3, 0.4]]), step=1.0)
    tensor([[2.2500, 2.2500],
            [0.0000, 0.0000]])
    """

    weights: Tensor | Mapping[str, Tensor] | None = None

    rows: ClassVar[str] = "out"

    def value(self, w: Tensor) -> Tensor:
        """strength * sum of the weighted largest sizes."""
        rows = as_rows(upcast(w))
        if not rows.numel():
            return self.lam * rows.sum()
        return (self._strengths(rows) * rows.abs().amax(1, keepdim=True)).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * weights * sign(w), shared by the largest entries of each row."""
        if not w.numel():
            return torch.zeros_like(w)
        rows = as_rows(upcast(w))
        size = rows.abs()
        largest = (size == size.amax(1, keepdim=True)).to(size.dtype)
        share = largest / largest.sum(1, keepdim=True)
        gradient = self._strengths(rows) * share * torch.sgn(rows)
        return gradient.reshape(w.shape).to(w.dtype)

    def steepness(self, w: Tensor) -> float | Tensor:
        """strength * weights on the norm of a row's gradient, which one entry may hold alone."""
        rows = as_rows(w)
        return self._strengths(rows) / max(1, rows.shape[1]) ** 0.5

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Each row clipped at one level, found by sorting its sizes."""
        if not w.numel():
            return w.clone()
        rows = as_rows(upcast(w))
        if is_metric(step):
            step = as_rows(step.to(rows.dtype.to_real()))
        return clip_rows(rows, step, self._strengths(rows)).reshape(w.shape).to(w.dtype)

    def _strengths(self, rows: Tensor) -> float | Tensor:
        return self.lam * row_factors(self.weights, rows)


def clip_rows(rows: Tensor, step: float | Tensor, strength: float | Tensor) -> Tensor:
    """Prox of `strength * sum of max|row|`: sign(w) min(|w|, level).

    The level solves `sum_j max(|w_j| - level, 0) / step_j = strength`, and is 0 if the sum at
    level 0 is no larger than that.
    """
    size = rows.abs()
    ordered, order = size.sort(dim=1, descending=True)
    if is_metric(step):
        relative, step = relative_step(step)
        inverse = (1 / relative).gather(1, order)
    else:
        inverse = torch.ones_like(ordered)
    # over any subset of the row the sum is at most the whole: the level is the largest of these
    levels = ((inverse * ordered).cumsum(1) - strength * step) / inverse.cumsum(1)
    level = levels.amax(1, keepdim=True).clamp_min(0)
    return torch.sgn(rows) * size.minimum(level)


def relative_step(step: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's steps over its largest one, kept away from 0, and that largest one."""
    limits = torch.finfo(step.dtype)
    largest = step.amax(1, keepdim=True)
    relative = step / largest.clamp_min(limits.tiny)
    relative = torch.where(largest > 0, relative, 1)
    return relative.clamp_min(limits.tiny**0.5), largest
