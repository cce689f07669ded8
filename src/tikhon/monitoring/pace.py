"""Passes and steps of every step, counted by what happens to one small gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tikhon.monitoring.window import readable

FEW = 20  # forward passes without a step


class Pace:
    """Steps that follow an old gradient, and backward passes that no step follows.

    One tensor that model and optimizer share is looked at: which object its gradient is, and how
    often that was written. Its numbers are not read.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        own = {id(p) for p in model.parameters()}
        held = [p for g in optimizer.param_groups for p in g["params"]]
        fit = [p for p in held if id(p) in own and readable(p)]
        self._tensor = min(fit, key=Tensor.numel) if fit else None
        self._stepped: Tensor | None = None  # the gradient of the last step, small as it is
        self._version = 0  # of that
        self._depth = 0  # a step that calls another runs its hooks again
        self._handle: RemovableHandle | None = None  # counts backward passes once steps are rare
        self._forwards = 0  # since the last step
        self._held: tuple[Tensor, int] | None = None  # the gradient of a sampled step, after it
        self.late: Tensor | None = None  # whether that was written once more, and not cleared
        self.again = 0  # steps without a pass, along the gradient of the step before
        self.unstepped = 0  # backward passes since steps became rare
        self.usual = 0  # the most forward passes between two steps

    def forward(self) -> None:
        """The model is called, with a graph."""
        self._depth = 0
        if self._held is not None:
            gradient, version = self._held
            written = gradient._version != version
            self.late = gradient.count_nonzero().clamp(max=1).float() * written
            self._held = None
        self._forwards += 1
        rare = self._forwards > max(FEW, 5 * self.usual)
        if rare and self._handle is None and self._tensor is not None:
            self._handle = self._tensor.register_post_accumulate_grad_hook(self._reached)

    def before_step(self, *, called: bool) -> None:
        """The optimizer begins a step."""
        self._depth += 1
        if self._depth > 1:
            return
        gradient = self._tensor.grad if self._tensor is not None else None
        version = gradient._version if gradient is not None else 0
        if gradient is not None and not called:
            self.again += gradient is self._stepped and version == self._version
        self._stepped, self._version = gradient, version

    def after_step(self) -> None:
        """The optimizer has made a step."""
        self._depth = max(0, self._depth - 1)
        self.usual = max(self.usual, self._forwards)
        self._forwards = self.unstepped = 0
        if self._handle is not None:
            self.close()

    def hold(self) -> None:
        """A sampled step is over: no one should write to its gradient before the next pass."""
        gradient = self._tensor.grad if self._tensor is not None else None
        strided = gradient is not None and gradient.layout == torch.strided
        self._held = (gradient, gradient._version) if gradient is not None and strided else None

    def close(self) -> None:
        """Take the hook off, if there is one."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _reached(self, parameter: Tensor) -> None:
        self.unstepped += 1
