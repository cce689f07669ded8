"""Which tensor of a step stopped being finite first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.data.rows import tensors
from tikhon.diagnosis.replica import isolated, undisturbed
from tikhon.regularizer.targets import local

Call = tuple[nn.Module, Any, Any]  # a module with the arguments it was called with


def first_bad(
    model: nn.Module, calls: Sequence[Call], loss: Tensor | None, old: Callable[[Tensor], Tensor]
) -> tuple[str, str]:
    """Input, weight, activation (forward order), loss, then gradient (backward order).

    `calls` are what the forward pass of the step began with; `old` gives a parameter as it was
    before the step.
    """
    if any(not _fine(part) for part in tensors([call[1:] for call in calls[:1]])):
        return "input", "data"
    named = dict(model.named_parameters())
    weights = [name for name, p in named.items() if not _fine(old(p))]
    if weights:
        return "weight", weights[0]
    layer = _first_activation(model, calls)
    if layer is not None:
        return "activation", layer
    if loss is not None and not _fine(loss):
        return "loss", "loss"
    grads = [name for name, p in named.items() if p.grad is not None and not _fine(p.grad)]
    return ("gradient", grads[-1]) if grads else ("loss", "loss")


def _first_activation(model: nn.Module, calls: Sequence[Call]) -> str | None:
    if any(hasattr(p, "to_local") for p in model.parameters()):
        return None  # another forward pass would wait for the processes that are fine
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: object, output: object) -> None:
            if any(not _fine(part) for part in tensors(output)):
                found.append(name)

        return hook

    named = list(model.named_modules())
    handles = [m.register_forward_hook(look(n or type(m).__name__)) for n, m in named]
    try:
        looked = undisturbed(model, training=model.training)
        with isolated(model, 0), torch.no_grad(), looked:
            for module, args, kwargs in calls:
                module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _fine(tensor: Tensor) -> bool:
    own = local(tensor.detach())
    return not own.is_floating_point() or bool(torch.isfinite(own).all())
