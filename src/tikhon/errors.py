"""Errors with exit codes of the command line, and shared messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A request that cannot be carried out (exit code 2)."""


class DataError(InputError):
    """Data that cannot be trained on (exit code 4)."""


class StorageError(OSError):
    """A file that could not be written, read or verified (exit code 5)."""


_MAX_NAMES = 10  # names listed in a message at most


def describe(value: object) -> str:
    """Describe a received value briefly: a tensor by its shape, a class by its name.

    >>> describe(0.5), describe(dict), describe("x" * 100)[-5:]
    ('0.5', 'the class dict', 'xx...')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def describe_misplaced(value: object) -> str:
    """Describe a value where no data are expected, with a hint if it looks like data.

    >>> describe_misplaced("l1")
    "'l1'"
    """
    data = hasattr(value, "shape")
    return describe(value) + "; inputs and targets are one argument, (x, y)" * data


def unknown_name(kind: str, received: object, options: Iterable[str]) -> str:
    """Format a message for an unknown name; of more than ten `options` the closest are listed.

    >>> unknown_name("optimizer", "adm", ["sgd", "adam"])
    "unknown optimizer 'adm'; did you mean 'adam'? Valid: adam, sgd"
    """
    names = sorted(map(str, options))
    lower = {name.lower(): name for name in names}
    word = str(received).lower()
    near = [lower[name] for name in get_close_matches(word, lower, n=_MAX_NAMES, cutoff=0)]
    close = [word] if word in lower else get_close_matches(word, lower, n=3, cutoff=0.5)
    meant = " or ".join(repr(lower[name]) for name in close)
    hint = f"; did you mean {meant}?" if close else "."
    if len(names) > _MAX_NAMES:
        names = [*near, f"... ({len(names)} in all)"]
    return f"unknown {kind} {received!r}{hint} Valid: {', '.join(names)}"
