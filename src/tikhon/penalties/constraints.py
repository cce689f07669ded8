"""Constraints: penalties that are 0 on a set and infinite elsewhere.

Their prox is the projection onto the set, whatever the size of the step; a tensor step sets the
metric of the projection. A set is one for each row of w (a w with fewer than two dimensions is
one row); by default the whole tensor is one row, except for MaxNorm, MinMaxNorm, UnitNorm and
SpectralBall.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tikhon.arguments import MAX_FLOAT32, check_field, is_count
from tikhon.penalties.base import (
    Proximable,
    check_number,
    is_metric,
    keep_nonfinite,
    refuse_metric,
    upcast,
)
from tikhon.penalties.group import as_rows, relative_step, row_norms
from tikhon.penalties.matrix import with_singular_values


@dataclass(frozen=True, eq=False)
class Constraint(Proximable):
    """A set of allowed weights; it has no strength."""

    strength: float = field(default=1.0, init=False, repr=False)

    constraint: ClassVar[bool] = True
    unweighted: ClassVar[str] = "a constraint has no strength that they could multiply"

    @property
    def has_interior(self) -> bool:
        """Whether a row (or entry) on the bound may leave it inwards."""
        return True

    def value(self, w: Tensor) -> Tensor:
        """0 where w is in the set up to rounding, otherwise infinite."""
        moved = (upcast(w) - upcast(self.prox(w, 1.0))).abs()
        allowed = 32 * torch.finfo(w.dtype).eps * (1 + upcast(w).abs())
        return torch.where((moved > allowed).any(), torch.inf, 0.0).to(moved.dtype)

    def grad(self, w: Tensor) -> Tensor:
        """0, which lies in the normal cone of every allowed w."""
        return torch.zeros_like(w)

    def normals(self, w: Tensor) -> Tensor | None:
        """Outward normals at w, of length 1 for each row (or entry) on the bound, 0 inside.

        With them the minimum on the set is found under optimizers of unknown metric; None if a
        projection must do.
        """
        return None


@dataclass(frozen=True, eq=False)
class RowConstraint(Constraint):
    """A constraint on each row, projected in at least float32."""

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Each row projected onto the set, in the metric of a tensor step."""
        if not w.numel():
            return w.clone()
        rows, metric = as_rows(upcast(w)), None
        if is_metric(step):
            metric, _ = relative_step(as_rows(step.to(rows.dtype.to_real())))
        return self._project(rows, metric).reshape(w.shape).to(w.dtype)

    @abstractmethod
    def _project(self, rows: Tensor, metric: Tensor | None) -> Tensor:
        """Rows in the set; `metric` are their steps over the largest in the row, None if alike."""


def _with_direction(rows: Tensor) -> Tensor:
    """Ones in place of rows that have no direction."""
    return torch.where(row_norms(rows) <= torch.finfo(rows.dtype).tiny, 1.0, rows)


def _scale_to(rows: Tensor, metric: Tensor | None, radius: float, *, inside: bool) -> Tensor:
    """Rows projected onto the sphere of that radius; with `inside`, onto the ball."""
    tiny = torch.finfo(rows.dtype).tiny
    norms = row_norms(rows)
    scaled = rows * (radius / norms.clamp_min(tiny))
    if metric is not None:
        scaled = _onto_unit_sphere(rows / radius, metric) * radius
    return torch.where(norms <= radius, rows, scaled) if inside else scaled


def _sphere_normals(w: Tensor, radius: float) -> Tensor:
    """Directions of the rows on or outside the sphere of that radius, 0 for the others."""
    rows = as_rows(w)
    norms = row_norms(rows)
    outside = norms >= radius * (1 - 8 * torch.finfo(rows.dtype).eps)
    directions = rows / norms.clamp_min(torch.finfo(rows.dtype).tiny)
    return torch.where(outside, directions, 0).reshape(w.shape)


