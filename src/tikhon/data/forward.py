"""Call models on nested batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from tikhon.data.nested import TARGET_NAMES, Batch, join_batch, map_tensors, tensors
from tikhon.errors import InputError

# Of (output, target), or of (model, batch) by the name of its first parameter.
LossFunction = Callable[[Any, Any], Tensor]
MODEL_ARGUMENT_NAMES = ("model", "net", "network", "module")


def call_model(model: nn.Module, inputs: object) -> Any:
    """Call the model: a tuple gives positional arguments, a dictionary keyword arguments.

    Raises `InputError` where it fails because inputs and weights differ in dtype.
    """
    try:
        return call_with_gradients(lambda: forward(model, inputs))
    except TypeError as error:
        _check_arguments(model, inputs, error)
        raise
    except RuntimeError as error:
        given = {t.dtype for t in tensors(inputs)}
        own = {p.dtype for p in model.parameters()}
        if "type" not in str(error) or len(own) != 1 or not given or given & own:
            raise
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in given))
        wanted = str(own.pop()).removeprefix("torch.")
        raise InputError(
            f"the inputs are {names} and the model's weights {wanted}, and it fails on them "
            f"({str(error).splitlines()[0].rstrip('.')}); give them the dtype of the weights: "
            f"x.to(torch.{wanted})"
        ) from error


def loss_takes_model(loss: Any) -> bool:
    """Return whether a loss has the form `loss(model, batch)`, by its parameter names."""
    if isinstance(loss, nn.Module):
        return False
    is_plain = isinstance(loss, FunctionType) and not vars(loss)  # nothing wrapped
    if is_plain and loss.__code__.co_argcount > 1:  # as often as a step asks, `inspect` is slow
        words = list(loss.__code__.co_varnames[:2])
    else:
        try:
            words = list(inspect.signature(loss).parameters)
        except (TypeError, ValueError):
            return False
    return bool(words) and (words[0] in MODEL_ARGUMENT_NAMES or words[1:2] == ["batch"])


def compute_loss(loss: LossFunction, model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a model on a batch (inputs, target), running the forward pass."""
    if loss_takes_model(loss):
        return call_with_gradients(lambda: loss(model, join_batch(batch)))
    return loss(call_model(model, batch[0]), batch[1])


def forward(model: nn.Module, inputs: object) -> Any:
    """Call the model on its inputs without translating errors."""
    if isinstance(inputs, Mapping):
        if len(inputs) == 1 and isinstance(model, nn.Sequential):  # takes no keyword arguments
            return model(*inputs.values())
        return model(**inputs)
    if isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence):
        return model(*inputs)
    return model(inputs)


def _check_arguments(model: nn.Module, inputs: object, error: TypeError) -> None:
    """Raise `InputError` where the inputs do not match the signature of `forward`."""
    named = isinstance(inputs, Mapping)
    given = tuple(inputs) if isinstance(inputs, tuple | list) and not named else (inputs,)
    try:
        inspect.signature(model.forward).bind(
            *(() if named else given), **(inputs if named else {})
        )
    except TypeError:
        shown = f"named {', '.join(map(str, inputs))}" if named else f"{len(given)}"
        raise InputError(
            f"the inputs are no arguments of {type(model).__name__}.forward ({error}): received "
            f"{shown}; of (a, b, y) all but the last are inputs, and of a dictionary all but "
            f"the target ({', '.join(TARGET_NAMES)})"
        ) from error


def call_with_gradients(run: Callable[[], Any]) -> Any:
    """Call `run`; retry with gradients enabled if it needs them, and detach the result.

    Forces (slopes of an energy), differential equations and gradient penalties differentiate by
    the inputs, which fails under `torch.no_grad()`.
    """
    try:
        return run()
    except RuntimeError as error:
        if torch.is_grad_enabled() or "does not require grad" not in str(error):
            raise
    with torch.enable_grad():
        return map_tensors(run(), Tensor.detach)
