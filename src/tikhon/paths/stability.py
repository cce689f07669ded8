"""Stability selection: choose a support without validation rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tikhon.data.batches import one_tensor, pair
from tikhon.data.nested import keep_float64
from tikhon.errors import InputError
from tikhon.paths.linear_path import LinearPath, check_strengths, strength_grid
from tikhon.paths.solver import solve
from tikhon.penalties import L1, Penalty


@dataclass(frozen=True, eq=False)
class Stability:
    """Selection frequency of each feature over random halves of the rows.

    `frequencies` is (strengths, features); `selected` marks features whose highest frequency
    reaches `threshold`; `bound` is the expected number of false selections (by Meinshausen and
    Buhlmann's inequality, for exchangeable features).
    """

    strengths: tuple[float, ...]
    frequencies: Tensor
    threshold: float
    bound: float

    @property
    def highest(self) -> Tensor:
        """Highest frequency of each feature over strengths."""
        return self.frequencies.amax(0)

    @property
    def selected(self) -> Tensor:
        """Bool mask over features."""
        return self.highest >= self.threshold


def stability(
    train: object,
    penalty: Penalty | None = None,
    *,
    draws: int = 100,
    threshold: float = 0.7,
    strengths: int = 20,
    smallest: float = 0.2,
    seed: int = 0,
) -> Stability:
    """Compute selection frequencies of features over random halves of the rows (linear models).

    Args:
        train: (x, y) or anything `path` takes; standardise the columns first.
        penalty: a Proximable, by default L1; its strength is ignored.
        draws: number of halves, drawn as complementary pairs (an even number).
        threshold: frequency in (0.5, 1) from which a feature is selected.
        strengths, smallest: the range of strengths, as for `path`.
        seed: of the halves.

    Reference: Meinshausen and Buhlmann (2010), https://doi.org/10.1111/j.1467-9868.2010.00740.x;
    complementary pairs: Shah and Samworth (2013).

    >>> x = torch.randn(100, 30, generator=torch.Generator().manual_seed(0))
    >>> y = 3 * x[:, 4] - 2 * x[:, 7]
    >>> stability((x, y), draws=20).selected.nonzero().squeeze().tolist()
    [4, 7]
    """
    x, y = pair(keep_float64(train), name="train")
    x = one_tensor(x, name="train", verb="stability")
    if not 0.5 < threshold < 1:
        raise InputError(f"threshold is a frequency in (0.5, 1), received {threshold}")
    if draws < 2 or draws % 2:
        raise InputError(f"draws come in complementary pairs: an even number, not {draws}")
    if len(x) < 4:
        raise InputError(f"stability needs at least 4 rows to halve, received {len(x)}")
    path = LinearPath.of(None, x, y, penalty or L1(), weights=None, positive=False, debias=False)
    count = check_strengths(strengths, smallest)
    grid = strength_grid(path.problem(), path.penalty, count, smallest)
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(len(grid), x[0].numel(), dtype=torch.float64)
    sizes = []
    for half in _halves(path.targets.codes, draws, generator):
        problem = path.problem(half)
        fit, union = None, torch.zeros(counts.shape[1], dtype=torch.bool)
        for i, strength in enumerate(grid):
            fit = solve(problem, path.penalty.at(strength), start=fit, tolerance=1e-5)
            support = (fit.weight != 0).any(0)
            counts[i] += support
            union |= support
        sizes.append(int(union.sum()))
    mean = sum(sizes) / len(sizes)
    bound = mean**2 / ((2 * threshold - 1) * counts.shape[1])
    return Stability(tuple(grid), counts / draws, threshold, bound)


def _halves(y: Tensor, draws: int, generator: torch.Generator) -> list[Tensor]:
    """Return pairs of complementary random halves, stratified by class."""
    parts = [torch.arange(len(y))]
    if not y.is_floating_point():
        parts = [(y == c).nonzero().squeeze(1) for c in torch.unique(y)]
    halves = []
    for _ in range(draws // 2):
        shuffled = [part[torch.randperm(len(part), generator=generator)] for part in parts]
        first = torch.cat([part[: (len(part) + 1) // 2] for part in shuffled])
        second = torch.cat([part[len(part) // 2 :] for part in shuffled])
        halves += [first, second]
    return halves
