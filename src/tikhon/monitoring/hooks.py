"""Hooks on modules and on functions of torch, which leave no trace in copies."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def nothing(*args: object, **kwargs: object) -> None:
    """Do nothing: the effect of a copied hook."""


class Hook(partial[None]):
    """A hook on a module whose copies and pickles do nothing.

    `copy.deepcopy(model)` and `torch.save(model)` copy hooks: a bound method would take the whole
    watch along, with graphs and an optimizer that cannot be copied.
    """

    def __deepcopy__(self, memo: object) -> Hook:
        return Hook(nothing)

    def __reduce__(self) -> tuple[type[Hook], tuple[object]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Hook, (nothing,)


class CallHook:
    """A function of torch, replaced by one that first calls a method of the open recorders."""

    def __init__(self, module: Any, name: str, method: str) -> None:
        self._module, self._name, self._method = module, name, method
        self._recorders: list[weakref.ref[object]] = []
        self._original: Callable[..., Any] | None = None
        self._replaced: Callable[..., Any] | None = None

    def add(self, recorder: object) -> None:
        """Call the method of a recorder, too."""
        if self._original is None:
            self._original = original = getattr(self._module, self._name)

            def replaced(*args: Any, **kwargs: Any) -> Any:
                if not torch.compiler.is_compiling():
                    for ref in list(self._recorders):
                        getattr(ref(), self._method, nothing)(*args, **kwargs)
                return original(*args, **kwargs)

            self._replaced = replaced
            setattr(self._module, self._name, replaced)
        self._recorders.append(weakref.ref(recorder))

    def remove(self, recorder: object) -> None:
        """Call it no more; without any recorder, restore the function."""
        self._recorders = [ref for ref in self._recorders if ref() not in (None, recorder)]
        if not self._recorders and getattr(self._module, self._name) is self._replaced:
            setattr(self._module, self._name, self._original)
            self._original = None
