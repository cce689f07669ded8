"""The sentences that people read, by key, in each language that they are written in."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import TypeAlias

Value: TypeAlias = "str | int | float | Sentence"


@cache
def strings(language: str) -> dict[str, str]:
    """Every sentence in one language, "en" or "zh", with places for values in braces.

    >>> strings("en")["verdict_one_epoch"]
    'Trained for one epoch only: train longer.'
    """
    return json.loads((files(__name__) / f"{language}.json").read_text(encoding="utf-8"))


class _SentenceFormatter(string.Formatter):
    """Format specifications for numbers alone; `{count:row|rows}` is a choice between words."""

    def format_field(self, value: object, format_spec: str) -> str:
        one, choice, several = format_spec.partition("|")
        if choice:
            return one if str(value) in ("1", "1.0") else several
        return value if isinstance(value, str) else format(value, format_spec)


def fill(language: str, key: str, values: Mapping[str, object]) -> str:
    """The sentence of a key in one language, with its values.

    >>> fill("en", "why_equal", {"count": 2})
    'all weights of 2 layers are equal: their units get equal gradients forever'
    """
    return _SentenceFormatter().vformat(strings(language)[key], (), values)


class Sentence(str):
    """A sentence in English, with the key and the values that give it in other languages too."""

    __slots__ = ("key", "values")

    key: str
    values: dict[str, Value]

    def __new__(cls, key: str, values: Mapping[str, Value]) -> Sentence:
        """The sentence of a key; a number that is not finite is kept as a word."""
        kept = {
            name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        made = super().__new__(cls, fill("en", key, kept))
        made.key, made.values = key, kept
        return made

    def __reduce__(self) -> tuple[type[Sentence], tuple[str, dict[str, Value]]]:
        return Sentence, (self.key, self.values)

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        values = {n: v.to_dict() if isinstance(v, Sentence) else v for n, v in self.values.items()}
        return {"key": self.key, "values": values}

    def with_text(self) -> dict[str, object]:
        """The same with the sentence itself, for files that people read too."""
        return {"text": str(self), **self.to_dict()}


def sentence(key: str, /, **values: Value) -> Sentence:
    """The sentence of a key.

    >>> sentence("why_penalty", share=0.97)
    'the penalty accounts for 97% of what moves the weights'
    """
    return Sentence(key, values)
