"""Scales of ordered words, as in surveys: `low, medium, high`, `strongly disagree ... agree`."""

from __future__ import annotations

from collections.abc import Sequence

from tikhon.data.number_parsing import normalize_text

_FEWEST = 3  # different levels: the order of two does not matter

# one scale a line, its levels in order, synonyms separated by a slash
_SCALES = tuple(
    tuple(tuple(level.strip().split("/")) for level in line.split(","))
    for line in (
        "strongly disagree, disagree, slightly disagree/somewhat disagree, neutral/undecided/"
        "neither agree nor disagree, slightly agree/somewhat agree, agree, strongly agree",
        "very dissatisfied, dissatisfied, neutral/neither satisfied nor dissatisfied, satisfied, "
        "very satisfied",
        "very unlikely, unlikely, neutral, likely, very likely",
        "very low, low, medium/moderate/mid/med, high, very high",
        "extra small/xs, small/s, medium/m, large/l, extra large/xl, xxl",
        "never, rarely/seldom, sometimes/occasionally, often/frequently/usually, always",
        "none, mild, moderate, severe, very severe",
        "primary school/primary/no degree, high school/secondary school/secondary, "
        "associate/college/some college, bachelor/bachelors/bachelor's/undergraduate, "
        "master/masters/master's/graduate, phd/doctorate/doctoral",
        "never, yearly/annually, quarterly, monthly, weekly, daily, hourly",
        "very poor, poor, fair/average, good, very good, excellent",
        "非常不同意, 不同意, 一般/中立, 同意, 非常同意",
        "非常不满意, 不满意, 一般/中立, 满意, 非常满意",
        "很低, 低, 中/中等, 高, 很高",
        "小, 中, 大",
        "从不, 很少, 有时, 经常, 总是",
        "无, 轻度, 中度, 重度",
        "差, 一般/中, 良, 优",
    )
)


def scale_of(levels: Sequence[str]) -> tuple[str, ...]:
    """Return the levels in the order of a known scale that has them all; () if there is none.

    >>> scale_of(["High", "low", "medium"]), scale_of(["low", "green", "high"])
    (('low', 'medium', 'High'), ())
    """
    ranks = ranks_of(levels)
    return tuple(sorted(levels, key=lambda word: (ranks[level_key(word)], word))) if ranks else ()


def level_key(level: str) -> str:
    """Return the key under which spellings of a level are one."""
    return " ".join(normalize_text(level).lower().replace("-", " ").replace("_", " ").split())


def ranks_of(levels: Sequence[str]) -> dict[str, float]:
    """Return the rank of every level of the scale that has these, by `level_key`; {} if none has.

    >>> ranks = ranks_of(["low", "medium", "high"])
    >>> ranks["very low"], ranks["high"]
    (0.0, 3.0)
    """
    keys = set(map(level_key, levels))
    for scale in _SCALES:
        ranks = {word: float(i) for i, words in enumerate(scale) for word in words}
        if keys <= ranks.keys() and len({ranks[key] for key in keys}) >= _FEWEST:
            return ranks
    return {}