def _onto_unit_sphere(rows: Tensor, metric: Tensor) -> Tensor:
    """Point of the unit sphere closest to each row in the metric: row / (1 + t*metric).

    `1/|row / (1 + t*metric)|` is concave and increasing in t, so Newton's iterates from a lower
    bound of the root rise to it without overshooting.
    """
    tiny = torch.finfo(rows.dtype).tiny
    size = rows.abs()
    t = ((size - 1) / metric).amax(1, keepdim=True)
    beyond = row_norms(rows) - 1  # from outside a closer bound, as no step exceeds 1
    t = torch.where(beyond > 0, torch.maximum(t, beyond), t)
    for _ in range(12):
        # at the root and at every lower bound no entry is above 1, but for rounding
        denominator = torch.maximum(1 + t * metric, size).clamp_min(tiny)
        ratio = size / denominator
        norm = row_norms(ratio).clamp_min(tiny)
        slope = (ratio.square() * metric / denominator).sum(1, keepdim=True).clamp_min(tiny)
        t = t + (norm - 1).clamp_min(0) * norm.square() / slope
    solution = rows / torch.maximum(1 + t * metric, size).clamp_min(tiny)
    return solution / row_norms(solution).clamp_min(tiny)


@dataclass(frozen=True, eq=False)
class MaxNorm(RowConstraint):
    """Norm of each row at most `limit`, often used together with dropout.

    Exact in a diagonal metric, by one scalar equation per row.

    Args:
        limit: largest Euclidean norm of a row, > 0.

    Reference: Srebro, Rennie and Jaakkola (2004); Srivastava et al. (2014),
    https://jmlr.org/papers/v15/srivastava14a.html.

    >>> MaxNorm(1.0).prox(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), step=1.0)
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """

    limit: float = 3.0

    rows: ClassVar[str] = "out"
    above: ClassVar[dict[str, float]] = {"limit": 0}

    def _project(self, rows: Tensor, metric: Tensor | None) -> Tensor:
        return _scale_to(rows, metric, self.limit, inside=True)

    def normals(self, w: Tensor) -> Tensor:
        """Directions of the rows on the sphere."""
        return _sphere_normals(w, self.limit)


@dataclass(frozen=True, eq=False)
class L2Ball(RowConstraint):
    """Euclidean norm at most `radius`; exact in a diagonal metric.

    Args:
        radius: > 0.

    Reference: Ivanov (1962); Parikh and Boyd (2014), https://doi.org/10.1561/2400000003.

    >>> L2Ball(1.0).prox(torch.tensor([3.0, 4.0]), step=1.0)
    tensor([0.6000, 0.8000])
    """

    radius: float = 1.0

    above: ClassVar[dict[str, float]] = {"radius": 0}

    def _project(self, rows: Tensor, metric: Tensor | None) -> Tensor:
        return _scale_to(rows, metric, self.radius, inside=True)

    def normals(self, w: Tensor) -> Tensor:
        """The direction of a point on the sphere."""
        return _sphere_normals(w, self.radius)


@dataclass(frozen=True, eq=False)
class UnitNorm(RowConstraint):
    """Norm of each row exactly 1; a zero row becomes constant.

    The sphere is not convex. In a diagonal metric the projection is exact unless the row is 0
    where its steps are largest (as a zero row is).

    Reference: Salimans and Kingma (2016), https://arxiv.org/abs/1602.07868.

    >>> UnitNorm().prox(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), step=1.0)
    tensor([[0.6000, 0.8000],
            [0.6000, 0.8000]])
    """

    convex: ClassVar[bool] = False
    rows: ClassVar[str] = "out"

    def _project(self, rows: Tensor, metric: Tensor | None) -> Tensor:
        return _scale_to(_with_direction(rows), metric, 1.0, inside=False)

    @property
    def has_interior(self) -> bool:
        """False: every row belongs on the sphere."""
        return False

    def normals(self, w: Tensor) -> Tensor:
        """Directions of the rows."""
        return _sphere_normals(w, 0.0)


