"""Fit linear models exactly, with the solver of `tikhon.path`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tikhon.paths.linear import Fit, Kind, LinearProblem
from tikhon.paths.penalised import FeaturePenalty
from tikhon.paths.solver import solve
from tikhon.penalties import L2
from tikhon.penalties.base import Proximable
from tikhon.sklearn.learning import Rows
from tikhon.sklearn.network import Network

MOST_ENTRIES = 50_000_000  # of X in float64: 400 MB
LARGEST_SIDE = 2_000  # of a square matrix for an eigenvalue decomposition
CONVERGED = 1e-6  # of the residual, relative to the largest possible gradient


def solvable(shape: tuple[int, int]) -> bool:
    """Return whether the exact solver is faster than training, for X of this shape."""
    return shape[0] * shape[1] <= MOST_ENTRIES and min(shape) <= LARGEST_SIDE


def solve_exactly(
    network: Network, rows: Rows, kind: Kind, penalty: Proximable | None, *, again: bool
) -> tuple[float, bool]:
    """Write the minimiser of mean loss plus penalty into a network of one layer.

    Returns the objective and whether the solver converged. `again` starts from the network's
    weights. Group penalties see one row of weights for each feature.
    """
    x = rows.x.toarray() if hasattr(rows.x, "toarray") else np.array(rows.x)
    scaled = (torch.from_numpy(x).double() - network.shift.double()) / network.scale.double()
    y = torch.from_numpy(np.asarray(rows.y))
    codes = y.argmax(1) if kind == "multinomial" else y
    problem = LinearProblem(
        scaled, codes, kind, outputs=y.shape[1], weights=torch.from_numpy(rows.weights)
    )
    layer: Any = network.linear[0]
    start = None
    if again:
        weight, raw = (p.detach().double() for p in (layer.weight, layer.bias))
        start = Fit(weight, problem.centred_bias(weight, raw), float("inf"), 0)
    penalty = penalty or L2(0.0)
    by_feature = FeaturePenalty(penalty, "entries" if penalty.elementwise else "features")
    solution = solve(problem, by_feature, start=start)
    with torch.no_grad():
        layer.weight.copy_(solution.weight)
        layer.bias.copy_(problem.raw_bias(solution))
    loss = problem.loss(solution.weight, solution.bias)
    return float(loss + by_feature.value(solution.weight)), solution.residual < CONVERGED
