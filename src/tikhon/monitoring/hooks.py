"""Hooks that are not copied or pickled with a module."""

from __future__ import annotations

from functools import partial


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
