"""The sentences that people read, by key, in each language that they are written in."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files


@cache
def strings(language: str) -> dict[str, str]:
    """Every sentence in one language, "en" or "zh", with places for values in braces.

    >>> strings("en")["verdict_one_epoch"]
    'Trained for one epoch only: train longer.'
    """
    return json.loads((files(__name__) / f"{language}.json").read_text(encoding="utf-8"))
