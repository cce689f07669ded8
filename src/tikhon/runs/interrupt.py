"""Signals that end a run in good order."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUESTED = "stopped by request"  # how a result that is not the whole one ended


class Stopped(Exception):
    """The work was asked to stop before its end; what is done is saved."""


def never() -> bool:
    """The `stop` of a run that nobody asks to stop."""
    return False


def silent(*told: object) -> None:
    """The listener of a run that nobody follows."""


class Interrupt:
    """Becomes true when the run is asked to stop; `signal` is what asked."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def request(self, number: int, frame: FrameType | None = None) -> None:
        """Ask once; a second Ctrl-C stops at once."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Turn the first SIGINT or SIGTERM into a request; the former handlers come back after."""
    interrupt = Interrupt()
    former = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        former[number] = signal.signal(number, interrupt.request)
    try:
        yield interrupt
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
