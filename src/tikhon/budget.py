"""Budgets, alike in Python, on the command line and in TOML: a time or a number of runs.

Time limits are enforced by a `Deadline` only.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

from tikhon.errors import InputError

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """Either `seconds` of wall time or a number of `runs`."""

    seconds: float | None = None
    runs: int | None = None

    @classmethod
    def parse(cls, text: object) -> Budget:
        """Parse "500ms", "60s", "5m", "1.5h" or "200runs"; None means no limit.

        Raises `InputError` for anything else, including numbers without a unit.

        >>> Budget.parse("1.5m"), Budget.parse("200runs")
        (Budget(seconds=90.0, runs=None), Budget(seconds=None, runs=200))
        """
        if text is None:
            return cls()
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|m|h|runs?)\s*", str(text))
        if found is None or float(found[1]) == 0:
            raise _invalid_budget(text)
        number, unit = float(found[1]), found[2]
        if unit in _UNITS:
            return cls(seconds=number * _UNITS[unit])
        if number != int(number):
            raise _invalid_budget(text)
        return cls(runs=int(number))


def parse_seconds(text: object) -> float | None:
    """Parse a budget where only a time is allowed, in seconds.

    >>> parse_seconds("5m")
    300.0
    """
    found = Budget.parse(text)
    if found.runs is not None:
        raise _invalid_budget(text)
    return found.seconds


def _invalid_budget(text: object) -> InputError:
    return InputError(
        f"budget must be a time such as 60s, 5m or 1h (for a search also runs, such as 200runs), "
        f"received {text!r}"
    )


class OutOfTimeError(BaseException):
    """The time budget is spent; no Exception, so that handlers of user errors do not catch it."""


@dataclass
class Deadline:
    """A deadline after `seconds` of wall time from now.

    >>> now = [0.0]
    >>> deadline = Deadline(60.0, lambda: now[-1])
    >>> now += [45.0]
    >>> deadline.elapsed, deadline.remaining, deadline.fraction(0.2).remaining, deadline.is_over
    (45.0, 15.0, 3.0, False)
    """

    seconds: float = math.inf
    clock: Callable[[], float] = field(default_factory=lambda: time.perf_counter)

    def __post_init__(self) -> None:
        self._began = self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self._began

    @property
    def remaining(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.seconds - self.elapsed)

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self.remaining == 0

    def check(self, *_: object) -> None:
        """Raise `OutOfTimeError` after the deadline."""
        if self.is_over:
            raise OutOfTimeError

    def fraction(self, share: float) -> Deadline:
        """Return a deadline after this share of the remaining time."""
        return Deadline(share * self.remaining, self.clock)

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Make this the deadline checked by `out_of_time`."""
        before = _CURRENT_DEADLINE.set(self)
        try:
            yield
        finally:
            _CURRENT_DEADLINE.reset(before)


_CURRENT_DEADLINE: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def out_of_time() -> bool:
    """Return whether the current deadline, if any, has passed."""
    current = _CURRENT_DEADLINE.get()
    return current is not None and current.is_over


@contextmanager
def limit_to_share(share: float) -> Iterator[None]:
    """Limit the block to a share of the time left until the current deadline, if any."""
    current = _CURRENT_DEADLINE.get()
    with nullcontext() if current is None else current.fraction(share).activate():
        yield
