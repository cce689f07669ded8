"""The quantile-universal threshold: the strength that excludes pure noise."""

from __future__ import annotations

import torch
from torch import Tensor

from tikhon.errors import InputError
from tikhon.paths.linear import LinearProblem
from tikhon.paths.penalised import FeaturePenalty
from tikhon.paths.solver import solve
from tikhon.penalties import GroupLasso, GroupMCP

_LEVEL = 0.05  # probability of selecting from pure noise
_DRAWS = 2_000  # simulated responses


def universal_strength(
    problem: LinearProblem,
    penalty: FeaturePenalty,
    *,
    seed: int = 0,
) -> float:
    """Compute the quantile-universal threshold: the strength that excludes pure noise.

    If targets do not depend on the features, the model stays empty with probability 0.95: it is a
    quantile of the penalty's `max_strength` over simulated responses. For squared loss the noise
    level is estimated as a fixed point of the residual's (the square-root lasso). Raises
    `InputError` for a penalty whose threshold is not that of a single entry or row.

    Reference: Giacobino, Sardy, Diaz-Rodriguez and Hengartner (2017), Quantile universal
    threshold; Sun and Zhang (2012), Scaled sparse linear regression.
    """
    is_supported = penalty.layout == "entries" or isinstance(
        penalty.penalty, GroupLasso | GroupMCP
    )
    weighted = getattr(penalty.penalty, "weights", None) is not None
    if not is_supported or weighted or penalty.positive or problem.weights is not None:
        raise InputError(
            f"strengths='universal' is for L1, ElasticNet, MCP, SCAD, LogSum, GroupLasso and "
            f"GroupMCP without weights or signs, not for this {penalty.name}: use folds"
        )
    rows = len(problem.x)
    generator = torch.Generator().manual_seed(seed)

    # a gradient's threshold is that of its largest entry or row: computed once and scaled
    unit = torch.zeros(problem.outputs, problem.x.shape[1], dtype=torch.float64)
    unit[0, 0] = 1.0
    factor = penalty.max_strength(unit, problem.largest_step)

    def largest_threshold(residuals: Tensor) -> Tensor:
        """Map residuals (draws, rows, outputs) to thresholds (draws,)."""
        gradients = torch.einsum("dno,np->dop", residuals, problem.x) / rows
        sizes = gradients.abs() if penalty.layout == "entries" else gradients.norm(dim=1)
        return factor * sizes.flatten(1).amax(1)

    target = None if problem.kind == "squared" else _indicators(problem)
    found = []
    for _ in range(_DRAWS // 100):
        if target is None:
            shape = (100, rows, problem.outputs)
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            noise -= noise.mean(1, keepdim=True)
            noise /= noise.square().mean((1, 2), keepdim=True).sqrt()
        else:
            noise = target[torch.randint(rows, (100, rows), generator=generator)]
            noise = noise - noise.mean(1, keepdim=True)
        found.append(largest_threshold(noise))
    threshold = float(torch.cat(found).quantile(1 - _LEVEL))
    return threshold if target is not None else _noise_fixed_point(problem, penalty, threshold)


def _indicators(problem: LinearProblem) -> Tensor:
    if problem.kind == "multinomial":
        return torch.nn.functional.one_hot(problem.y, problem.outputs).double()
    return problem.y


def _noise_fixed_point(problem: LinearProblem, penalty: FeaturePenalty, pivot: float) -> float:
    """Solve strength = pivot * standard deviation of the residual at that strength."""
    fit = None
    spread = float(problem.y.square().mean().sqrt())
    for _ in range(50):
        fit = solve(problem, penalty.at(pivot * spread), start=fit, tolerance=1e-6)
        residuals = problem.y - problem.x @ fit.weight.T - fit.bias
        updated = float(residuals.square().mean().sqrt())
        if abs(updated - spread) <= 1e-4 * spread:
            break
        spread = updated
    return pivot * spread
