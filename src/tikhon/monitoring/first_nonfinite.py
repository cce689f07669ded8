"""Find the first non-finite tensor of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tikhon.data.nested import tensors
from tikhon.diagnosis.nonfinite import find_first_activation, has_nonfinite
from tikhon.diagnosis.replica import isolated, undisturbed
from tikhon.regularizer.targets import local

Call = tuple[nn.Module, Any, Any]  # a module with the arguments it was called with


def find_first_nonfinite(
    model: nn.Module,
    calls: Sequence[Call],
    loss: Tensor | None,
    value_before_step: Callable[[Tensor], Tensor],
) -> tuple[str, str]:
    """Input, weight, activation (forward order), loss, then gradient (backward order).

    `calls` are the modules and arguments that the forward pass of the step began with;
    `value_before_step` returns a parameter as it was before the step.
    """
    if any(not _is_finite(part) for part in tensors([call[1:] for call in calls[:1]])):
        return "input", "data"
    parameters = dict(model.named_parameters())
    bad_weights = [name for name, p in parameters.items() if not _is_finite(value_before_step(p))]
    if bad_weights:
        return "weight", bad_weights[0]
    if not any(
        hasattr(p, "to_local") for p in parameters.values()
    ):  # others would have to pass, too
        with isolated(model, 0), undisturbed(model, training=model.training):
            layer = find_first_activation(model, lambda: [m(*a, **k) for m, a, k in calls])
        if layer:
            return "activation", layer
    if loss is not None and not _is_finite(loss):
        return "loss", "loss"
    bad_gradients = [
        name for name, p in parameters.items() if p.grad is not None and not _is_finite(p.grad)
    ]
    return ("gradient", bad_gradients[-1]) if bad_gradients else ("loss", "loss")


def _is_finite(tensor: Tensor) -> bool:
    return not has_nonfinite(local(tensor.detach()))
