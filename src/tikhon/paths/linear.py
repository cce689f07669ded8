"""Exact solutions of penalised linear models: accelerated proximal steps, Newton on the support.

Minimised is `mean loss + penalty.value(W)` over W (outputs, features) and a free intercept, in
float64, with the squared loss 1/(2n)|y - Xw - b|^2, the logistic or the multinomial loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tikhon.penalties import Proximable

Kind = Literal["squared", "logistic", "multinomial"]
LARGEST_NEWTON = 1000  # unknowns; beyond it the dense Hessian costs more than it saves


@dataclass(frozen=True)
class Fit:
    """One solution: weights (outputs, features), intercepts, distance to optimality, steps."""

    weight: Tensor
    bias: Tensor
    residual: float
    steps: int


class LinearProblem:
    """Centred data in float64 with the loss, its gradient and its curvature bound."""

    def __init__(self, x: Tensor, y: Tensor, kind: Kind, *, outputs: int) -> None:
        self.kind: Kind = kind
        self.outputs = outputs
        x = x.reshape(len(x), -1).double()
        self.mean = x.mean(0)
        self.x = x - self.mean
        if kind == "multinomial":
            self.y = y.long()
            start = torch.bincount(self.y, minlength=outputs).double().clamp_min(0.5).log()
            start = start - start.mean()
        else:
            y = y.double().reshape(len(y), -1)
            self.y = y
            mean = y.mean(0)
            start = mean if kind == "squared" else torch.logit(mean.clamp(1e-6, 1 - 1e-6))
        self.start_bias = start
        curvature = {"squared": 1.0, "logistic": 0.25, "multinomial": 0.5}[kind]
        gram = self.x @ self.x.T if len(x) < x.shape[1] else self.x.T @ self.x
        largest = float(torch.linalg.eigvalsh(gram)[-1]) / len(x)
        self.step = 1.0 / (curvature * max(largest, 1.0))

    def loss(self, weight: Tensor, bias: Tensor, columns: Tensor | None = None) -> Tensor:
        """Mean loss; with `columns`, of a model that sees only those features."""
        x = self.x if columns is None else self.x[:, columns]
        return linear_loss(x @ weight.T + bias, self.y, self.kind).mean()

    def gradient(
        self, weight: Tensor, bias: Tensor, columns: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradient of the mean loss in weights and intercepts; `columns` as in `loss`."""
        x = self.x if columns is None else self.x[:, columns]
        z = x @ weight.T + bias
        if self.kind == "squared":
            r = z - self.y
        elif self.kind == "logistic":
            r = torch.sigmoid(z) - self.y
        else:
            r = torch.softmax(z, 1)
            r[torch.arange(len(r)), self.y] -= 1
        r = r / len(r)
        return r.T @ x, r.sum(0)

    def hessian(self, weight: Tensor, bias: Tensor, columns: Tensor) -> Tensor:
        """Second derivative in (output, column) weights, each output's intercept last."""
        x = torch.cat([self.x[:, columns], torch.ones_like(self.x[:, :1])], dim=1)
        z = x[:, :-1] @ weight.T + bias
        if self.kind == "multinomial":
            p = torch.softmax(z, 1)
            curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        else:
            p = torch.sigmoid(z)
            curvature = torch.diag_embed(
                torch.ones_like(z) if self.kind == "squared" else p - p * p
            )
        if self.outputs == 1:
            return (x * curvature[:, 0]).T @ x / len(x)
        size = self.outputs * x.shape[1]
        return torch.einsum("ni,nab,nj->aibj", x, curvature, x).reshape(size, size) / len(x)

    def null_gradient(self) -> Tensor:
        """Gradient in the weights at W = 0 with the best intercept: where a path starts."""
        zero = self.x.new_zeros(self.outputs, self.x.shape[1])
        return self.gradient(zero, self.start_bias)[0]

    def raw_bias(self, fit: Fit) -> Tensor:
        """The intercept for inputs that are not centred."""
        return fit.bias - fit.weight @ self.mean


def linear_loss(z: Tensor, y: Tensor, kind: Kind) -> Tensor:
    """Loss of each row: half the squared error, or minus the log-likelihood."""
    if kind == "squared":
        return 0.5 * (z - y.reshape(len(z), -1)).square().sum(1)
    if kind == "logistic":
        target = y.reshape(len(z), -1).to(z.dtype)
        return F.binary_cross_entropy_with_logits(z, target, reduction="none").sum(1)
    return F.cross_entropy(z, y.long(), reduction="none")


def view(penalty: Proximable, weight: Tensor) -> Tensor:
    """What the penalty sees: entries, or for row penalties one row a feature."""
    return weight if penalty.elementwise else weight.T


def unview(penalty: Proximable, rows: Tensor) -> Tensor:
    """The inverse of `view`."""
    return rows if penalty.elementwise else rows.T


