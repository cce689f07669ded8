"""The losses that go backward in a sampled step, seen where every backward pass begins."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_listeners: list[weakref.ref[Roots]] = []
_plain: list[Callable[..., Any]] = []  # what torch.autograd.backward was before


class Roots:
    """Values of the tensors whose backward pass began, and how many of them are a share.

    `Tensor.backward` and everything built on it calls `torch.autograd.backward`; while a sampled
    step lasts that name leads here first, and afterwards it is what it was.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.divided = False  # a loss is multiplied or divided by a number just before
        self.kinds: set[str] = set()  # operations that made them
        self.share = 1.0  # the numbers by which the last one was divided, as a factor
        self.factor: Tensor | None = None  # what the last one was multiplied by at its end

    def open(self) -> None:
        """Listen, from here to `close`."""
        self.values, self.divided, self.kinds, self.factor = [], False, set(), None
        self.share = 1.0
        if not _plain:
            _plain.append(torch.autograd.backward)
            torch.autograd.backward = _heard
        _listeners.append(weakref.ref(self))

    def close(self) -> None:
        """Listen no more; the last one puts the name back."""
        _listeners[:] = [ref for ref in _listeners if ref() not in (None, self)]
        if not _listeners and _plain and torch.autograd.backward is _heard:
            torch.autograd.backward = _plain.pop()

    @property
    def equal(self) -> bool:
        """Whether they are losses of one kind, none of them a share."""
        return len(self.kinds) == 1 and not self.divided

    def hear(self, roots: Sequence[Tensor]) -> None:
        """The tensors of one backward pass."""
        for root in roots:
            if isinstance(root, Tensor) and root.numel() == 1 and root.is_floating_point():
                self.values.append(root.detach().reshape(()))
                self.kinds.add(type(root.grad_fn).__name__)
                self.share, factors = _factors(root.grad_fn)
                self.divided = self.divided or self.share < 1
                self.factor = factors[0] if factors else None


def _heard(tensors: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.compiler.is_compiling():
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        for ref in list(_listeners):
            listener = ref()
            if listener is not None:
                listener.hear(roots)
    return _plain[0](tensors, *args, **kwargs)


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
