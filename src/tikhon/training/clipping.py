"""Adaptive gradient clipping; by norm and by value are torch's own functions."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def clip_grad_adaptive_(
    parameters: Iterable[Tensor], ratio: float = 0.01, *, floor: float = 1e-3
) -> None:
    """Shorten each unit's gradient to at most `ratio` times its weight norm, in place.

    g_i <- g_i * min(1, ratio * max(|w_i|, floor) / |g_i|) for every row i of a weight (all
    dimensions but the first), and for a vector as a whole; `ratio` > 0. The paper leaves the last
    layer out: do not pass it. Gradients that are None are left alone. Raises ValueError for
    another ratio. Reference: Brock et al. 2021, https://arxiv.org/abs/2102.06171

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
