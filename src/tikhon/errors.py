"""The errors that the command line maps to exit codes, and what their messages share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

_COUNTED = re.compile(
    r"(?<![\w.,])(\d[\d,]*)((?: [a-z]+){1,3})\((s|es)\)( (?:are|have|make|take|drop)\b)?"
)
_SINGULAR = {"are": "is", "have": "has"}


def counted(text: str) -> str:
    """A sentence whose words, and the verb behind them, agree with the number before them.

    >>> counted("3 row(s) are empty"), counted("1 row(s) are empty"), counted("2 class(es)")
    ('3 rows are empty', '1 row is empty', '2 classes')
    """

    def agreed(found: re.Match[str]) -> str:
        number, words, ending, verb = found.groups("")
        if number != "1":
            return f"{number}{words}{ending}{verb}"
        verb = verb.strip()
        return f"1{words}" + (f" {_SINGULAR.get(verb, f'{verb}s')}" if verb else "")

    return _COUNTED.sub(agreed, text) if "s)" in text else text


class InputError(ValueError):
    """A request that cannot be carried out as asked (exit code 2)."""

    def __init__(self, *told: object) -> None:
        super().__init__(*(counted(part) if isinstance(part, str) else part for part in told))


class DataError(InputError):
    """Data that cannot be trained on (exit code 4)."""


class StorageError(OSError):
    """A file that could not be written, read or verified (exit code 5)."""


_MOST = 10  # names that a message lists


def described(value: object) -> str:
    """A value that was received, in a few words: a tensor by its shape, a class by its name.

    >>> described(0.5), described(dict), described("x" * 100)[-5:]
    ('0.5', 'the class dict', 'xx...')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def misplaced(value: object) -> str:
    """The same where no data are taken, with a hint if these are data.

    >>> misplaced("l1")
    "'l1'"
    """
    data = hasattr(value, "shape")
    return described(value) + "; inputs and targets are one argument, (x, y)" * data


def unknown(kind: str, received: object, options: Iterable[str]) -> str:
    """Message for a name that is not among `options`; of more than ten the closest are listed.

    >>> unknown("optimizer", "adm", ["sgd", "adam"])
    "unknown optimizer 'adm'; did you mean 'adam'? Valid: adam, sgd"
    """
    names = sorted(map(str, options))
    lower = {name.lower(): name for name in names}
    word = str(received).lower()
    near = [lower[name] for name in get_close_matches(word, lower, n=_MOST, cutoff=0)]
    close = [word] if word in lower else get_close_matches(word, lower, n=3, cutoff=0.5)
    meant = " or ".join(repr(lower[name]) for name in close)
    hint = f"; did you mean {meant}?" if close else "."
    if len(names) > _MOST:
        names = [*near, f"... ({len(names)} in all)"]
    return f"unknown {kind} {received!r}{hint} Valid: {', '.join(names)}"
