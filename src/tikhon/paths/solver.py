"""Solve penalised linear models exactly: proximal steps, then Newton steps on the support."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tikhon.paths.active_set import minimize_on_active_set
from tikhon.paths.linear import SEPARATED, Fit, LinearProblem
from tikhon.paths.penalised import FeaturePenalty
from tikhon.penalties import L2

LARGEST_NEWTON = 1000  # unknowns; beyond this the dense Hessian costs more than it saves
DAMPING = 1e-10  # of Newton steps, relative to each diagonal entry
RIDGE = 1e-8  # for unpenalised models, relative to the mean curvature
TOLERANCE = 1e-9  # of the residual, relative to the largest possible gradient


def solve(
    problem: LinearProblem,
    penalty: FeaturePenalty,
    *,
    start: Fit | None = None,
    tolerance: float = TOLERANCE,
    max_steps: int = 20_000,
) -> Fit:
    """Minimise loss plus penalty to a residual (`problem.distance`) below `tolerance`.

    Blocks of accelerated proximal steps with restarts (Beck and Teboulle 2009; O'Donoghue and
    Candes 2015) find the support, then Newton steps on it, accepted only if they lower the
    objective, make the solution exact. Penalties that are not sums over features use proximal
    steps only. The lasso and the elastic net of least squares are first solved by an active set.
    """
    start = start or problem.empty()
    weight, bias = start.weight, start.bias
    if (found := _solve_active_set(problem, penalty, weight, tolerance)) is not None:
        residual = _residual(problem, penalty, found, problem.start_bias)
        if residual < tolerance:
            return Fit(found, problem.start_bias, residual, 0)
    if penalty.positive:
        weight = weight.clamp_min(0)
    max_steps = max_steps if penalty.penalty.convex else max_steps // 10
    steps_taken, block = 0, 5
    while True:
        residual = _residual(problem, penalty, weight, bias)
        if (
            residual < tolerance
            or steps_taken >= max_steps
            or _diverges(problem, penalty, weight, bias)
        ):
            return Fit(weight, problem.centred(bias), residual, steps_taken)
        weight, bias = _accelerated(problem, penalty, weight, bias, block)
        for _ in range(4 if penalty.separable else 0):
            before = weight
            weight, bias = _newton(problem, penalty, weight, bias)
            if problem.move(weight - before) < tolerance:
                break
        steps_taken += block
        block = min(3 * block // 2, 640)


def _solve_active_set(
    problem: LinearProblem, penalty: FeaturePenalty, weight: Tensor, tolerance: float
) -> Tensor | None:
    """Return the weights found by `minimize_on_active_set`, solved in standardised units."""
    thresholds_and_ridges = (
        penalty.thresholds_and_ridges(weight.shape) if problem.kind == "squared" else None
    )
    if thresholds_and_ridges is None:
        return None
    scale = problem.unit / (problem.spread or 1.0)
    thresholds = thresholds_and_ridges[0] / (problem.unit * (problem.spread or 1.0))
    ridges = thresholds_and_ridges[1] / problem.unit.square()
    start = weight.clamp_min(0) if penalty.positive else weight
    found = []
    for output, (first_weight, threshold, ridge) in enumerate(
        zip(start * scale, thresholds, ridges)
    ):
        solved = minimize_on_active_set(
            problem.gram,
            output,
            first_weight.numpy(),
            threshold.numpy(),
            ridge.numpy(),
            tolerance=tolerance / 10,
            positive=penalty.positive,
        )
        if solved is None:
            return None
        found.append(torch.from_numpy(solved))
    return torch.stack(found) / scale


def _diverges(
    problem: LinearProblem, penalty: FeaturePenalty, weight: Tensor, bias: Tensor
) -> bool:
    """Return whether weights diverge: separated classes and no penalty."""
    if problem.kind == "squared" or float(penalty.penalty.strength):
        return False
    return float(problem.loss(weight, bias)) < SEPARATED / 10


def refit(problem: LinearProblem, support: Tensor) -> Fit:
    """Fit the model on a support (outputs, features) without its penalty (debiased).

    A ridge of `RIDGE` keeps it finite for collinear columns.

    Reference: Meinshausen (2007), Relaxed lasso; Belloni and Chernozhukov (2013).
    """
    weight, bias = torch.zeros_like(support, dtype=torch.float64), problem.start_bias.clone()
    strengths = RIDGE * problem.unit.square()
    penalty = FeaturePenalty(L2(1.0, weights=strengths.expand(support.shape)), "entries")
    candidate, steps = 0.0, 0
    while support.any() and steps < 50:
        updated = _newton(problem, penalty, weight, bias, mask=support, limit=None)
        candidate = problem.move(updated[0] - weight)
        weight, bias = updated
        steps += 1
        if candidate < TOLERANCE:
            break
    return Fit(weight, problem.centred(bias), candidate, steps)


def _steps(problem: LinearProblem, penalty: FeaturePenalty) -> float | Tensor:
    return problem.steps if penalty.diagonal else problem.step


def _prox_step(
    problem: LinearProblem, penalty: FeaturePenalty, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    step = _steps(problem, penalty)
    g_weight, g_bias = problem.gradient(weight, bias)
    return penalty.prox(weight - step * g_weight, step), bias - problem.bias_step * g_bias


def _residual(
    problem: LinearProblem, penalty: FeaturePenalty, weight: Tensor, bias: Tensor
) -> float:
    """Return the size of (w - prox(w - t g, t)) / t, and of the intercept's gradient."""
    new_weight, new_bias = _prox_step(problem, penalty, weight, bias)
    step = _steps(problem, penalty)
    return problem.distance((new_weight - weight) / step, (new_bias - bias) / problem.bias_step)