def solve(
    problem: LinearProblem,
    penalty: Proximable,
    *,
    start: Fit | None = None,
    tolerance: float = 1e-9,
    max_steps: int = 20_000,
) -> Fit:
    """The minimiser, to a proximal-gradient residual below `tolerance`.

    Blocks of accelerated proximal steps with restarts (Beck and Teboulle 2009; O'Donoghue and
    Candes 2015) find the support; Newton steps on it, kept only if they lower the objective,
    make the solution exact.
    """
    if start is None:
        weight = problem.x.new_zeros(problem.outputs, problem.x.shape[1])
        start = Fit(weight, problem.start_bias.clone(), float("inf"), 0)
    weight, bias = start.weight, start.bias
    max_steps = max_steps if penalty.convex else max_steps // 10
    steps, block = 0, 5
    while True:
        residual = _residual(problem, penalty, weight, bias)
        if residual < tolerance or steps >= max_steps:
            return Fit(weight, bias, residual, steps)
        weight, bias = _accelerated(problem, penalty, weight, bias, block)
        for _ in range(4):
            before = weight
            weight, bias = _newton(problem, penalty, weight, bias)
            if float((weight - before).abs().max()) < tolerance:
                break
        steps += block
        block = min(3 * block // 2, 640)


def refit(problem: LinearProblem, support: Tensor, *, ridge: float = 1e-8) -> Fit:
    """The model on a support without its penalty (debiased); `ridge` keeps it finite.

    Reference: Meinshausen (2007), Relaxed lasso; Belloni and Chernozhukov (2013).
    """
    from tikhon.penalties import L2

    weight = torch.zeros_like(support, dtype=torch.float64)
    bias = problem.start_bias.clone()
    moved, steps = 0.0, 0
    while support.any() and steps < 50:
        updated = _newton(problem, L2(ridge), weight, bias, mask=support, limit=None)
        moved = float((updated[0] - weight).abs().max())
        weight, bias = updated
        steps += 1
        if moved < 1e-9 * (1 + float(weight.abs().max())):
            break
    return Fit(weight, bias, moved, steps)


def _prox_step(
    problem: LinearProblem, penalty: Proximable, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    g_weight, g_bias = problem.gradient(weight, bias)
    moved = view(penalty, weight - problem.step * g_weight)
    return unview(penalty, penalty.prox(moved, problem.step)), bias - problem.step * g_bias


def _residual(problem: LinearProblem, penalty: Proximable, weight: Tensor, bias: Tensor) -> float:
    """|w - prox(w - t g, t)|_inf / t, with the intercept's gradient."""
    new_weight, new_bias = _prox_step(problem, penalty, weight, bias)
    moved = max(float((new_weight - weight).abs().max()), float((new_bias - bias).abs().max()))
    return moved / problem.step


def _accelerated(
    problem: LinearProblem, penalty: Proximable, weight: Tensor, bias: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    ahead = (weight, bias)
    momentum = 1.0
    for _ in range(steps):
        new = _prox_step(problem, penalty, *ahead)
        move = (new[0] - weight, new[1] - bias)
        uphill = ((ahead[0] - new[0]) * move[0]).sum() + ((ahead[1] - new[1]) * move[1]).sum()
        if uphill > 0:  # the momentum points uphill: restart it
            momentum, ahead = 1.0, (weight, bias)
            new = _prox_step(problem, penalty, *ahead)
            move = (new[0] - weight, new[1] - bias)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        gain = (momentum - 1) / following
        momentum = following
        weight, bias = new
        ahead = (weight + gain * move[0], bias + gain * move[1])
    return weight, bias


def _newton(
    problem: LinearProblem,
    penalty: Proximable,
    weight: Tensor,
    bias: Tensor,
    *,
    mask: Tensor | None = None,
    limit: int | None = LARGEST_NEWTON,
) -> tuple[Tensor, Tensor]:
    """One damped Newton step over the non-zero weights and the intercepts."""
    projected = mask is None
    chosen = weight != 0 if mask is None else mask
    columns = chosen.any(0).nonzero().squeeze(1)
    free = chosen[:, columns]
    count = int(free.sum())
    if count == 0 or (limit is not None and count + len(bias) > limit):
        return weight, bias
    places = free.flatten().nonzero().squeeze(1)

    def spread(theta: Tensor) -> Tensor:
        flat = theta.new_zeros(free.numel()).index_copy(0, places, theta[:count])
        return flat.view(free.shape)

    def objective(theta: Tensor) -> Tensor:
        part = spread(theta)
        return problem.loss(part, theta[count:], columns) + penalty.value(view(penalty, part))

    def slope(theta: Tensor) -> Tensor:
        return unview(penalty, penalty.grad(view(penalty, spread(theta)))).flatten()[places]

    theta = torch.cat([weight[:, columns][free], bias])
    numbered = torch.arange(free.numel() + len(bias)).view(len(bias), -1)
    order = torch.cat([numbered[:, :-1][free], numbered[:, -1]])
    hessian = problem.hessian(weight[:, columns], bias, columns)[order][:, order]
    if penalty.elementwise:  # the second derivative is a diagonal: one product finds it
        ones = torch.ones_like(theta)
        hessian.diagonal()[:count] += torch.func.jvp(slope, (theta,), (ones,))[1]
    else:
        hessian[:count, :count] += torch.func.jacrev(slope)(theta)[:, :count]
    g_weight, g_bias = problem.gradient(weight[:, columns], bias, columns)
    gradient = torch.cat([g_weight[free] + slope(theta), g_bias])
    factor, info = torch.linalg.cholesky_ex(hessian)
    if int(info):
        return weight, bias
    direction = -torch.cholesky_solve(gradient[:, None], factor).squeeze(1)
    before = objective(theta)
    size = 1.0
    while size > 1e-3:
        moved = theta + size * direction
        if projected:  # a weight that would change its sign stops at the kink
            crossed = moved[:count] * theta[:count] < 0
            moved[:count] = torch.where(crossed, 0.0, moved[:count])
        if objective(moved) <= before:
            weight = weight.clone()
            part = weight[:, columns]
            part[free] = moved[:count]
            weight[:, columns] = part
            return weight, moved[count:]
        size /= 2
    return weight, bias
