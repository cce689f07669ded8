"""Slope of the validation loss in each strength after a run, by implicit differentiation."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from tikhon.data.forward import LossFunction, compute_loss
from tikhon.data.nested import to_device
from tikhon.data.stream import Stream
from tikhon.errors import InputError, describe, unknown_name
from tikhon.penalties import Penalty
from tikhon.strengths.validation import explain_loss_errors, without_noise

_POWERS = 20  # power iterations for the largest curvature


def implicit_slopes(
    model: nn.Module,
    loss: LossFunction,
    train: object,
    valid: object,
    penalties: Mapping[str, Penalty],
    *,
    iterations: int = 20,
    batch_size: int = 1024,
    seed: int = 0,
) -> dict[str, float]:
    r"""Slope ``d L_valid / d log s`` of each penalty at trained weights, implicitly.

    At a minimum of ``L + s*R`` the weights change with the strength by
    ``dW / d log s = -(H + s*R'')^-1 s*R'``, ``H`` the Hessian of the training loss. The inverse
    is applied to the validation gradient by a Neumann series,

        p = alpha * sum_k (I - alpha*(H + s*R''))^k g_v,        slope = -<s*R', p>,

    on the support of the penalties, with ``alpha`` the inverse of the largest curvature (power
    iteration). A positive slope says that the penalty is too strong, a negative one that it is too
    weak; near zero it is right. A short series accounts only for the stiff directions.

    Args:
        model: at (nearly) stationary weights; evaluated without dropout and left unchanged. Layers
            in training mode that normalise by running averages use the batch statistics.
        loss: callable of (output, target), or of (model, batch), a 0-d mean.
        train, valid: data as for `Hypergradient`; one batch of `batch_size` rows of each is used.
        penalties: for each parameter's name the penalty it was trained with, at the strength in
            force, in objective mode; it sees the parameter in its own shape.
        iterations: terms of the series, at least 1.
        batch_size: rows of the batches.
        seed: of the batches and of the power iteration.

    Raises ValueError for `iterations` below 1 and for a name that no parameter has, `InputError`
    for penalties of another form and for rows that the loss does not accept.

    Reference: Lorraine, Vicol and Duvenaud, "Optimizing millions of hyperparameters by implicit
    differentiation", 2020, https://arxiv.org/abs/1911.02590.

    >>> from tikhon import L2
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(40, 10); y = x[:, :1] + torch.randn(40, 1)
    >>> model = nn.Linear(10, 1, bias=False)
    >>> w = torch.linalg.solve(x[:20].T @ x[:20] + 200 * torch.eye(10), x[:20].T @ y[:20])
    >>> _ = model.weight.data.copy_(w.T)  # ridge, strength 200/20, too strong
    >>> half = lambda out, target: (out - target).square().mean() / 2
    >>> ridge = {"weight": L2(10.0)}
    >>> implicit_slopes(model, half, (x[:20], y[:20]), (x[20:], y[20:]), ridge)["weight"] > 0
    True
    """
    if iterations < 1:
        raise ValueError(f"implicit_slopes: iterations must be at least 1, received {iterations}")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    given = penalties.values() if isinstance(penalties, Mapping) else [None]
    if not all(isinstance(penalty, Penalty) for penalty in given):
        raise InputError(
            "implicit_slopes: penalties must be a mapping from parameters' names to penalties, "
            f"such as {{'weight': L2(0.1)}}, received {describe(penalties)}"
        )
    if missing := [name for name in penalties if name not in named]:
        raise ValueError(unknown_name("parameter", missing[0], named))
    params, held = list(named.values()), [penalties.get(name) for name in named]
    generator, device = torch.Generator().manual_seed(seed), params[0].device
    with without_noise(model):
        seen, held_out = (
            to_device(Stream(rows, size=batch_size, seed=seed).batch(0), device)
            for rows in (train, valid)
        )
        with explain_loss_errors("implicit_slopes", loss, "training"):
            value = compute_loss(loss, model, seen)
            gradient = torch.autograd.grad(value, params, create_graph=True)
        with explain_loss_errors("implicit_slopes", loss, "validation"):
            found = torch.autograd.grad(compute_loss(loss, model, held_out), params)
        slope = [_on_support(g, penalty, w) for g, penalty, w in zip(found, held, params)]

        def curved(direction: list[Tensor]) -> list[Tensor]:
            data = [*torch.autograd.grad(gradient, params, direction, retain_graph=True)]
            for i, (penalty, w) in enumerate(zip(held, params)):
                if penalty is not None:  # plus s*R'' times the direction
                    own = torch.func.jvp(penalty.grad, (w.detach(),), (direction[i],))[1]
                    data[i] = _on_support(data[i] + own, penalty, w)
            return data

        alpha = 1 / _largest_curvature(curved, params, generator)
        answer = _neumann_series(curved, slope, alpha, iterations)
    return {
        name: -float((penalty.grad(w.detach()) * p).sum())
        for name, penalty, w, p in zip(named, held, params, answer)
        if penalty is not None
    }


def _on_support(values: Tensor, penalty: Penalty | None, w: Tensor) -> Tensor:
    """Zero the entries that a prox holds at zero, which do not respond."""
    return values if penalty is None or penalty.smooth else values * (w != 0)


def _neumann_series(
    curved: Callable[[list[Tensor]], list[Tensor]],
    slope: list[Tensor],
    alpha: float,
    iterations: int,
) -> list[Tensor]:
    """`alpha * sum_k (I - alpha*H)^k slope`, k below `iterations`."""
    term, total = slope, [g.clone() for g in slope]
    for _ in range(iterations - 1):
        term = [t - alpha * h for t, h in zip(term, curved(term))]
        total = [a + t for a, t in zip(total, term)]
    return [alpha * a for a in total]


def _largest_curvature(
    curved: Callable[[list[Tensor]], list[Tensor]],
    params: list[nn.Parameter],
    generator: torch.Generator,
) -> float:
    """Largest absolute eigenvalue of the Hessian, with a margin, by power iteration."""
    vector = [torch.randn(p.shape, generator=generator).to(p) for p in params]
    size = 1.0
    for _ in range(_POWERS):
        norm = torch.stack([v.norm() for v in vector]).norm().clamp_min(1e-30)
        vector = curved([v / norm for v in vector])
        size = float(torch.stack([v.norm() for v in vector]).norm())
    return max(1.2 * size, 1e-12)
