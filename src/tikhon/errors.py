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
    close = get_close_matches(str(received), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    if len(names) > _MOST:
        near = get_close_matches(str(received), names, n=_MOST, cutoff=0)
        names = [*near, f"... ({len(names)} in all)"]
    return f"unknown {kind} {received!r}{hint} Valid: {', '.join(names)}"
