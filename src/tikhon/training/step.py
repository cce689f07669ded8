"""The one step of training: learning rate, gradient, clipping, the optimizer's step.

Whatever trains one model takes it: `fit`, the estimators, the dry run of a diagnosis, the trials
of a cure, the sweep of a path. `Population.step` is its twin for many models at once. What only
asks for a gradient (a probe, a validation loss, a line search) trains nothing and is elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tikhon.errors import InputError


class Step:
    """One step of training after another, of one model by one optimizer.

    Args:
        model: the model; named in errors, and given to `clip`.
        optimizer: it holds the model's parameters; their gradients are forgotten before each step.
        loss: of a batch to a 0-d tensor, forward pass included; it may raise, and then the
            weights stay as they are.
        clip: called with the model between gradient and update; it may change every `.grad`, or
            raise as well.
        rate: of the number of a step to the factor on every group's learning rate, as the groups
            have it now; None leaves the learning rates alone.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> step = Step(model, sgd, lambda x: model(x).sum(), rate=lambda k: 1 / (1 + k))
    >>> [step(torch.ones(1, 1), k).item() for k in range(3)]
    [1.0, 0.5, 0.25]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss: Callable[[Any], Tensor],
        *,
        clip: Callable[[nn.Module], None] | None = None,
        rate: Callable[[int], float] | None = None,
    ) -> None:
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.clip, self.rate = clip, rate
        self._rates = [] if rate is None else [group["lr"] for group in optimizer.param_groups]

    def __call__(self, batch: object, number: int = 0) -> Tensor:
        """Take step `number`, counted from 0, on a batch; the loss before it, detached.

        Raises `InputError` where the backward pass of the model fails.
        """
        if self.rate is not None:
            factor = self.rate(number)
            for group, base in zip(self.optimizer.param_groups, self._rates):
                group["lr"] = base * factor
        self.optimizer.zero_grad()
        value = self.loss(batch)
        backward(value, self.model)
        if self.clip is not None:
            self.clip(self.model)
        self.optimizer.step()
        return value.detach()


def backward(loss: Tensor, model: nn.Module) -> None:
    """`loss.backward()`; raises `InputError` where the backward pass of the user's model fails."""
    try:
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(backward_failed(error, model)) from error


def backward_failed(error: RuntimeError, model: nn.Module) -> str:
    """What an error of a backward pass means, and what to change where that is known."""
    text = str(error).splitlines()[0].rstrip(".")
    hint = "; write x = x + y instead of x += y" if "inplace" in text else ""
    if "does not require grad" in text:
        hint = "; nothing that trains has a part in the loss: look for detach(), item() or numpy()"
    hint = "; the targets need the dtype of the output" if "dtype" in text else hint
    return f"the backward pass of {type(model).__name__} failed: {text}{hint}"