def _accelerated(
    problem: LinearProblem, penalty: FeaturePenalty, weight: Tensor, bias: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    step = _steps(problem, penalty)
    extrapolated = (weight, bias)
    momentum = 1.0
    for _ in range(steps):
        new = _prox_step(problem, penalty, *extrapolated)
        move = (new[0] - weight, new[1] - bias)
        ascent = ((extrapolated[0] - new[0]) * move[0] / step).sum()
        ascent = ascent + ((extrapolated[1] - new[1]) * move[1]).sum() / problem.bias_step
        if ascent > 0:  # momentum points uphill: restart
            momentum, extrapolated = 1.0, (weight, bias)
            new = _prox_step(problem, penalty, *extrapolated)
            move = (new[0] - weight, new[1] - bias)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        gain = (momentum - 1) / following
        momentum = following
        weight, bias = new
        extrapolated = (weight + gain * move[0], bias + gain * move[1])
    return weight, bias


def _newton(
    problem: LinearProblem,
    penalty: FeaturePenalty,
    weight: Tensor,
    bias: Tensor,
    *,
    mask: Tensor | None = None,
    limit: int | None = LARGEST_NEWTON,
) -> tuple[Tensor, Tensor]:
    """Take one damped Newton step over non-zero weights and intercepts."""
    projected = mask is None
    selected = weight != 0 if mask is None else mask
    columns = selected.any(0).nonzero().squeeze(1)
    free = selected[:, columns]
    count = int(free.sum())
    if count == 0 or (limit is not None and count + len(bias) > limit):
        return weight, bias
    places = free.flatten().nonzero().squeeze(1)
    penalty = penalty.only(columns)

    def scatter(theta: Tensor) -> Tensor:
        flat = theta.new_zeros(free.numel()).index_copy(0, places, theta[:count])
        return flat.view(free.shape)

    def objective(theta: Tensor) -> Tensor:
        part = scatter(theta)
        return problem.loss(part, theta[count:], columns) + penalty.value(part)

    def penalty_gradient(theta: Tensor) -> Tensor:
        return penalty.grad(scatter(theta)).flatten()[places]

    theta = torch.cat([weight[:, columns][free], bias])
    smooth = problem.hessian(weight[:, columns], bias, columns, free)
    # softmax is invariant to a common shift: along it curvature and gradient are 0
    smooth.diagonal().mul_(1 + DAMPING)
    hessian = smooth.clone()
    if penalty.layout == "entries":
        hessian.diagonal()[:count] += _diagonal(penalty_gradient, theta)[:count]
    else:
        hessian[:count, :count] += torch.func.jacrev(penalty_gradient)(theta)[:, :count]
    g_weight, g_bias = problem.gradient(weight[:, columns], bias, columns)
    gradient = torch.cat([g_weight[free] + penalty_gradient(theta), g_bias])
    factor, info = torch.linalg.cholesky_ex(hessian)
    if int(info):  # a concave penalty dominates: drop its curvature
        factor, info = torch.linalg.cholesky_ex(smooth)
    if int(info):
        return weight, bias
    direction = -torch.cholesky_solve(gradient[:, None], factor).squeeze(1)
    before = objective(theta)
    size = 1.0
    while size > 1e-3:
        candidate = theta + size * direction
        if projected:  # weights changing sign stop at zero
            crossed = candidate[:count] * theta[:count] < 0
            candidate[:count] = torch.where(crossed, 0.0, candidate[:count])
        if objective(candidate) <= before:
            weight = weight.clone()
            part = weight[:, columns]
            part[free] = candidate[:count]
            weight[:, columns] = part
            return weight, candidate[count:]
        size /= 2
    return weight, bias


def _diagonal(penalty_gradient: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """Return the derivative of an elementwise slope, as the gradient of its sum."""
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        total = penalty_gradient(theta).sum()
    if not total.requires_grad:
        return torch.zeros_like(theta)
    return torch.autograd.grad(total, theta)[0]
