"""Independent ways to the same numbers: scipy's optimizers and a plain proximal gradient."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from tikhon import penalties
from tikhon.penalties import Proximable
from tikhon.testing import objective


def best_by_scipy(penalty: Proximable, w: Tensor, step: float | Tensor, starts: int = 4) -> float:
    """Smallest objective of the prox that scipy's Nelder-Mead finds from several starts."""

    def cost(z: np.ndarray) -> float:
        found = objective(penalty, torch.from_numpy(z).reshape(w.shape), w, step)
        return min(float(found), 1e9)

    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 20000, "maxfev": 20000, "adaptive": True}
    source = np.random.default_rng(0)
    first = penalty.prox(w, 1.0 if isinstance(step, Tensor) else step)
    begins = [first] + [w + 0.3 * torch.from_numpy(source.normal(size=w.shape))] * (starts - 1)
    return min(
        minimize(cost, z.reshape(-1).numpy(), method="Nelder-Mead", options=options).fun
        for z in begins
    )


def projection_by_scipy(w: Tensor, step: Tensor, limit: dict) -> Tensor:
    """Point closest to w in the metric 1/step under an SLSQP constraint."""
    z, d = w.numpy(), 1 / step.numpy()
    found = minimize(
        lambda x: 0.5 * float((d * (x - z) ** 2).sum()),
        np.full_like(z, 0.3),
        jac=lambda x: d * (x - z),
        constraints=limit,
        bounds=limit.get("bounds"),
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return torch.from_numpy(found.x)


def least_squares(samples: int = 60, features: int = 12, outputs: int = 0, seed: int = 0):
    """A centred regression problem (X, y) with a few true coefficients, as float64 tensors."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=source, dtype=torch.float64)
    shape = (features, outputs) if outputs else (features,)
    truth = torch.randn(shape, generator=source, dtype=torch.float64)
    truth[features // 2 :] = 0
    y = x @ truth + 0.5 * torch.randn((samples, *shape[1:]), generator=source, dtype=torch.float64)
    return x - x.mean(0), y - y.mean(0)


def proximal_gradient(
    x: Tensor, y: Tensor, penalty: Proximable, *, metric: bool = False, iterations: int = 4000
) -> tuple[Tensor, Tensor]:
    """Minimiser of `|y - x w|^2 / (2m) + penalty(w)` by FISTA with restarts, and the residual.

    With `metric` the steps differ from weight to weight; the minimiser is the same.
    """
    m = len(x)
    w = torch.zeros((x.shape[1], *y.shape[1:]), dtype=x.dtype)
    step = m / float(torch.linalg.matrix_norm(x, 2)) ** 2
    if metric:
        step = step * torch.linspace(0.2, 1.0, w.numel(), dtype=w.dtype).reshape(w.shape)
    ahead, momentum = w, 1.0
    for _ in range(iterations):
        gradient = x.T @ (x @ ahead - y) / m
        moved = penalty.prox(ahead - step * gradient, step)
        if ((ahead - moved) * (moved - w)).sum() > 0:
            momentum = 1.0
        faster = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        w, ahead, momentum = moved, moved + (momentum - 1) / faster * (moved - w), faster
        residual = penalties.residual(penalty, w, x.T @ (x @ w - y) / m, step)
        if residual < 1e-11:
            break
    return w, residual
