"""Exact zeros under any optimizer, by pseudo-gradients and orthants.

If an optimizer's metric is unknown, no prox keeps the minimum of loss + penalty. This method
needs none (Andrew and Gao 2007, https://doi.org/10.1145/1273496.1273501, here for rows too): in
each step weights stay within one orthant, where the penalty is smooth and the optimizer gets its
gradient. A weight that would leave it is set to zero, and kept there whatever the optimizer's
state, until the gradient of the loss exceeds the penalty's slope. As single batches are noisy,
an average over about fifty steps decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tikhon.penalties.base import Proximable, Slopes, upcast
from tikhon.penalties.elementwise import soft_threshold
from tikhon.penalties.group import row_norms
from tikhon.regularizer.plan import StepPlan
from tikhon.regularizer.step import attach_graph
from tikhon.regularizer.targets import local
from tikhon.regularizer.terms import Binding

AVERAGE_DECAY = 0.98  # decay of the average of gradients
_RELEASED_SIZE = 1e-6  # size given to a released zero to find its side of the penalty


@torch.no_grad()
def add_pseudo_gradients(
    plan: StepPlan,
    scale: Tensor | None,
    skipped: Tensor | None,
    before: dict[nn.Parameter, Tensor],
    *,
    first: bool,
    measure: bool,
) -> None:
    """Replace each `.grad` by the pseudo-gradient, storing the original in `before`.

    `first` marks the first evaluation of the step: later ones, at points tried by a closure, keep
    its orthant. `scale` and `skipped` are a GradScaler's.
    """
    for binding in plan.active("orthant"):

        def add(own: Tensor, binding: Binding = binding) -> Tensor:
            if first or binding.orthant_point is None:
                binding.orthant_point = _orthant_point(binding, own, skipped)
            point = binding.orthant_point
            pull = binding.penalty.grad(point)
            if measure:
                binding.share = pull.norm() / (pull.norm() + own.norm())
            return torch.where(point == 0, 0, own + pull)  # NaN differs from zero, so it is kept

        if any(cast(Tensor, param.grad).is_sparse for param in binding.target.params):
            raise TypeError(
                f"{binding.name} reads the gradient of {binding.target.name!r}, which is sparse; "
                f'use how="decoupled", or an Embedding with sparse=False'
            )
        replace_gradients(plan, binding, scale, before, add)


def replace_gradients(
    plan: StepPlan,
    binding: Binding,
    scale: Tensor | None,
    before: dict[nn.Parameter, Tensor],
    change: Callable[[Tensor], Tensor],
) -> None:
    """Replace each `.grad` by what `change` makes of it, in the penalty's view and unscaled."""
    params = binding.target.params
    gradients = [cast(Tensor, param.grad) for param in params]
    for param, gradient in zip(params, gradients):
        before.setdefault(param, gradient)
    factor: float | Tensor = -1.0 if plan.group(params[0]).get("maximize") else 1.0
    factor = factor if scale is None else factor * scale
    changed = change(upcast(binding.arrange(gradients)) / factor) * factor
    totals = [gradient.clone() for gradient in gradients]
    if binding.sees_own_shape:
        local(totals[0]).copy_(changed)
    else:
        binding.target.place_(totals, changed)
    for param, total, gradient in zip(params, totals, gradients):
        param.grad = attach_graph(total, gradient)


def _orthant_point(binding: Binding, gradient: Tensor, skipped: Tensor | None) -> Tensor:
    """Return a point in the step's orthant: weights, and for zeros the side they may enter."""
    average = gradient
    if binding.average is not None and binding.average.shape == gradient.shape:
        average = binding.average.to(gradient).lerp(gradient, 1 - AVERAGE_DECAY)
        if skipped is not None:
            average = torch.where(skipped.bool(), binding.average, average)
    if skipped is None or binding.average is not None:
        binding.average = average
    w = upcast(binding.read())
    slopes = _slopes(binding, w)
    leaving = _excess_over_slope(-average, slopes.entries)
    if slopes.rows is not None:
        tiny = torch.finfo(leaving.dtype).tiny
        left = leaving * (1 - slopes.rows / row_norms(leaving).clamp_min(tiny)).clamp_min(0)
        leaving = torch.where((w == 0).all(1, keepdim=True), left, leaving)
    return torch.where(w == 0, _RELEASED_SIZE * leaving, w)


@torch.no_grad()
def keep_orthants(plan: StepPlan, copies: Sequence[str] = ()) -> None:
    """Set weights that left their orthant to zero; non-finite ones are kept visible.

    Also in copies of the weights in the optimizer's state (schedule-free ones), from which the
    next step would restore them.
    """
    for binding in plan.active("orthant"):
        facing, binding.orthant_point = binding.orthant_point, None
        if facing is None:  # its gradient appeared within the step
            continue
        w = upcast(binding.read())
        slopes = _slopes(binding, w)
        if slopes.entries is not None:
            w = _zero_where(torch.sign(facing) * w <= 0, w)
        if slopes.rows is not None:
            # rows rarely pass through zero: they are zero once turned, or shorter than their step
            # (or a few steps, if the gradient hardly drives them away)
            step, size = row_norms(w - facing), row_norms(w)
            turned = torch.linalg.vecdot(facing, w, dim=1)[:, None] <= 0
            pull = row_norms(_excess_over_slope(cast(Tensor, binding.average), slopes.entries))
            there = (turned | (size <= step)) & (pull <= slopes.rows)
            w = _zero_where(there | (size <= 10 * step) & (pull <= 0.97 * slopes.rows), w)
        binding.write_(w)
        for key in copies:
            for param in binding.target.params:
                held = plan.optimizer.state[param].get(key)
                if held is not None:
                    local(held).masked_fill_(local(param) == 0, 0)


def _slopes(binding: Binding, w: Tensor) -> Slopes:
    return cast(Slopes, cast(Proximable, binding.penalty).slopes(w))


def _excess_over_slope(gradient: Tensor, slope: float | Tensor | None) -> Tensor:
    """Return the part of a gradient that exceeds the penalty's slope."""
    return gradient if slope is None else soft_threshold(gradient, slope)


def _zero_where(gone: Tensor, w: Tensor) -> Tensor:
    """Zero where `gone`, keeping non-finite entries visible."""
    return torch.where(gone & w.isfinite(), 0, w)
