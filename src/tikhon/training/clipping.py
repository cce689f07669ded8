"""Gradient clipping: adaptive here, by norm and by value from torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from tikhon.errors import InputError
from tikhon.wrappers import own_parameters


@dataclass(frozen=True)
class Clipping:
    """Clip gradients by value, then adaptively, then by norm, in place, when called with a model.

    Adaptive clipping leaves the last layer out.

    Args:
        value: largest absolute gradient entry, > 0.
        adaptive: largest ratio of a unit's gradient norm to its weight norm, > 0.
        norm: largest norm of all gradients taken together, > 0.
    """

    value: float | None = None
    adaptive: float | None = None
    norm: float | None = None

    def __bool__(self) -> bool:
        """Return whether any clipping is set."""
        return any((self.value, self.adaptive, self.norm))

    def __call__(self, model: nn.Module) -> None:
        """Clip the `.grad` of every parameter of the model."""
        if self.value:
            clip_grad_value_(model.parameters(), self.value)
        if self.adaptive:
            clip_grad_adaptive_(below_the_last(model), self.adaptive)
        if self.norm:
            clip_grad_norm_(model.parameters(), self.norm)


def below_the_last(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that adaptive clipping acts on: those of all layers but the last.

    The last layer is the last module with parameters of its own. Parameters it shares with another
    layer (a tied embedding) are left out too. Raises `InputError` where none remain.

    >>> len(below_the_last(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))))
    2
    """
    layers = [m for m in model.modules() if own_parameters(m)]
    free = {id(p) for p in layers[-1].parameters()} if layers else set()
    found = [p for p in model.parameters() if id(p) not in free]
    if not found:
        raise InputError(
            f"adaptive clipping does not clip the last layer, and {type(model).__name__} has no "
            "other; clip by norm or by value"
        )
    return found


@torch.no_grad()
def clip_grad_adaptive_(
    parameters: Iterable[Tensor], ratio: float = 0.01, *, floor: float = 1e-3
) -> None:
    """Scale each unit's gradient down to at most `ratio` times the norm of its weights, in place.

    g_i <- g_i * min(1, ratio * max(|w_i|, floor) / |g_i|) for every row i of a weight (all
    dimensions but the first), and for a vector as a whole; `ratio` > 0. The paper leaves the last
    layer out: pass `below_the_last(model)`. Gradients that are None are skipped. Raises ValueError
    for a ratio out of range. Reference: Brock et al. 2021, https://arxiv.org/abs/2102.06171

    >>> w = torch.tensor([[3.0, 4.0]], requires_grad=True)
    >>> (w * 10).sum().backward()
    >>> clip_grad_adaptive_([w], 0.1)
    >>> round(w.grad.norm().item(), 4)
    0.5
    """
    if not 0 < ratio < float("inf"):
        raise ValueError(f"clip_grad_adaptive_: ratio must be > 0, received {ratio!r}")
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            limit = ratio * _unit_norm(parameter).clamp_min(floor)
            norm = _unit_norm(gradient)
            gradient.mul_((limit / norm).clamp_max(1.0).nan_to_num(1.0))


def _unit_norm(w: Tensor) -> Tensor:
    """Norm of each row, kept broadcastable; for a vector, the norm of the whole."""
    dims = tuple(range(1, w.ndim)) if w.ndim > 1 else None
    return torch.linalg.vector_norm(w, dim=dims, keepdim=True)
