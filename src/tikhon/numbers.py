"""How scores and times are printed: the same on the terminal, on the page and in a sentence."""

from __future__ import annotations

import math


def number(value: object) -> str:
    """A number as the page prints it; `–` for a missing one, so that no cell says NaN.

    >>> number(0.84912), number(1e-05), number(113.005), number(123456.7), number(float("nan"))
    ('0.849', '1e-05', '113.0', '123,457', '–')
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if isinstance(value, int):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 10:
        return f"{value:.3f}"
    if 1e4 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.1f}" if 10 <= abs(value) < 1e4 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds in words, as exact as an estimate is.

    >>> duration(8.4), duration(100.0), duration(5_400.0)
    ('8 s', '2 min', '1.5 h')
    """
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
