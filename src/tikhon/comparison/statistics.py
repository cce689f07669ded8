"""Statistics of a comparison over splits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, variance

LEVEL = 0.95  # of intervals


def interval(
    values: Sequence[float], *, share: float, step: float = 0.0
) -> tuple[float, float, float]:
    """Mean and confidence interval of scores over resampled splits.

    As splits overlap, the variance of the mean is (1/k + share) * s^2 instead of s^2/k, with
    share = test rows / train rows. One value has no interval (nan). An accuracy moves in steps of
    one test row (`step`), below which s is not taken: equal accuracies on a few splits mean few
    test rows, not the absence of spread.

    Reference: Nadeau, Bengio, "Inference for the generalization error", 2003,
    https://doi.org/10.1023/A:1024068626366

    >>> interval([0.9, 0.9, 0.9], share=0.3)
    (0.9, 0.9, 0.9)
    """
    mean = fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    from scipy.stats import t

    half = float(t.ppf(0.5 + LEVEL / 2, len(values) - 1)) * spread(values, share, step)
    return mean, mean - half, mean + half


def spread(values: Sequence[float], share: float, step: float = 0.0) -> float:
    """Corrected standard error of the mean."""
    return math.sqrt((1 / len(values) + share) * max(variance(values), step**2))


def p_value(differences: Sequence[float], *, share: float, step: float = 0.0) -> float:
    """Two-sided p-value of a zero mean difference over splits (corrected resampled t-test)."""
    if len(differences) < 2:
        return math.nan
    mean, error = fmean(differences), spread(differences, share, step)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    from scipy.stats import t

    return float(2 * t.sf(abs(mean) / error, len(differences) - 1))


def tied(scores: Mapping[str, Sequence[float]], *, share: float, step: float = 0.0) -> set[str]:
    """Return names not significantly different from the best mean (Holm's correction).

    Higher scores are better. The best is included.

    >>> sorted(tied({"a": [9, 8, 9], "b": [8, 9, 9], "c": [1, 1, 1.1]}, share=0.2))
    ['a', 'b']
    """
    best = max(scores, key=lambda name: fmean(scores[name]))
    others = [name for name in scores if name != best]
    ps = {}
    for name in others:
        differences = [a - b for a, b in zip(scores[best], scores[name], strict=True)]
        ps[name] = p_value(differences, share=share, step=step)
    ordered = sorted(others, key=lambda name: ps[name])
    for rank, name in enumerate(ordered):
        if not ps[name] <= (1 - LEVEL) / (len(ordered) - rank):
            return {best, *ordered[rank:]}
    return {best}
