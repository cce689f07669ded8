"""Stop a run gracefully on signals."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUESTED = "stopped by request"  # `ended` of a partial result


class Stopped(Exception):
    """The work was stopped on request; progress is saved."""


def never_stop() -> bool:
    """Never stop; the default of `stop`."""
    return False


def ignore_messages(*told: object) -> None:
    """Ignore all messages; the default listener."""


class Interrupt:
    """Becomes true on a request to stop; `signal` is its number."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def request(self, number: int, frame: FrameType | None = None) -> None:
        """Record the request; a second Ctrl-C raises immediately."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Turn the first SIGINT or SIGTERM into a request; handlers are restored afterwards."""
    interrupt = Interrupt()
    former = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        former[number] = signal.signal(number, interrupt.request)
    try:
        yield interrupt
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
