"""Sentences about a table or a treatment in the page's languages: the English is the pattern."""

from __future__ import annotations

import re
from functools import cache

from tikhon.languages import strings
from tikhon.report.page import Label, Name, say


def sentence(text: str, prefix: str) -> Label | str:
    """The sentence as a label whose numbers and names are filled in; itself if it is unknown.

    `prefix` is that of the keys to look among.

    >>> sentence("lr x0.1", "treatment_").key
    'treatment_lr'
    """
    for key, pattern in _patterns(prefix):
        if match := pattern.fullmatch(text):
            return say(key, **match.groupdict())
    return text


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
    found.sort(key=lambda entry: -entry[0])
    return [(key, pattern) for _, key, pattern in found]
