"""Optimality of a penalised problem `min loss(w) + penalty(w)`, from the prox alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tikhon.penalties.base import Proximable, upcast


def residual(
    penalty: Proximable, w: Tensor, gradient: Tensor, step: float | Tensor = 1.0
) -> Tensor:
    """How far w is from a stationary point: `|(w - prox(w - step*gradient, step)) / step|`.

    Args:
        penalty: the penalty (or constraint).
        w: the weights.
        gradient: gradient of the loss at w, w's shape.
        step: > 0, a number or a tensor of w's shape; 0 residual means optimal for every step.

    Reference: Beck and Teboulle (2009), https://doi.org/10.1137/080716542.

    >>> from tikhon.penalties import L1
    >>> residual(L1(1.0), torch.zeros(2), torch.tensor([0.5, -1.0]))
    tensor(0.)
    """
    moved = penalty.prox(w - step * gradient, step)
    return torch.linalg.vector_norm(upcast((w - moved) / step))


def max_strength(penalty: Proximable, gradient: Tensor, *, step: float = 1e-6) -> float:
    """Smallest strength at which w = 0 is a stationary point: where a path begins.

    Args:
        penalty: the penalty; its own strength is ignored.
        gradient: gradient of the loss at w = 0 (with the intercept fitted), w's shape.
        step: > 0; it matters only for concave penalties, whose prox gives a stationary point for
            a small step and jumps for a large one.

    Found by bisection on `prox(-step*gradient, step) == 0`, to the last digits of float64.
    For `L1` it is max|gradient|, for `ElasticNet` that over l1_ratio, for `GroupLasso` the largest
    row norm. ValueError for a penalty without zeros (L2) and for a constraint.

    Reference: Friedman, Hastie and Tibshirani (2010), https://doi.org/10.18637/jss.v033.i01.

    >>> from tikhon.penalties import L1
    >>> round(max_strength(L1(), torch.tensor([0.5, -2.0])), 12)
    2.0
    """
    name = type(penalty).__name__
    point = -step * gradient.detach().double()
    if penalty.constraint:
        raise ValueError(f"{name} is a constraint: it has no strength")
    if not point.isfinite().all():
        raise ValueError(f"max_strength of {name}: the gradient has NaN or infinite entries")

    def zeroed(strength: float) -> bool:
        return not penalty.with_strength(strength).prox(point, step).any()

    if zeroed(0.0):
        return 0.0
    low, high = 0.0, float(torch.linalg.vector_norm(point)) / step
    ceiling = high * 1e12
    while not zeroed(high):
        low, high = high, 2 * high
        if high > ceiling:
            raise ValueError(
                f"no strength of {name} makes all weights zero, so it has no max_strength; give "
                f"the range of strengths yourself"
            )
    while (middle := (low + high) / 2) not in (low, high) and high - low > 1e-14 * high:
        low, high = (low, middle) if zeroed(middle) else (middle, high)
    return high


def moreau_envelope(penalty: Proximable, w: Tensor, step: float | Tensor) -> Tensor:
    """Smallest value of `1/2 (z-w)' diag(1/step) (z-w) + penalty(z)`, 0-d.

    For a convex penalty it is differentiable, with gradient `(w - prox(w, step)) / step`.

    Args:
        penalty: the penalty (or constraint).
        w: the weights.
        step: > 0, a number or a tensor of w's shape.

    Reference: Moreau (1965), https://doi.org/10.24033/bsmf.1625.

    >>> from tikhon.penalties import L1
    >>> moreau_envelope(L1(1.0), torch.tensor([0.5, 3.0]), 1.0)
    tensor(2.6250)
    """
    nearest = penalty.prox(w, step)
    distance = upcast(nearest - w).square() / (2 * step)
    return distance.sum() + penalty.value(nearest)
