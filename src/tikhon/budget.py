"""What a budget says, the same in Python, the shell and TOML: a time or a number of runs.

A `Deadline` is the end of such a time; nothing else reads its clock.
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
    """One of them: `seconds` of wall time, or `runs`."""

    seconds: float | None = None
    runs: int | None = None

    @classmethod
    def of(cls, text: object) -> Budget:
        """From "500ms", "60s", "5m", "1.5h" or "200runs"; None is no limit.

        Raises `InputError` for anything else, numbers without a unit among them.

        >>> Budget.of("1.5m"), Budget.of("200runs")
        (Budget(seconds=90.0, runs=None), Budget(seconds=None, runs=200))
        """
        if text is None:
            return cls()
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ms|s|m|h|runs?)\s*", str(text))
        if found is None or float(found[1]) == 0:
            raise _refused(text)
        number, unit = float(found[1]), found[2]
        if unit in _UNITS:
            return cls(seconds=number * _UNITS[unit])
        if number != int(number):
            raise _refused(text)
        return cls(runs=int(number))


def seconds_of(text: object) -> float | None:
    """The seconds of a budget, for what has no number of runs.

    >>> seconds_of("5m")
    300.0
    """
    found = Budget.of(text)
    if found.runs is not None:
        raise _refused(text)
    return found.seconds


def _refused(text: object) -> InputError:
    return InputError(
        f"budget must be a time such as 60s, 5m or 1h (for a search also runs, such as 200runs), "
        f"received {text!r}"
    )


class OutOfTimeError(BaseException):
    """The time of a budget is spent; what forgives the errors of a user's code lets it pass."""


@dataclass
class Deadline:
    """The end of `seconds` of wall time from now on.

    >>> now = [0.0]
    >>> deadline = Deadline(60.0, lambda: now[-1])
    >>> now += [45.0]
    >>> deadline.spent, deadline.left, deadline.part(0.2).left, deadline.over
    (45.0, 15.0, 3.0, False)
    """

    seconds: float = math.inf
    clock: Callable[[], float] = field(default_factory=lambda: time.perf_counter)

    def __post_init__(self) -> None:
        self._began = self.clock()

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return self.clock() - self._began

    @property
    def left(self) -> float:
        """Seconds until it ends, 0 at least."""
        return max(0.0, self.seconds - self.spent)

    @property
    def over(self) -> bool:
        """Whether no time is left."""
        return self.left == 0

    def check(self, *_: object) -> None:
        """Raise `OutOfTimeError` where no time is left."""
        if self.over:
            raise OutOfTimeError

    def part(self, share: float) -> Deadline:
        """The end of this share of the time that is left."""
        return Deadline(share * self.left, self.clock)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Make it the deadline that `out_of_time` asks."""
        before = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(before)


_CURRENT: ContextVar[Deadline | None] = ContextVar("deadline", default=None)


def out_of_time() -> bool:
    """Whether the deadline that work is under, if any, is over."""
    current = _CURRENT.get()
    return current is not None and current.over


@contextmanager
def share_of_time(share: float) -> Iterator[None]:
    """Work under a share of the time that the current deadline, if any, leaves."""
    current = _CURRENT.get()
    with nullcontext() if current is None else current.part(share).kept():
        yield
