"""What a number, a count or a switch may be that somebody gives: one check, one message."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

from tikhon.errors import described

MOST = 10**12  # of anything that is counted
LARGEST = 1e18  # its square is a number of float32, too
HUGE = 1e150  # its square is one of float64
SMALLEST = 1e-30  # its reciprocal is one as well


def plain(received: Any) -> float | int | None:
    """A number of any kind as one of Python's: numpy's, a fraction, a tensor without dimensions.

    None for what is no number, and for one that gradients flow through; what is too large for a
    float is infinite.

    >>> plain(0.5), plain(True), plain("0.5")
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


def checked(
    owner: str,
    name: str,
    received: object,
    allowed: str,
    fine: Callable[[Any], bool],
    *,
    whole: bool = False,
) -> Any:
    """The argument as a plain number for which `fine` holds; a whole one if so asked.

    Raises TypeError for what is no number and ValueError for one that is not `allowed`.

    >>> checked("Decay", "every", 2.0, "at least 1", lambda n: n >= 1, whole=True)
    2
    """
    number = plain(received)
    counts = not whole or (number is not None and math.isfinite(number) and number % 1 == 0)
    if number is not None and counts and fine(number):
        return int(number) if whole else number
    kind = "a number, " if number is None else "" if counts else "a whole number, "
    message = f"{owner}: {name} must be {kind}{allowed}, received {described(received)}"
    raise (TypeError if number is None else ValueError)(message)


def is_count(number: float, least: int = 1) -> bool:
    """Whether so many steps, rows or bins can be counted."""
    return least <= number <= MOST


def settle(
    owner: object, name: str, allowed: str, fine: Callable[[Any], bool], *, whole: bool = False
) -> None:
    """Make a field of a frozen value the plain number that it means, as `checked`."""
    kind, received = type(owner).__name__, getattr(owner, name)
    number = checked(kind, name, received, allowed, fine, whole=whole)
    object.__setattr__(owner, name, number)


def flag(owner: str, name: str, received: Any) -> bool:
    """True or False; TypeError for anything else, since any text would count as True."""
    if getattr(received, "ndim", None) == 0 and hasattr(received, "item"):
        received = received.item()
    if not isinstance(received, bool):
        raise TypeError(f"{owner}: {name} must be True or False, received {described(received)}")
    return received


def settle_flag(owner: object, name: str) -> None:
    """Make a field of a frozen value True or False, as `flag`."""
    found = flag(type(owner).__name__, name, getattr(owner, name))
    object.__setattr__(owner, name, found)


def in_words(received: object, words: tuple[Any, ...]) -> bool:
    """Whether it is one of these words; not so for what compares entry by entry."""
    return (received is None and None in words) or (
        isinstance(received, str) and received in words
    )


def require(owner: object, name: str, received: object, fine: bool, allowed: str) -> None:
    """Raise the ValueError of an argument out of its range."""
    if not fine:
        raise ValueError(
            f"{type(owner).__name__}: {name} must be {allowed}, received {described(received)}"
        )
