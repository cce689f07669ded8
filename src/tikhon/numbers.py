"""How a score is printed: the same on the terminal, on the page and in a sentence."""

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
