"""Solve the lasso and the elastic net of least squares exactly, by an active-set search.

For known signs on a support the objective is quadratic and one linear system minimises it. The
search updates the support: a weight about to change sign leaves, a weight whose gradient exceeds
its threshold enters. Every step lowers the objective, so no support recurs.

Reference: Osborne, Presnell and Turlach (2000), https://doi.org/10.1093/imanum/20.3.389; Lee,
Battle, Raina and Ng (2007), Efficient sparse coding algorithms.
"""

from __future__ import annotations

import numpy as np

MAX_UNKNOWNS = 1000  # unknowns of the linear system
_MAX_STORED = 20_000_000  # column products stored at most
_MIN_ENTERING = 8  # weights entering at once, at least
_ROUNDS = 500  # of one search; few are needed from a nearby solution


class Gram:
    """Gram matrix of standardised columns, computed by column on first use.

    Computed one by one in column order, so that rounding does not depend on earlier use and a
    resumed path is identical to the bit.

    Args:
        x: (rows, features), scaled by the square roots of row weights.
        y: (rows, outputs), scaled likewise.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x = x
        self.pull = y.T @ x  # (outputs, features)
        self._position = np.full(x.shape[1], -1)
        self._rows = np.empty((0, x.shape[1]))
        self._count = 0

    def products(self, columns: np.ndarray) -> np.ndarray | None:
        """Return products (columns, features) of some columns with all; None if too many."""
        new = columns[self._position[columns] < 0]
        count = self._count + len(new)
        if count * len(self._position) > _MAX_STORED:
            return None
        if count > len(self._rows):
            more = max(count, min(2 * len(self._rows), len(self._position))) - len(self._rows)
            self._rows = np.concatenate([self._rows, np.empty((more, self.x.shape[1]))])
        for place, column in enumerate(new, self._count):
            self._rows[place], self._position[column] = self.x[:, column] @ self.x, place
        self._count = count
        return self._rows[self._position[columns]]


def minimize_on_active_set(
    gram: Gram,
    output: int,
    weight: np.ndarray,
    threshold: np.ndarray,
    ridge: np.ndarray,
    *,
    tolerance: float,
    positive: bool,
) -> np.ndarray | None:
    """Minimise `w'Gw/2 - pull'w + sum(threshold |w| + ridge w^2/2)` over weights (features,).

    `weight` is the starting point; `positive` keeps weights >= 0. None if the system is too large
    or singular, and needs another method.
    """
    pull, weight = gram.pull[output], weight.copy()
    free = (threshold == 0) & (not positive)  # unpenalised weights may change sign
    active, sign = (weight != 0) | free, np.sign(weight)
    entering = _MIN_ENTERING
    for _ in range(_ROUNDS):
        support = np.flatnonzero(active)
        products = gram.products(support) if len(support) <= MAX_UNKNOWNS else None
        if products is None:
            return None
        system = products[:, support]
        system.flat[:: len(support) + 1] += ridge[support]
        try:
            target = np.linalg.solve(system, pull[support] - threshold[support] * sign[support])
        except np.linalg.LinAlgError:
            return None
        current = weight[support]
        crossing = (target * sign[support] <= 0) & ~free[support]
        if crossing.any():
            removed = crossing & (current == 0)
            if removed.any():  # not all that entered together should have
                entering = 1
            else:
                step_share = np.where(
                    crossing, current / np.where(crossing, current - target, 1.0), np.inf
                )
                weight[support] = current + step_share.min() * (target - current)
                removed = step_share == step_share.min()
            leaving = support[removed]
            weight[leaving], sign[leaving], active[leaving] = 0.0, 0.0, False
            continue
        weight[support] = target
        slope = pull - target @ products
        violation = np.where(active, -np.inf, (slope if positive else np.abs(slope)) - threshold)
        violating = np.flatnonzero(violation > tolerance)
        if not len(violating):
            return weight
        limit = entering if entering == 1 else max(entering, len(support) // 2)
        new = violating[np.argsort(-violation[violating], kind="stable")[:limit]]
        active[new], sign[new] = True, np.sign(slope[new])
    return None
