"""Sentences of a diagnosis or a table in the page's languages: the English text is the pattern."""

from __future__ import annotations

import re
from functools import cache

from tikhon.languages import strings
from tikhon.report.page import Label, Name, say

_NESTED = ("why", "layer")  # places whose own words are known too
_FRAMES = (
    "why_inits",
    "why_scale",
    "why_small_batch",
    "why_neighbours",
    "why_bends",
    "why_order_gain",
    "why_control",
    "why_all_alike",
    "why_rate_zero",
    "why_clipped",
    "why_eps",
)  # sentences around another one


def sentence(text: str, prefix: str = "why_") -> Label | str:
    """The sentence as a label whose numbers and names are filled in; itself if it is unknown.

    `prefix` is that of the keys to look among.

    >>> sentence("the penalty makes up 97% of what moves the weights").key
    'why_penalty'
    """
    return _matched(text, prefix)


def told(text: str, prefix: str) -> Label | Name:
    """The sentence as a label, or as it is if it is unknown."""
    found = sentence(text, prefix)
    return found if isinstance(found, Label) else Name(found, 400)


@cache
def _patterns(prefix: str) -> list[tuple[str, re.Pattern[str]]]:
    """Keys with their patterns, the most specific first."""
    found = []
    for key, words in strings("en").items():
        if key.startswith(prefix):
            plain = re.split(r"\{(\w+)\}", words)
            parts = (f"(?P<{p}>.+?)" if i % 2 else re.escape(p) for i, p in enumerate(plain))
            found.append((sum(map(len, plain[::2])), key, re.compile("".join(parts))))
    found.sort(key=lambda entry: (entry[1] not in _FRAMES, -entry[0]))
    return [(key, pattern) for _, key, pattern in found]


def _matched(text: str, prefix: str) -> Label | str:
    for key, pattern in _patterns(prefix):
        if match := pattern.fullmatch(text):
            values = {
                name: _matched(value, "why_" if name == "why" else "called_")
                if name in _NESTED
                else value
                for name, value in match.groupdict().items()
            }
            return say(key, **values)
    return text