@dataclass(frozen=True, eq=False)
class MinMaxNorm(RowConstraint):
    """Norm of each row between `min_value` and `max_value`, as in Keras.

    Keras's `axis` is `rows` here: its `axis=0` of a dense kernel is `rows="out"`, the default. A
    zero row, which has no direction, becomes constant. With `rate` < 1 a step goes only that share
    of the way to the set, `rate * clip(|w_g|) + (1 - rate) * |w_g|`, which is not a projection.

    The set is not convex. In a diagonal metric the projection is exact unless a row is shorter
    than `min_value` and 0 where its steps are largest.

    Args:
        min_value: smallest Euclidean norm of a row, >= 0.
        max_value: largest, > 0 and >= `min_value`.
        rate: share of the way to the set that one step covers, above 0 and at most 1.

    Reference: Salimans and Kingma (2016), https://arxiv.org/abs/1602.07868; Chollet et al.,
    https://keras.io/api/layers/constraints/.

    >>> MinMaxNorm(1.0, 2.0).prox(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), step=1.0)
    tensor([[1.2000, 1.6000],
            [0.6000, 0.8000]])
    """

    min_value: float = 0.0
    max_value: float = 1.0
    rate: float = 1.0

    convex: ClassVar[bool] = False
    rows: ClassVar[str] = "out"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "max_value", 0)
        most = self.max_value
        allowed = f"between 0 and max_value ({most!r})"
        check_field(self, "min_value", allowed, lambda least: 0 <= least <= most)
        check_field(self, "rate", "above 0 and at most 1", lambda rate: 0 < rate <= 1)

    def _project(self, rows: Tensor, metric: Tensor | None) -> Tensor:
        inside = _scale_to(rows, metric, self.max_value, inside=True)
        if self.min_value:
            outward = _scale_to(_with_direction(rows), metric, self.min_value, inside=False)
            inside = torch.where(row_norms(rows) < self.min_value, outward, inside)
        return inside if self.rate == 1 else rows.lerp(inside, self.rate)

    @property
    def has_interior(self) -> bool:
        """Whether lengths may differ."""
        return self.min_value < self.max_value

    def normals(self, w: Tensor) -> Tensor:
        """Directions of the rows on the outer sphere, and against them on the inner one."""
        norms = row_norms(as_rows(w))
        inner = norms <= self.min_value * (1 + 8 * torch.finfo(norms.dtype).eps)
        outward = as_rows(_sphere_normals(w, self.max_value))
        return torch.where(inner, -as_rows(_sphere_normals(w, 0.0)), outward).reshape(w.shape)


@dataclass(frozen=True, eq=False)
class NonNegative(Constraint):
    """No entry below 0; exact, and the same in any diagonal metric.

    Reference: Lee and Seung (1999), https://doi.org/10.1038/44565.

    >>> NonNegative().prox(torch.tensor([-1.0, 2.0]), step=1.0)
    tensor([0., 2.])
    """

    elementwise: ClassVar[bool] = True
    real: ClassVar[bool] = True

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """max(w, 0)."""
        return keep_nonfinite(w.clamp_min(0), w)

    def normals(self, w: Tensor) -> Tensor:
        """-1 at 0."""
        return -(w <= 0).to(w.dtype)


@dataclass(frozen=True, eq=False)
class Box(Constraint):
    """Every entry between `low` and `high`; exact, and the same in any diagonal metric.

    Args:
        low: smallest entry.
        high: largest entry, >= low.

    Reference: Arjovsky, Chintala and Bottou (2017), https://arxiv.org/abs/1701.07875 (clipping).

    >>> Box(-1.0, 1.0).prox(torch.tensor([-3.0, 0.5]), step=1.0)
    tensor([-1.0000,  0.5000])
    """

    low: float = -1.0
    high: float = 1.0

    elementwise: ClassVar[bool] = True
    real: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("low", "high"):
            allowed = f"a number up to {MAX_FLOAT32:g} in size, or infinite"
            check_field(self, name, allowed, lambda x: abs(x) <= MAX_FLOAT32 or abs(x) == math.inf)
        if not self.low <= self.high:
            raise ValueError(f"Box: low must be <= high, received {self.low!r} and {self.high!r}")

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """w clipped."""
        return keep_nonfinite(w.clamp(self.low, self.high), w)

    def normals(self, w: Tensor) -> Tensor:
        """1 at the upper end, -1 at the lower one."""
        return (w >= self.high).to(w.dtype) - (w <= self.low).to(w.dtype)


