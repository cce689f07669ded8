"""The minimum on a set under any optimizer, by gradients along its boundary.

A projection after the step of an optimizer whose metric is unknown keeps a bound and misses the
minimum on the set: the update mixes the part of the gradient that presses against the bound with
the rest. So where the bound holds weights, that part is removed from the gradient, and the weights
stay on the bound until an average of it over about fifty steps points inwards. The fixed points
are then those of the minimum (Karush, Kuhn and Tucker) whatever the update.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tikhon.penalties.base import keep_nonfinite, upcast
from tikhon.penalties.constraints import Constraint
from tikhon.penalties.group import row_norms
from tikhon.regularizer.orthant import AVERAGE_DECAY, replace_gradients
from tikhon.regularizer.plan import StepPlan
from tikhon.regularizer.terms import Binding


@torch.no_grad()
def project_gradients(
    plan: StepPlan,
    scale: Tensor | None,
    skipped: Tensor | None,
    before: dict[nn.Parameter, Tensor],
    *,
    first: bool,
) -> None:
    """Replace each `.grad` by its part along the bound; arguments as for orthants."""
    for binding in plan.faces:
        gradients = [param.grad for param in binding.target.params]
        if any(gradient is None or gradient.is_sparse for gradient in gradients):
            continue

        def along(own: Tensor, binding: Binding = binding) -> Tensor:
            if first or binding.face is None:
                binding.face = _face(binding, own, skipped)
            pressing = _sum(binding, own * binding.face)
            return torch.where(binding.face == 0, own, own - pressing * binding.face)

        replace_gradients(plan, binding, scale, before, along)


def _face(binding: Binding, gradient: Tensor, skipped: Tensor | None) -> Tensor:
    """Return the outward normals of the weights that the bound holds, 0 for the others."""
    w = upcast(binding.read())
    binding.weights_before = w.clone()
    normals = cast(Tensor, cast(Constraint, binding.base).normals(w))
    pressing = -_sum(binding, gradient * normals)
    earlier = torch.zeros_like(pressing) if binding.average is None else binding.average
    average = earlier.to(pressing).lerp(pressing, 1 - AVERAGE_DECAY)
    average = torch.where(_sum(binding, normals.abs()) > 0, average, 0)
    fine = average.isfinite() if skipped is None else average.isfinite() & ~skipped.bool()
    binding.average = torch.where(fine, average, earlier)
    if not cast(Constraint, binding.base).has_interior:
        return normals
    return torch.where(binding.average > 0, normals, 0)


@torch.no_grad()
def keep_faces(plan: StepPlan) -> None:
    """Set weights that the bound held during the step back onto it."""
    for binding in plan.faces:
        face, binding.face = binding.face, None
        before, binding.weights_before = binding.weights_before, None
        if face is None or before is None:  # its gradient appeared within the step
            continue
        w = upcast(binding.read())
        if not binding.base.elementwise:
            size = row_norms(w).clamp_min(torch.finfo(w.dtype).tiny)
            before = w * (row_norms(before) / size)
        held = _sum(binding, face.abs()) > 0
        binding.write_(keep_nonfinite(torch.where(held, before, w), w))


def _sum(binding: Binding, amounts: Tensor) -> Tensor:
    """Sum over each unit of the constraint: a row, or an entry alone."""
    return amounts if binding.base.elementwise else amounts.sum(1, keepdim=True)
