"""Penalties that depend on the order of the entries: by size (SLOPE) or by place (variation).

They act on each row of w; a w with fewer than two dimensions is one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tikhon.arguments import check_field
from tikhon.errors import describe
from tikhon.penalties.base import Proximable, as_tensor, refuse_metric, upcast
from tikhon.penalties.group import as_rows


@dataclass(frozen=True, eq=False)
class SLOPE(Proximable):
    """Sorted L1: the larger a weight, the more it is penalised; equal sizes cluster.

    `strength * sum_i weights_i * |w|_(i)` for each row, |w|_(1) >= |w|_(2) >= ... The prox is
    exact for a single step; a per-weight step is refused.

    Args:
        weights: a non-increasing sequence, >= 0, one number per entry of a row. By default the
            Benjamini-Hochberg sequence: the normal quantiles at 1 - i*q/(2n).
        q: false discovery rate of that sequence, in (0, 1).

    Reference: Bogdan et al. (2015), https://doi.org/10.1214/15-AOAS842.

    >>> slope = SLOPE(1.0, weights=torch.tensor([2.0, 1.0, 0.0]))
    >>> slope.prox(torch.tensor([-4.0, 3.5, 1.0]), step=1.0)
    tensor([-2.2500,  2.2500,  1.0000])
    """

    weights: Tensor | None = None
    q: float = 0.1

    diagonal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "q", "in (0, 1), and no smaller than 1e-6", lambda q: 1e-6 <= q < 1)
        if self.weights is not None and (
            not isinstance(self.weights, Tensor) or self.weights.ndim != 1
        ):
            raise TypeError(
                f"SLOPE: weights must be a tensor, one number an entry of a row, received "
                f"{describe(self.weights)}"
            )
        if self.weights is not None and (self.weights.diff() > 0).any():
            where = int((self.weights.diff() > 0).nonzero()[0])
            raise ValueError(
                f"SLOPE: weights must not increase, received {self.weights[where]:g} before "
                f"{self.weights[where + 1]:g}; sort them in descending order"
            )

    def value(self, w: Tensor) -> Tensor:
        """strength * sum of weights times sorted sizes."""
        rows = as_rows(upcast(w))
        ordered = rows.abs().sort(dim=1, descending=True).values
        return self.lam * (ordered * self._sequence(ordered)).sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * sign(w) * the weight of its rank."""
        rows = as_rows(upcast(w))
        size = rows.abs()
        order = size.argsort(dim=1, descending=True)
        ranked = self._sequence(size).expand(size.shape)
        sequence = torch.zeros_like(size).scatter(1, order, ranked)
        return (self.lam * torch.sgn(rows) * sequence).reshape(w.shape).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """Sorted absolute values minus their weights, made non-increasing again by pooling."""
        refuse_metric(self, step)
        rows = as_rows(upcast(w))
        ordered, order = rows.abs().sort(dim=1, descending=True)
        fit = _apply_to_rows(_nonincreasing, ordered - self.lam * step * self._sequence(ordered))
        size = torch.zeros_like(ordered).scatter(1, order, fit.clamp_min(0))
        return (torch.sgn(rows) * size).reshape(w.shape).to(w.dtype)

    def _sequence(self, rows: Tensor) -> Tensor:
        n = rows.shape[1]
        if self.weights is None:
            rank = torch.arange(1, n + 1, dtype=rows.dtype, device=rows.device)
            return torch.special.ndtri(1 - rank * self.q / (2 * max(n, 1)))
        if self.weights.shape != (n,):
            raise ValueError(
                f"SLOPE: weights must have one entry for each of the {n} entries of a row, "
                f"received shape {tuple(self.weights.shape)}"
            )
        return self.weights.to(rows)


@dataclass(frozen=True, eq=False)
class TotalVariation(Proximable):
    """Sum of jumps along each row: piecewise constant filters.

    `strength * sum |w[r, i+1] - w[r, i]|`. The prox is exact for a single step; a per-weight step
    is refused.

    Reference: Rudin, Osher and Fatemi (1992), https://doi.org/10.1016/0167-2789(92)90242-F; prox:
    Hochbaum (2001), https://doi.org/10.1145/502090.502093, by splitting at level sets.

    >>> TotalVariation(1.0).prox(torch.tensor([0.0, 1.0, 5.0, 6.0]), step=1.0)
    tensor([1., 1., 5., 5.])
    """

    diagonal: ClassVar[bool] = False
    rows: ClassVar[str] = "out"
    unweighted: ClassVar[str] = "it is a sum over jumps between entries, not over entries"
    real: ClassVar[bool] = True

    def value(self, w: Tensor) -> Tensor:
        """strength * sum of absolute differences of neighbours."""
        return self.lam * as_rows(upcast(w)).diff(dim=1).abs().sum()

    def grad(self, w: Tensor) -> Tensor:
        """strength * (sign of the jump into an entry minus sign of the jump out of it)."""
        rows = as_rows(upcast(w))
        jumps = torch.sign(rows.diff(dim=1))
        edge = torch.zeros_like(rows[:, :1])
        gradient = torch.cat([edge, jumps], 1) - torch.cat([jumps, edge], 1)
        return (self.lam * gradient[:, : rows.shape[1]]).reshape(w.shape).to(w.dtype)

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """The exact total-variation denoising of each row."""
        refuse_metric(self, step)
        rows = as_rows(upcast(w))
        # sums over long rows decide which entries are equal: float64 where the device has it
        rows = rows if rows.device.type == "mps" else rows.double()
        threshold = as_tensor(self.lam * step, rows).expand(rows.shape[0], 1)
        return _apply_to_rows(_denoise, rows, threshold).reshape(w.shape).to(w.dtype)


