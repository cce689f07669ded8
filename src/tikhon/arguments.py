"""Validate numbers, counts and flags given as arguments, with uniform messages."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from tikhon.errors import describe

MAX_COUNT = 10**12  # largest count
MAX_FLOAT32 = 1e18  # its square is finite in float32
MAX_FLOAT64 = 1e150  # its square is finite in float64
MIN_POSITIVE = 1e-30  # its reciprocal is finite too


def as_number(received: Any) -> float | int | None:
    """Convert any number to a Python one: from numpy, a fraction, a 0-d tensor.

    None for anything else and for tensors that require a gradient; overflow gives infinity.

    >>> as_number(0.5), as_number(True), as_number("0.5")
    (0.5, None, None)
    """
    if getattr(received, "ndim", None) == 0 and hasattr(received, "item"):
        received = None if getattr(received, "requires_grad", False) else received.item()
    if isinstance(received, bool) or not isinstance(received, Real):
        return None
    try:
        size = float(received)
    except OverflowError:
        return math.inf
    return int(received) if isinstance(received, Integral) else size


def check_number(
    owner: str,
    name: str,
    received: object,
    allowed: str,
    fine: Callable[[Any], bool],
    *,
    whole: bool = False,
) -> Any:
    """Return the argument as a plain number for which `fine` holds, an integer if `whole`.

    Raises TypeError for a non-number and ValueError for a number that is not `allowed`.

    >>> check_number("Decay", "every", 2.0, "at least 1", lambda n: n >= 1, whole=True)
    2
    """
    number = as_number(received)
    counts = not whole or (number is not None and math.isfinite(number) and number % 1 == 0)
    if number is not None and counts and fine(number):
        return int(number) if whole else number
    kind = "a number, " if number is None else "" if counts else "a whole number, "
    message = f"{owner}: {name} must be {kind}{allowed}, received {describe(received)}"
    raise (TypeError if number is None else ValueError)(message)


def is_count(number: float, least: int = 1) -> bool:
    """Return whether this is a valid count of steps, rows or bins."""
    return least <= number <= MAX_COUNT


def is_positive(number: float) -> bool:
    """Return whether float32 can compute with this number above 0, and with its reciprocal."""
    return MIN_POSITIVE <= number <= MAX_FLOAT32


def check_field(
    owner: object, name: str, allowed: str, fine: Callable[[Any], bool], *, whole: bool = False
) -> None:
    """Replace a field of a frozen instance by its value from `check_number`."""
    kind, received = type(owner).__name__, getattr(owner, name)
    number = check_number(kind, name, received, allowed, fine, whole=whole)
    object.__setattr__(owner, name, number)


def check_flag(owner: str, name: str, received: Any) -> bool:
    """Return a bool; raise TypeError for anything else, as any text would be truthy."""
    if getattr(received, "ndim", None) == 0 and hasattr(received, "item"):
        received = received.item()
    if not isinstance(received, bool):
        raise TypeError(f"{owner}: {name} must be True or False, received {describe(received)}")
    return received


def check_flag_field(owner: object, name: str) -> None:
    """Replace a field of a frozen instance by its value from `check_flag`."""
    found = check_flag(type(owner).__name__, name, getattr(owner, name))
    object.__setattr__(owner, name, found)


def is_one_of(received: object, words: tuple[Any, ...]) -> bool:
    """Return whether a value is one of the words, safe for arrays, which compare elementwise."""
    return (received is None and None in words) or (
        isinstance(received, str) and received in words
    )


def require(owner: object, name: str, received: object, fine: bool, allowed: str) -> None:
    """Raise a ValueError for an argument out of range."""
    if not fine:
        raise ValueError(
            f"{type(owner).__name__}: {name} must be {allowed}, received {describe(received)}"
        )
