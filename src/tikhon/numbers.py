"""Format scores and times, alike on the terminal, the page and in sentences; validate seeds."""

from __future__ import annotations

import math
from numbers import Integral
from typing import cast

from tikhon.errors import InputError

Z_95 = 1.96  # standard errors in half a 95 % interval, for many rows


def t_quantile(rows: int) -> float:
    """Return the same for a mean over `rows` rows, at least 2, with estimated deviation: Student's
    t.

    Source: Abramowitz, Stegun, "Handbook of mathematical functions", 1964, 26.7.5.

    >>> [round(t_quantile(rows), 2) for rows in (2, 3, 4, 11, 1000)]
    [12.71, 4.3, 3.18, 2.23, 1.96]
    """
    free, z = rows - 1, Z_95
    if free < 3:
        return 12.7062 if free < 2 else 4.30265
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / free**power for power, term in enumerate(terms, 1))


def check_seed(seed: object) -> int:
    """Return the seed if it is an integer from 0 to 2**32 - 1, valid for every generator.

    Raises `InputError` otherwise.
    """
    whole = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not whole or not 0 <= int(cast("int", seed)) < 1 << 32:
        raise InputError(
            f"seed must be a whole number, 0 or more and below 2**32, received {seed!r}"
        )
    return int(cast("int", seed))


def format_number(value: object) -> str:
    """Format a number for display; `–` for missing or non-finite values.

    >>> [format_number(x) for x in (0.84912, 1e-05, 113.005, 123456.7, float("nan"))]
    ['0.849', '1e-05', '113.0', '123,457', '–']
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


def format_interval(low: object, high: object) -> tuple[str, str]:
    """Format both ends of an interval with the same number of decimals.

    >>> format_interval(9.042, 15.13), format_interval(0.81, 0.84912), format_interval(None, 1.0)
    (('9.0', '15.1'), ('0.810', '0.849'), ('–', '1.000'))
    """
    if isinstance(low, float) and isinstance(high, float):
        small, large = sorted((abs(low), abs(high)))
        if 1e-3 <= small < 10 <= large < 1e4:
            return f"{low:.1f}", f"{high:.1f}"
    return format_number(low), format_number(high)


def format_share(value: object) -> str:
    """Format an accuracy or R² with three decimals even near zero.

    >>> format_share(0.84912), format_share(-3.47e-05), format_share(-12.5), format_share(None)
    ('0.849', '0.000', '-12.5', '–')
    """
    near = isinstance(value, float) and abs(value) < 5e-4
    return format_number(0.0 if near else value)


def format_duration(seconds: float) -> str:
    """Format an estimated duration.

    >>> format_duration(8.4), format_duration(100.0), format_duration(5_400.0)
    ('8 s', '2 min', '1.5 h')
    """
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
