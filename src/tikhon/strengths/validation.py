"""Validation loss and gradient of the function being trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tikhon.data.forward import LossFunction, call_model, compute_loss, loss_takes_model
from tikhon.data.nested import map_tensors
from tikhon.errors import InputError
from tikhon.regularizer.targets import is_distributed
from tikhon.wrappers import modes_restored, set_mode

_STATISTICS = ("running_", "moving_")  # prefixes of running averages used in eval mode


class ValidationResult(NamedTuple):
    """Result of a validation batch: its loss, 0-d, the gradient, and the `constant_loss`.

    That is the loss of predicting the mean output for every row; NaN if outputs are not a tensor,
    the loss rejects it, or the loss calls the model itself.
    """

    loss: Tensor
    constant_loss: Tensor
    gradients: dict[nn.Parameter, Tensor]


def validate(
    model: nn.Module, loss: LossFunction, batch: tuple[Any, Any], *, pooled: bool = False
) -> ValidationResult:
    """Return the loss on a batch and its gradient, detached, leaving the model's state unchanged.

    With `pooled` all processes of a distributed run evaluate their own rows: the constant
    prediction of the `constant_loss` is then the mean over all of them.

    Dropout is off. Layers that normalise by running averages use batch statistics: early in
    training the averages lag so far behind the weights that the slope in eval mode favours
    whatever hides their error, such as a smaller head. Layers that the user put in eval mode stay
    in it. `.grad`, buffers, random state and modes are unchanged.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    device = params[0].device
    inputs, target = map_tensors(batch, lambda part: part.to(device, non_blocking=True))
    devices = [device] if device.type == "cuda" else []
    with without_noise(model), torch.random.fork_rng(devices), torch.enable_grad():
        output = None if loss_takes_model(loss) else call_model(model, inputs)
        if output is None:
            value = compute_loss(loss, model, (inputs, target))
        else:
            value = loss(output, target)
        found = _gradients(value, params)
        constant_loss = _constant_loss(loss, output, target, value, pooled)
    gradients = {p: torch.zeros_like(p) if g is None else g for p, g in zip(params, found)}
    return ValidationResult(value.detach(), constant_loss, gradients)


@torch.no_grad()
def _constant_loss(
    loss: LossFunction, output: Any, target: Any, value: Tensor, pooled: bool
) -> Tensor:
    """Return the loss of a constant prediction, the mean of the outputs."""
    unknown = torch.full_like(value, torch.nan)
    if not isinstance(output, Tensor) or output.ndim == 0:
        return unknown
    answer = output.mean(0, keepdim=True)
    alike = output.ndim <= 2  # across processes; other axes may differ in length
    if pooled and alike and is_distributed():
        answer = average_over_processes(answer)
    elif len(output) < 2:
        return unknown
    try:
        found = loss(answer.expand_as(output), target)
    except Exception:  # a user's own loss may need more than the values of the outputs
        return unknown
    return found.detach() if isinstance(found, Tensor) and found.ndim == 0 else unknown


def average_over_processes(amounts: Tensor) -> Tensor:
    """Average over the processes of a distributed run, which may see different rows."""
    if is_distributed():
        torch.distributed.all_reduce(amounts)
        amounts = amounts / torch.distributed.get_world_size()
    return amounts


@contextmanager
def explain_loss_errors(owner: str, loss: LossFunction, rows: str) -> Iterator[None]:
    """Convert errors of a loss within the block to an `InputError` that names the rows."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{owner}: the loss fails on the first {rows} batch, as "
            f"{'loss(model, batch)' if loss_takes_model(loss) else 'loss(output, target)'} "
            f"({type(error).__name__}: {error}); give validation data in the form of the "
            "training data; a loss whose first parameter is called model takes the batch whole"
        ) from error


@contextmanager
def without_noise(model: nn.Module) -> Iterator[None]:
    """Disable noise within the block, and normalise by batch statistics."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with modes_restored(model) as modes:
            for module in (module for module, is_training in modes if is_training):
                averages = _has_running_statistics(module)
                set_mode(module, averages)
                if averages:
                    kept += ((b, b.clone()) for b in module.buffers(recurse=False))
            yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _has_running_statistics(module: nn.Module) -> bool:
    """Return whether a layer keeps running statistics of its inputs for eval mode."""
    held = module._buffers.items()
    return any(b is not None and name.startswith(_STATISTICS) for name, b in held)


def _gradients(value: Tensor, params: Sequence[nn.Parameter]) -> Sequence[Tensor | None]:
    """Differentiate by autograd, or through `.grad` where FSDP2 requires backward hooks."""
    if not any(hasattr(p, "placements") for p in params):
        return torch.autograd.grad(value, params, allow_unused=True)
    kept = [p.grad for p in params]
    try:
        for p in params:
            p.grad = None
        value.backward()  # only reads the gradient
        return [p.grad for p in params]
    finally:
        for p, grad in zip(params, kept):
            p.grad = grad
