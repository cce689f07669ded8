"""The two abstract classes that every penalty is one of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Penalty(ABC):
    """A function of one tensor, to be minimised: `strength * omega(w)`.

    `strength` is lambda, finite and >= 0. A 0-d tensor is taken as it is (it may be batched by
    `torch.vmap`, so no code branches on its value).
    """

    strength: float | Tensor = 1.0

    smooth: ClassVar[bool] = False  # differentiable everywhere: no prox is needed
    convex: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False  # a sum over entries
    constraint: ClassVar[bool] = False  # value is 0 or inf; the prox ignores step and strength
    diagonal: ClassVar[bool] = True  # the prox is exact for a tensor step (a diagonal metric)
    rows: ClassVar[str] = "tensor"  # the view of the weights that it sees by default
    reference: ClassVar[str] = ""

    @abstractmethod
    def value(self, w: Tensor) -> Tensor:
        """0-d value, a sum over entries (never a mean), accumulated in at least float32."""

    def grad(self, w: Tensor) -> Tensor:
        """Gradient (an element of the subdifferential, finite everywhere), w's shape and dtype."""
        with torch.enable_grad():
            leaf = w.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf), leaf)[0]


@dataclass(frozen=True, eq=False)
class Proximable(Penalty):
    """A penalty with a proximal operator."""

    @abstractmethod
    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """argmin_z 1/2 (z-w)' diag(1/step) (z-w) + value(z).

        `step` >= 0: a number, a 0-d tensor or a tensor of w's shape (the optimizer's metric).
        """

    def support(self, w: Tensor) -> Tensor:
        """Bool mask, w's shape: the entries that the penalty leaves non-zero."""
        return w != 0
