"""Decide how many units of each layer to keep, and which."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Per = Literal["model", "layer"]
Counts = list[int]  # units kept in each layer
# of a model with these counts; increasing in each of them
CostFunction = Callable[[Counts], float]

_SHIFT = 16  # ignored bits of a float32: sizes within 0.8 % count as equal
_CLASSES = 1 << (31 - _SHIFT)


@dataclass(frozen=True, eq=False)
class Sizes:
    """Sizes of one layer's units, sorted into classes.

    The score of a unit is its squared size over the sum of those in its layer that are not smaller
    (Lee et al. 2021): removing by smallest score removes the smallest fraction of what each layer
    still has. Scores are per class, so no layer needs sorting.

    Attributes:
        sizes: (units,).
        classes: of each unit, larger for larger sizes, (units,).
        found: non-empty classes, largest first; `counts` and `scores` are theirs.
    """

    sizes: Tensor
    classes: Tensor
    found: Tensor
    counts: Tensor
    scores: Tensor

    @classmethod
    def of(cls, sizes: Tensor) -> Sizes:
        """Build from norms, (units,).

        >>> Sizes.of(torch.tensor([3.0, 1.0, 1.0])).scores
        tensor([1.0000, 0.0911], dtype=torch.float64)
        """
        sizes = sizes.float().nan_to_num(0.0)
        classes = sizes.view(torch.int32) >> _SHIFT
        counts = torch.bincount(classes, minlength=_CLASSES)
        found = counts.nonzero().flatten().flip(0)
        middles = ((found.int() << _SHIFT) + (1 << (_SHIFT - 1))).view(torch.float32).double()
        squares = torch.where(found > 0, middles, 0.0).square()
        counts = counts[found]
        left = (squares * counts).cumsum(0).clamp_min(1e-300)
        return cls(sizes, classes, found, counts, squares / left)

    def largest(self, count: int, *, exact: bool = True) -> Tensor:
        """Return a mask of the `count` largest, (units,); unless `exact`, of up to 1 % more."""
        within = self.counts.cumsum(0)
        place = int(torch.searchsorted(within, count))  # of the class to split
        over = int(within[place]) - count
        if over == 0 or not (exact or over > len(self.sizes) // 100):
            return self.classes >= self.found[place]
        keep = self.classes > self.found[place]
        members = (self.classes == self.found[place]).nonzero().flatten()
        missing = int(self.counts[place]) - over
        keep[members[self.sizes[members].topk(missing).indices]] = True
        return keep


class GlobalRanking:
    """The classes of all layers, by descending score.

    With `costs` (of a unit in each layer) scores are divided by them.
    """

    def __init__(self, layers: Sequence[Sizes], costs: Sequence[float] | None = None) -> None:
        self.layers = layers
        costs = costs or [1.0] * len(layers)
        first = [torch.full((1,), torch.inf).double() for _ in layers]  # each layer keeps one unit
        scores = torch.cat(
            [torch.cat([top, x.scores.cpu() / c]) for top, x, c in zip(first, layers, costs)]
        )
        counts = torch.cat([_split_first_unit(x.counts.cpu()) for x in layers])
        owners = torch.cat([torch.full((len(x.counts) + 1,), i) for i, x in enumerate(layers)])
        order = scores.argsort(descending=True, stable=True)
        self._counts, self._owners = counts[order], owners[order]
        self._within = self._counts.cumsum(0)

    def keep(self, total: int) -> Counts:
        """Return how many units of each layer are among the `total` best of the model."""
        total = max(total, len(self.layers))
        place = int(torch.searchsorted(self._within, total))
        taken = self._counts[: place + 1].clone()
        taken[place] -= self._within[place] - total
        found = torch.zeros(len(self.layers), dtype=torch.long)
        return found.index_add_(0, self._owners[: place + 1], taken).tolist()


def units_to_keep(
    layers: Sequence[Sizes], share: float, *, per: Per, cost_function: CostFunction = sum
) -> Counts:
    """Return how many units of each layer to keep when removing `share` of price or units.

    Exact: over the model the price kept is at most `1 - share` of the total, within one unit. Each
    layer keeps at least one unit.

    >>> layers = [Sizes.of(torch.tensor([3.0, 1.0])), Sizes.of(torch.tensor([2.0, 0.1]))]
    >>> units_to_keep(layers, 0.25, per="model"), units_to_keep(layers, 0.5, per="layer")
    ([2, 1], [1, 1])
    """
    units = [len(x.sizes) for x in layers]
    if per == "layer":
        return [max(1, n - round(share * n)) for n in units]
    if cost_function is sum:
        return GlobalRanking(layers).keep(sum(units) - round(share * sum(units)))
    whole = cost_function(units)
    costs = [
        whole - cost_function([k - (i == j) for j, k in enumerate(units)])
        for i in range(len(units))
    ]
    order = GlobalRanking(layers, [max(c, 1e-9 * whole) for c in costs])
    budget = (1 - share) * whole
    totals = range(len(layers), sum(units) + 1)
    fitting = bisect.bisect_right(totals, budget, key=lambda n: cost_function(order.keep(n)))
    return order.keep(totals[max(0, fitting - 1)])


def round_to_multiples(
    counts: Counts,
    units: Counts,
    multiple: int,
    *,
    per: Per,
    final: bool,
    cost_function: CostFunction = sum,
) -> Counts:
    """Round counts to multiples, in layers with enough units.

    Rounded up while layers still lose units; at the end to the nearest, in each layer or such that
    the price is close to that of `counts`: down, and up first in the layers that lose most.

    >>> round_to_multiples([11, 19], [16, 32], 8, per="layer", final=True)
    [8, 16]
    """
    large = [n >= multiple for n in units]
    up = [
        min(n, -(-k // multiple) * multiple) if b else k for k, n, b in zip(counts, units, large)
    ]
    if not final:
        return up
    down = [max(multiple, k - k % multiple) if b else k for k, b in zip(counts, large)]
    if per == "layer":
        return [a if k - b > a - k else b for k, a, b in zip(counts, up, down)]
    aim, found = cost_function(counts), down
    for i in sorted(range(len(counts)), key=lambda i: down[i] - counts[i]):
        trial = [*found[:i], up[i], *found[i + 1 :]]
        if abs(cost_function(trial) - aim) < abs(cost_function(found) - aim):
            found = trial
    return found


def _split_first_unit(counts: Tensor) -> Tensor:
    rest = counts.clone()
    rest[0] -= 1
    return torch.cat([torch.ones(1, dtype=torch.long), rest])
