"""Open-loop strengths: numbers as functions of the optimizer step.

Any callable from the step, counted from 0, to a number >= 0 is a schedule; the usual ones here
are values, which can be compared, printed and saved. A value out of its range raises ValueError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tikhon.arguments import as_number, check_field
from tikhon.errors import describe


@dataclass(frozen=True)
class Linear:
    """Linear from `start` to `end` over `steps`, then `end`.

    Args:
        start: value at step 0, >= 0.
        end: value from step `steps` on, >= 0.
        steps: length of the transition, at least 1.

    >>> [Linear(0.0, 1.0, steps=4)(step) for step in (0, 1, 4, 9)]
    [0.0, 0.25, 1.0, 1.0]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(self, levels=("start", "end"), counts=("steps",))

    def __call__(self, step: int) -> float:
        """Return the value at `step`."""
        return _interpolate(self.start, self.end, min(step / self.steps, 1.0))


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` to `end` over `steps`, then `end`.

    `end + (start - end) * (1 + cos(pi * step / steps)) / 2`: flat at both ends. Arguments as for
    `Linear`.

    Reference: Loshchilov and Hutter (2017), https://arxiv.org/abs/1608.03983.

    >>> [round(Cosine(1.0, 0.0, steps=4)(step), 4) for step in (0, 1, 2, 4, 9)]
    [1.0, 0.8536, 0.5, 0.0, 0.0]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check(self, levels=("start", "end"), counts=("steps",))

    def __call__(self, step: int) -> float:
        """Return the value at `step`."""
        phase = (1 - math.cos(math.pi * min(step / self.steps, 1.0))) / 2
        return _interpolate(self.start, self.end, phase)


@dataclass(frozen=True)
class WarmUp:
    """0 for `delay` steps, then linear to `strength` over `steps`, then constant.

    A late penalty lets the network first learn what is worth keeping.

    Args:
        strength: the final value, >= 0.
        steps: length of the rise, at least 1.
        delay: steps at 0 before the rise, >= 0.

    >>> [WarmUp(1.0, steps=2, delay=1)(step) for step in range(5)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    strength: float
    steps: int
    delay: int = 0

    def __post_init__(self) -> None:
        _check(self, levels=("strength", "delay"), counts=("steps",))

    def __call__(self, step: int) -> float:
        """Return the value at `step`."""
        return _interpolate(0.0, self.strength, min(max(step - self.delay, 0) / self.steps, 1.0))


@dataclass(frozen=True)
class Cyclic:
    """Linear from `low` up to `high` and back, `period` steps per cycle.

    Args:
        low: value at the start of each cycle, >= 0.
        high: value in the middle of each cycle, >= 0.
        period: length of a cycle, at least 1.

    Reference: Smith (2017), https://arxiv.org/abs/1506.01186.

    >>> [Cyclic(0.0, 1.0, period=4)(step) for step in range(6)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.5]
    """

    low: float
    high: float
    period: int

    def __post_init__(self) -> None:
        _check(self, levels=("low", "high"), counts=("period",))

    def __call__(self, step: int) -> float:
        """Return the value at `step`."""
        phase = step % self.period / self.period
        return _interpolate(self.low, self.high, 1 - abs(2 * phase - 1))


@dataclass(frozen=True)
class Recorded:
    """Strengths of another run, replayed at the same fractions of a run of `steps`.

    Args:
        strengths: one per stretch of equal length, each >= 0; at least one.
        steps: length of the run, at least 1; the last strength stays.

    >>> [Recorded((0.1, 0.2), steps=4)(step) for step in range(6)]
    [0.1, 0.1, 0.2, 0.2, 0.2, 0.2]
    """

    strengths: tuple[float, ...]
    steps: int

    def __post_init__(self) -> None:
        given = self.strengths
        several = hasattr(given, "__len__") and getattr(given, "ndim", 1) > 0
        found = (
            tuple(map(as_number, given)) if several and not isinstance(given, str | bytes) else ()
        )
        if not found or not all(s is not None and 0 <= s < math.inf for s in found):
            raise ValueError(
                f"Recorded: strengths must be finite and >= 0, at least one, "
                f"received {describe(given)}"
            )
        object.__setattr__(self, "strengths", found)
        _check(self, levels=(), counts=("steps",))

    def __call__(self, step: int) -> float:
        """Return the value at `step`."""
        return self.strengths[
            min(int(step * len(self.strengths) // self.steps), len(self.strengths) - 1)
        ]


def _interpolate(start: float, end: float, part: float) -> float:
    return end if part == 1.0 else start + (end - start) * part


def _check(schedule: object, *, levels: tuple[str, ...], counts: tuple[str, ...]) -> None:
    for field in levels:
        check_field(schedule, field, "finite and >= 0", lambda level: 0 <= level < math.inf)
    for field in counts:
        check_field(schedule, field, "at least 1", lambda count: 1 <= count < math.inf)
