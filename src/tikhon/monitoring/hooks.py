"""Hooks that a copy of a module, or its pickle, does not take along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """A function on a module; copied or pickled with it, it does nothing any more.

    `copy.deepcopy(model)` and `torch.save(model)` copy what hangs on the model: a bound method
    would bring the whole watch along, with graphs and an optimizer that cannot be copied.
    """

    def __init__(self, call: Callable[..., Any] | None) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function, or nothing in a copy."""
        return self._call(*args, **kwargs) if self._call is not None else None

    def __deepcopy__(self, memo: object) -> Hook:
        return Hook(None)

    def __reduce__(self) -> tuple[type[Hook], tuple[None]]:
        return Hook, (None,)