@dataclass(frozen=True, eq=False)
class Simplex(RowConstraint):
    """Entries >= 0 that sum to `total`; exact in a diagonal metric.

    Args:
        total: > 0.

    Reference: Duchi et al. (2008), https://doi.org/10.1145/1390156.1390191.

    >>> Simplex(1.0).prox(torch.tensor([1.0, 0.8, -1.0]), step=1.0)
    tensor([0.6000, 0.4000, 0.0000])
    """

    total: float = 1.0

    real: ClassVar[bool] = True
    above: ClassVar[dict[str, float]] = {"total": 0}

    def _project(self, rows: Tensor, metric: Tensor | None) -> Tensor:
        return keep_nonfinite(_onto_simplex(rows, metric, self.total), rows)


@dataclass(frozen=True, eq=False)
class L1Ball(RowConstraint):
    """Sum of absolute values at most `radius`: the constrained lasso; exact in a diagonal metric.

    Args:
        radius: > 0.

    Reference: Duchi et al. (2008), https://doi.org/10.1145/1390156.1390191.

    >>> L1Ball(1.0).prox(torch.tensor([-1.0, 0.8, 0.1]), step=1.0)
    tensor([-0.6000,  0.4000,  0.0000])
    """

    radius: float = 1.0

    above: ClassVar[dict[str, float]] = {"radius": 0}

    def _project(self, rows: Tensor, metric: Tensor | None) -> Tensor:
        size = rows.abs()
        onto = torch.sgn(rows) * _onto_simplex(size, metric, self.radius)
        inside = size.sum(1, keepdim=True) <= self.radius
        return torch.where(inside, rows, onto)


def _onto_simplex(rows: Tensor, metric: Tensor | None, total: float) -> Tensor:
    """max(row - level*metric, 0), the level such that the row sums to `total`."""
    steps = torch.ones_like(rows) if metric is None else metric
    order = (rows / steps).argsort(dim=1, descending=True)
    sums = rows.gather(1, order).cumsum(1)
    # over any subset of the row the sum is at most the whole: the level is the largest of these
    levels = (sums - total) / steps.gather(1, order).cumsum(1)
    return (rows - levels.amax(1, keepdim=True) * steps).clamp_min(0)


@dataclass(frozen=True, eq=False)
class SpectralBall(Constraint):
    """Largest singular value at most `radius`: a bound on a layer's Lipschitz constant.

    w is viewed as a matrix, with all dimensions but the first as columns. The projection is exact
    for a single step; a per-weight step is refused.

    Args:
        radius: > 0.

    Reference: Gouk et al. (2021), https://doi.org/10.1007/s10994-020-05929-w.

    >>> SpectralBall(1.0).prox(torch.diag(torch.tensor([3.0, 0.5])), step=1.0).diag()
    tensor([1.0000, 0.5000])
    """

    radius: float = 1.0

    diagonal: ClassVar[bool] = False
    rows: ClassVar[str] = "out"
    above: ClassVar[dict[str, float]] = {"radius": 0}

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Singular values clipped at the radius."""
        refuse_metric(self, step)
        return with_singular_values(w, lambda s: s.clamp_max(self.radius))


@dataclass(frozen=True, eq=False)
class TopK(RowConstraint):
    """At most `k` non-zero entries: hard sparsity; exact in a diagonal metric.

    The set is not convex. Among equal entries the first one found is kept.

    Args:
        k: how many entries of a row may be non-zero, >= 0; all, if the row has no more than k.

    Reference: Blumensath and Davies (2009), https://doi.org/10.1016/j.acha.2009.04.002.

    >>> TopK(1).prox(torch.tensor([-3.0, 2.0, 0.5]), step=1.0)
    tensor([-3.,  0.,  0.])
    """

    k: int = 1

    convex: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "k", ">= 0", lambda k: is_count(k, 0), whole=True)

    def _project(self, rows: Tensor, metric: Tensor | None) -> Tensor:
        cost = rows.abs() if metric is None else rows.abs() / metric.sqrt()
        kept = cost.topk(min(self.k, rows.shape[1]), dim=1).indices
        return rows * torch.zeros_like(rows).scatter(1, kept, 1.0)
