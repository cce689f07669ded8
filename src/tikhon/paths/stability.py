"""Choosing a support without a validation set: stability selection, the universal threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tikhon.data.batches import pair
from tikhon.errors import InputError
from tikhon.paths.exact import LinearPath, strength_grid
from tikhon.paths.linear import LinearProblem
from tikhon.paths.penalised import FeaturePenalty
from tikhon.paths.solver import solve
from tikhon.penalties import L1, GroupLasso, GroupMCP, Penalty


@dataclass(frozen=True, eq=False)
class Stability:
    """How often each feature is in the support over random halves of the rows.

    `frequencies` is (strengths, features); `selected` marks features whose largest frequency
    exceeds `threshold`; `bound` is the expected number of false selections (Meinshausen and
    Buhlmann's inequality, for exchangeable features).
    """

    strengths: tuple[float, ...]
    frequencies: Tensor
    threshold: float
    bound: float

    @property
    def highest(self) -> Tensor:
        """Each feature's largest frequency over the strengths."""
        return self.frequencies.amax(0)

    @property
    def selected(self) -> Tensor:
        """Bool mask over features."""
        return self.highest >= self.threshold


def stability(
    train: Any,
    penalty: Penalty | None = None,
    *,
    draws: int = 100,
    threshold: float = 0.7,
    strengths: int = 20,
    smallest: float = 0.2,
    seed: int = 0,
) -> Stability:
    """Selection frequencies of features over random halves of the rows (linear models).

    Args:
        train: (x, y) or whatever `path` takes; standardise the columns first.
        penalty: a Proximable, by default L1; its own strength is ignored.
        draws: how many halves, taken as complementary pairs (an even number).
        threshold: frequency in (0.5, 1) above which a feature counts as selected.
        strengths, smallest: the range of strengths, as in `path`.
        seed: of the halves.

    Reference: Meinshausen and Buhlmann (2010), https://doi.org/10.1111/j.1467-9868.2010.00740.x;
    complementary pairs: Shah and Samworth (2013).

    >>> x = torch.randn(100, 30, generator=torch.Generator().manual_seed(0))
    >>> y = 3 * x[:, 4] - 2 * x[:, 7]
    >>> stability((x, y), draws=20).selected.nonzero().squeeze().tolist()
    [4, 7]
    """
    x, y = pair(train, name="train")
    if not 0.5 < threshold < 1:
        raise InputError(f"threshold is a frequency in (0.5, 1), received {threshold}")
    if draws < 2 or draws % 2:
        raise InputError(f"draws come in complementary pairs: an even number, not {draws}")
    if len(x) < 4:
        raise InputError(f"stability needs at least 4 rows to halve, received {len(x)}")
    path = LinearPath.of(None, x, y, penalty or L1(), weights=None, positive=False, debias=False)
    grid = strength_grid(path.problem(), path.penalty, strengths, smallest)
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
    """Pairs of complementary random halves, classes in proportion."""
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


def universal_strength(
    problem: LinearProblem,
    penalty: FeaturePenalty,
    *,
    level: float = 0.05,
    draws: int = 2_000,
    seed: int = 0,
) -> float:
    """The quantile-universal threshold: the strength that keeps pure noise out.

    With no dependence at all, the model stays empty with probability 1 - `level`: the quantile of
    the penalty's `max_strength` over simulated responses. For the squared loss the noise level is
    the fixed point of the residual's (the square-root lasso), so none has to be given. Raises
    `InputError` for a penalty whose threshold is not that of one entry or one row.

    Reference: Giacobino, Sardy, Diaz-Rodriguez and Hengartner (2017), Quantile universal
    threshold; Sun and Zhang (2012), Scaled sparse linear regression.
    """
    if not 0 < level < 1:
        raise InputError(f"level is a probability in (0, 1), received {level}")
    alike = penalty.layout == "entries" or isinstance(penalty.penalty, GroupLasso | GroupMCP)
    weighted = getattr(penalty.penalty, "weights", None) is not None
    if not alike or weighted or penalty.positive or problem.weights is not None:
        raise InputError(
            f"strengths='universal' is for L1, ElasticNet, MCP, SCAD, LogSum, GroupLasso and "
            f"GroupMCP without weights or signs, not for this {penalty.name}: use folds"
        )
    rows = len(problem.x)
    generator = torch.Generator().manual_seed(seed)

    # the threshold of a gradient is that of its largest entry or row: found once, then scaled
    unit = torch.zeros(problem.outputs, problem.x.shape[1], dtype=torch.float64)
    unit[0, 0] = 1.0
    factor = penalty.max_strength(unit, problem.largest_step)

    def highest(residuals: Tensor) -> Tensor:
        """(draws, rows, outputs) -> (draws,)."""
        gradients = torch.einsum("dno,np->dop", residuals, problem.x) / rows
        sizes = gradients.abs() if penalty.layout == "entries" else gradients.norm(dim=1)
        return factor * sizes.flatten(1).amax(1)

    target = None if problem.kind == "squared" else _indicators(problem)
    found = []
    for _ in range(math.ceil(draws / 100)):
        if target is None:
            shape = (100, rows, problem.outputs)
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            noise -= noise.mean(1, keepdim=True)
            noise /= noise.square().mean((1, 2), keepdim=True).sqrt()
        else:
            noise = target[torch.randint(rows, (100, rows), generator=generator)]
            noise = noise - noise.mean(1, keepdim=True)
        found.append(highest(noise))
    threshold = float(torch.cat(found).quantile(1 - level))
    return threshold if target is not None else _noise_fixed_point(problem, penalty, threshold)


def _indicators(problem: LinearProblem) -> Tensor:
    if problem.kind == "multinomial":
        return torch.nn.functional.one_hot(problem.y, problem.outputs).double()
    return problem.y


def _noise_fixed_point(problem: LinearProblem, penalty: FeaturePenalty, pivot: float) -> float:
    """strength = pivot * standard deviation of the residual that it leaves."""
    fit = None
    spread = float(problem.y.square().mean().sqrt())
    for _ in range(50):
        fit = solve(problem, penalty.at(pivot * spread), start=fit, tolerance=1e-6)
        left = problem.y - problem.x @ fit.weight.T - fit.bias
        updated = float(left.square().mean().sqrt())
        if abs(updated - spread) <= 1e-4 * spread:
            break
        spread = updated
    return pivot * spread
