"""The errors that the command line maps to exit codes, and the did-you-mean line they share."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """A request that cannot be carried out as asked (exit code 2)."""


class DataError(InputError):
    """Data that cannot be trained on (exit code 4)."""


class StorageError(OSError):
    """A file that could not be written, read or verified (exit code 5)."""


_MOST = 10  # names that a message lists


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