class _RowFunction(torch.autograd.Function):
    """Calls a function of row matrices that loops on its data; under vmap, more rows."""

    @staticmethod
    def forward(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
        return function(*matrices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any):
        function, *matrices = inputs
        batched = [
            (m.expand(info.batch_size, *m.shape) if dim is None else m.movedim(dim, 0))
            for m, dim in zip(matrices, in_dims[1:])
        ]
        rows = _RowFunction.apply(function, *(m.flatten(0, 1) for m in batched))
        return rows.reshape(batched[0].shape), 0


def _apply_to_rows(function: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
    if not matrices[0].numel():
        return matrices[0]
    return _RowFunction.apply(function, *(m.detach() for m in matrices))


def _block_means(values: Tensor, starts: Tensor) -> Tensor:
    """Mean over the block that each entry belongs to; blocks begin where `starts`."""
    block = starts.cumsum(1) - 1
    sums = torch.zeros_like(values).scatter_add(1, block, values)
    sizes = torch.zeros_like(values).scatter_add(1, block, torch.ones_like(values))
    return (sums / sizes.clamp_min(1)).gather(1, block)


def _nonincreasing(values: Tensor) -> Tensor:
    """Closest non-increasing rows: all adjacent violators are pooled until there are none."""
    starts = torch.ones_like(values, dtype=torch.bool)
    while True:
        fit = _block_means(values, starts)
        violated = torch.zeros_like(starts)
        violated[:, 1:] = fit[:, 1:] > fit[:, :-1]
        if not violated.any():
            return fit
        starts &= ~violated


def _denoise(rows: Tensor, threshold: Tensor) -> Tensor:
    """argmin 1/2 |x - row|^2 + threshold * variation of x, for each row.

    A block of entries (first the row) is split into those where x exceeds the block's mean and
    the rest, by the min-marginals of a binary chain. Across a split the sign of the jump is
    known, so its term is linear: it moves the two neighbours by the threshold and the link is
    cut. A block that does not split is constant.
    """
    values = rows.clone()
    starts = torch.zeros_like(rows, dtype=torch.bool)
    starts[:, 0] = True
    noise = 4 * rows.shape[1] ** 0.5 * torch.finfo(rows.dtype).eps
    tolerance = noise * (rows.abs().amax(1, keepdim=True) + threshold)
    while True:
        means = _block_means(values, starts)
        ends = starts.roll(-1, 1)
        cost = means - values
        before = _messages(cost, starts, threshold).roll(1, 1).masked_fill(starts, 0)
        after = _messages(cost.flip(1), ends.flip(1), threshold).flip(1)
        after = after.roll(-1, 1).masked_fill(ends, 0)
        high = (cost + before + after < -tolerance).to(rows.dtype)
        jump = high[:, 1:] - high[:, :-1]
        cut = (jump != 0) & ~starts[:, 1:]
        if not cut.any():
            return means
        starts[:, 1:] |= cut
        move = threshold * jump * cut
        values[:, 1:] -= move
        values[:, :-1] += move


def _messages(cost: Tensor, starts: Tensor, threshold: Tensor) -> Tensor:
    """c_i = clip(c_{i-1} + cost_i, -threshold, threshold), c before each block being 0.

    Clipped shifts compose to clipped shifts, so the recursion is a parallel prefix scan.
    """
    limit = threshold.expand(cost.shape)
    first = cost.clamp(-limit, limit)
    shift = cost.clone()
    low, high = torch.where(starts, first, -limit), torch.where(starts, first, limit)
    reach = 1
    while reach < cost.shape[1]:
        earlier_shift, earlier_low, earlier_high = (
            x[:, :-reach].clone() for x in (shift, low, high)
        )
        a, lo, hi = shift[:, reach:].clone(), low[:, reach:].clone(), high[:, reach:].clone()
        shift[:, reach:] = earlier_shift + a
        low[:, reach:] = (earlier_low + a).clamp(lo, hi)
        high[:, reach:] = (earlier_high + a).clamp(lo, hi)
        reach *= 2
    return low
