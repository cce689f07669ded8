"""Losses whose backward pass runs in a sampled step, recorded in `torch.autograd.backward`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_recorders: list[weakref.ref[BackwardCalls]] = []
_original: list[Callable[..., Any]] = []  # torch.autograd.backward


class BackwardCalls:
    """Values of the losses that went backward, and whether they were divided.

    `Tensor.backward` and everything built on it calls `torch.autograd.backward`, which is replaced
    during a sampled step by a function that records the losses and calls the original.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.is_share = False  # a loss is multiplied or divided by a number just before
        self.operations: set[str] = set()  # operations that made them
        self.share = 1.0  # the numbers by which the last one was divided, as a factor
        self.factor: Tensor | None = None  # what the last one was multiplied by at its end

    def start(self) -> None:
        """Record, from here to `stop`."""
        self.losses, self.is_share, self.operations, self.factor = [], False, set(), None
        self.share = 1.0
        if not _original:
            _original.append(torch.autograd.backward)
            torch.autograd.backward = _recording_backward
        _recorders.append(weakref.ref(self))

    def stop(self) -> None:
        """Record no more; the last recorder restores the original."""
        _recorders[:] = [ref for ref in _recorders if ref() not in (None, self)]
        if not _recorders and _original and torch.autograd.backward is _recording_backward:
            torch.autograd.backward = _original.pop()

    @property
    def has_equal_losses(self) -> bool:
        """Whether they are losses of one kind, none of them a share."""
        return len(self.operations) == 1 and not self.is_share

    def record(self, roots: Sequence[Tensor]) -> None:
        """The tensors of one backward pass."""
        for root in roots:
            if isinstance(root, Tensor) and root.numel() == 1 and root.is_floating_point():
                self.losses.append(root.detach().reshape(()))
                self.operations.add(type(root.grad_fn).__name__)
                self.share, factors = _factors(root.grad_fn)
                self.is_share = self.is_share or self.share < 1
                self.factor = factors[0] if factors else None


def _recording_backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.compiler.is_compiling():
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        for ref in list(_recorders):
            recorder = ref()
            if recorder is not None:
                recorder.record(roots)
    return _original[0](tensors, *args, **kwargs)


def _factors(node: Any) -> tuple[float, list[Tensor]]:
    """The share that a loss was divided to, and the tensors on its device that multiply it."""
    shares, found = 1.0, list[Tensor]()
    for _ in range(4):
        kind = type(node).__name__
        if not kind.startswith(("DivBackward", "MulBackward", "ToCopyBackward")):
            break
        other = getattr(node, "_saved_other", None)
        if isinstance(other, Tensor) and other.numel() == 1:
            if kind.startswith("Mul"):
                found.append(other.detach().reshape(()).float())
            if other.is_cpu and float(other):
                share = 1 / float(other) if kind.startswith("Div") else float(other)
                shares *= abs(share) if abs(share) < 1 else 1.0
        node = next((n for n, _ in node.next_functions if n is not None), None)
    return shares, found
