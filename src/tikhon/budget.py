"""What a budget says: a time or a number of runs, the same in Python, the shell and TOML."""

from __future__ import annotations

import re
from dataclasses import dataclass

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
