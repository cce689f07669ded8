"""Hooks that a copy of a module, or its pickle, does not take along."""

from __future__ import annotations

from functools import partial


def nothing(*args: object, **kwargs: object) -> None:
    """What a copied hook does."""


class Hook(partial[None]):
    """A function on a module; copied or pickled with it, it does nothing any more.

    `copy.deepcopy(model)` and `torch.save(model)` copy what hangs on the model: a bound method
    would bring the whole watch along, with graphs and an optimizer that cannot be copied.
    """

    def __deepcopy__(self, memo: object) -> Hook:
        return Hook(nothing)

    def __reduce__(self) -> tuple[type[Hook], tuple[object]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Hook, (nothing,)
