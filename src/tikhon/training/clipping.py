"""Clipping of the gradients of a step; by norm and by value are torch's own functions."""

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
    """The largest entry, unit and whole of a gradient; called with a model, it clips in place.

    Entries come first, then the units of all layers but the last, then the whole.

    Args:
        value: largest entry, > 0.
        adaptive: largest ratio of a unit's gradient norm to its weight norm, > 0.
        norm: largest norm of all gradients together, > 0.
    """

    value: float | None = None
    adaptive: float | None = None
    norm: float | None = None

    def __bool__(self) -> bool:
        """Whether anything is clipped."""
        return any((self.value, self.adaptive, self.norm))

    def __call__(self, model: nn.Module) -> None:
        """Clip every `.grad` of the model."""
        if self.value:
            clip_grad_value_(model.parameters(), self.value)
        if self.adaptive:
            clip_grad_adaptive_(below_the_last(model), self.adaptive)
        if self.norm:
            clip_grad_norm_(model.parameters(), self.norm)


def below_the_last(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that adaptive clipping acts on: of all layers but the last.

    The last layer is the last module that holds parameters of its own; what it shares with
    another layer (a tied embedding) is left free too. Raises `InputError` where nothing is left.

    >>> len(below_the_last(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))))
    2
    """
    layers = [m for m in model.modules() if own_parameters(m)]
    free = {id(p) for p in layers[-1].parameters()} if layers else set()
    found = [p for p in model.parameters() if id(p) not in free]
    if not found:
        raise InputError(
            f"adaptive clipping leaves the last layer free, and {type(model).__name__} has no "
            "other; clip by norm or by value"
        )
    return found


@torch.no_grad()
def clip_grad_adaptive_(
    parameters: Iterable[Tensor], ratio: float = 0.01, *, floor: float = 1e-3
) -> None:
    """Shorten each unit's gradient to at most `ratio` times its weight norm, in place.

    g_i <- g_i * min(1, ratio * max(|w_i|, floor) / |g_i|) for every row i of a weight (all
    dimensions but the first), and for a vector as a whole; `ratio` > 0. The paper leaves the last
    layer out: pass `below_the_last(model)`. Gradients that are None are left alone. Raises
    ValueError for another ratio. Reference: Brock et al. 2021, https://arxiv.org/abs/2102.06171

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
    """Norms of the rows, broadcastable; of a vector the norm of the whole."""
    dims = tuple(range(1, w.ndim)) if w.ndim > 1 else None
    return torch.linalg.vector_norm(w, dim=dims, keepdim=True)
