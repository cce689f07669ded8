"""One training step: learning rate, gradient, clipping, optimizer step.

Used wherever a single model is trained: `fit`, the estimators, the dry run of a diagnosis, the
trials of a cure, the sweep of a path. `Population.step` is the counterpart for many models. Code
that only needs a gradient (probes, validation losses, line searches) does not use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tikhon.errors import InputError


class Step:
    """Perform training steps of one model with one optimizer.

    Args:
        model: the model, passed to `clip` and named in errors.
        optimizer: over the model's parameters; gradients are zeroed before each step.
        loss: from a batch to a 0-d tensor, including the forward pass; if it raises, the weights
            are unchanged.
        clip: called with the model between backward pass and update; may modify `.grad` or raise.
        rate: from the step number to a factor on the current learning rate of every group; None
            leaves learning rates alone.

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
        """Take step `number` (from 0) on a batch; return the detached loss before it.

        Raises `InputError` if the backward pass fails.
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
    """Run `loss.backward()`; raise `InputError` if it fails."""
    try:
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(backward_failed(error, model)) from error


def backward_failed(error: RuntimeError, model: nn.Module) -> str:
    """Explain an error of the backward pass, with a remedy where one is known."""
    text = str(error).splitlines()[0].rstrip(".")
    hint = "; write x = x + y instead of x += y" if "inplace" in text else ""
    if "does not require grad" in text:
        hint = "; nothing that trains has a part in the loss: look for detach(), item() or numpy()"
    hint = "; the targets need the dtype of the output" if "dtype" in text else hint
    return f"the backward pass of {type(model).__name__} failed: {text}{hint}"
