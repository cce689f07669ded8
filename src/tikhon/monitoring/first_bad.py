"""Find the first non-finite tensor of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from tikhon.data.nested import tensors
from tikhon.diagnosis.nonfinite import first_activation, infinite
from tikhon.diagnosis.replica import isolated, undisturbed
from tikhon.regularizer.targets import local

Call = tuple[nn.Module, Any, Any]  # a module with the arguments it was called with


def first_bad(
    model: nn.Module, calls: Sequence[Call], loss: Tensor | None, old: Callable[[Tensor], Tensor]
) -> tuple[str, str]:
    """Input, weight, activation (forward order), loss, then gradient (backward order).

    `calls` are the modules and arguments that the forward pass of the step began with; `old`
    returns a parameter as it was before the step.
    """
    if any(not _fine(part) for part in tensors([call[1:] for call in calls[:1]])):
        return "input", "data"
    named = dict(model.named_parameters())
    weights = [name for name, p in named.items() if not _fine(old(p))]
    if weights:
        return "weight", weights[0]
    if not any(hasattr(p, "to_local") for p in named.values()):  # others would have to pass, too
        with isolated(model, 0), undisturbed(model, training=model.training):
            layer = first_activation(model, lambda: [m(*a, **k) for m, a, k in calls])
        if layer:
            return "activation", layer
    if loss is not None and not _fine(loss):
        return "loss", "loss"
    grads = [name for name, p in named.items() if p.grad is not None and not _fine(p.grad)]
    return ("gradient", grads[-1]) if grads else ("loss", "loss")


def _fine(tensor: Tensor) -> bool:
    return not infinite(local(tensor.detach()))
