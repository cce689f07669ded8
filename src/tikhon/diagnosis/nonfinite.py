"""Locate the origin of the first non-finite number: tensor, function and line."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from tikhon.data.nested import Batch, stored_values, tensors
from tikhon.diagnosis.functions import ATTENDING, Function
from tikhon.diagnosis.modes import Args, Functions, Options, function_name, user_line
from tikhon.diagnosis.record import Failure
from tikhon.diagnosis.replica import Replica, undisturbed

STEEP_FUNCTIONS = {"sqrt", "norm", "std", "pow", "__pow__"}  # derivative at 0 may be infinite
MASKS = {"masked_fill", "where", "full_like", "full", "triu"}
DIVISIONS = {"div", "true_divide", "__truediv__"}


def locate_nonfinite(replica: Replica, batch: Batch, step: int) -> Failure:
    """Return the first non-finite tensor, in the order in which a step computes them."""
    if any(map(has_nonfinite, tensors(batch))):
        return Failure(step, "input", "data")
    for name, parameter in replica.model.named_parameters():
        if has_nonfinite(parameter):
            return Failure(step, "weight", name)
    with undisturbed(replica.model, training=True):
        found = find_first_activation(replica.model, partial(replica.outcome, batch))
    bad = FirstNonFiniteCall()
    with torch.no_grad(), undisturbed(replica.model, training=True), bad:
        replica.value(batch)
    if found:
        return Failure(step, "activation", found, bad.name, bad.place, bad.smallest)
    for name, parameter in replica.model.named_parameters():
        if parameter.grad is not None and has_nonfinite(parameter.grad):
            if not bad.name:
                bad = FirstNonFiniteCall(slopes=True)
                with undisturbed(replica.model, training=True), bad:
                    replica.value(batch)
            return Failure(step, "gradient", name, bad.name, bad.place, bad.smallest)
    return Failure(step, "loss", "loss", bad.name, bad.place, bad.smallest)


def find_first_activation(model: nn.Module, run: Callable[[], object]) -> str:
    """Return the first module with a non-finite output during `run()`, or ""."""
    found: list[str] = []

    def check_output(name: str, module: nn.Module, args: object, output: object) -> None:
        if any(map(has_nonfinite, tensors(output))):
            found.append(name)

    with torch.no_grad(), ExitStack() as hooks:
        for name, module in model.named_modules():
            hook = partial(check_output, name or type(module).__name__)
            hooks.enter_context(module.register_forward_hook(hook))
        run()
    return found[0] if found else ""


class FirstNonFiniteCall(Functions):
    """Context that records the first call with finite arguments and a non-finite result.

    With `slopes`, the first with an infinite derivative: a root or a norm of zero.
    """

    def __init__(self, *, slopes: bool = False) -> None:
        super().__init__()
        self.slopes = slopes
        self.name, self.place = "", ""
        self.smallest: float | None = None

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Return the function's own result, after inspecting it."""
        output = func(*args, **kwargs)
        name = function_name(func)
        inputs = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if self.name or not inputs or not isinstance(output, Tensor):
            return output
        with torch._C.DisableTorchFunction():
            if self.slopes:
                steep = name in STEEP_FUNCTIONS and any(t.requires_grad for t in inputs)
                bad = steep and bool((output.detach() == 0).any())
            else:
                bad = _becomes_nonfinite(name, output, inputs)
            if bad:
                self.name, self.place = name, user_line() or name
                parts = inputs[1:] if name in DIVISIONS and len(inputs) > 1 else inputs[:1]
                self.smallest = min(float(t.detach().min()) for t in parts if t.numel())
        return output


def has_nonfinite(tensor: Tensor) -> bool:
    """Whether a tensor has NaN or infinite entries."""
    inexact = tensor.is_floating_point() or tensor.is_complex()
    return inexact and not bool(torch.isfinite(stored_values(tensor.detach())).all())


def _becomes_nonfinite(name: str, output: Tensor, inputs: list[Tensor]) -> bool:
    """Whether a call introduces non-finite values; scores of -inf are allowed as a mask."""
    if name in ATTENDING:
        numbers = not any(bool(t.detach().isnan().any()) for t in inputs)
        return numbers and bool(output.detach().isnan().any())
    if name in MASKS and bool((output.detach() != math.inf).all()) and not output.isnan().any():
        return False
    return has_nonfinite(output) and not any(map(has_nonfinite, inputs))
