"""The validation loss and its gradient within a training, of the function that is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tikhon.data.rows import call, each

_STATISTICS = ("running_", "moving_")  # how layers name the averages that eval mode goes by


def validation_gradient(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], batch: tuple[Any, Any]
) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
    """The loss on a batch (detached, 0-d) and its gradient; all of the model's state stays.

    Dropout is off. Layers that normalise by running averages take the batch's own statistics: the
    averages lag behind the weights, early in a training so far that the slope of the loss in eval
    mode asks for whatever hides their error, such as a smaller head. A layer that the user has
    put in eval mode is trained in eval mode, and stays there. `.grad`, buffers, random state and
    modes are left as they were.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    device = params[0].device
    inputs, target = each(batch, lambda part: part.to(device, non_blocking=True))
    devices = [device] if device.type == "cuda" else []
    with trained_function(model), torch.random.fork_rng(devices), torch.enable_grad():
        value = loss(call(model, inputs), target)
        found = _gradients(value, params)
    gradients = {p: torch.zeros_like(p) if g is None else g for p, g in zip(params, found)}
    return value.detach(), gradients


@contextmanager
def trained_function(model: nn.Module) -> Iterator[None]:
    """Within: no noise, and normalisation by the statistics of the batch that is passed."""
    training = [module for module in model.modules() if module.training]
    averaging = [module for module in training if _averages(module)]
    kept = [(b, b.clone()) for module in averaging for b in module.buffers(recurse=False)]
    try:
        for module in training:
            module.training = False
        for module in averaging:
            module.training = True
        yield
    finally:
        for module in training:
            module.training = True
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _averages(module: nn.Module) -> bool:
    """Whether a layer keeps averages of its inputs' statistics for eval mode."""
    names = (name for name, _ in module.named_buffers(recurse=False))
    return any(name.startswith(_STATISTICS) for name in names)


def _gradients(value: Tensor, params: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    """By autograd alone; through `.grad` where FSDP2 gathers and scatters in backward hooks."""
    if not any(hasattr(p, "placements") for p in params):
        return torch.autograd.grad(value, params, allow_unused=True)
    kept = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        value.backward()  # only to read the gradient: no step of training
        return [p.grad for p in params]
    finally:
        for p, grad in zip(params, kept):
            p.grad = grad
