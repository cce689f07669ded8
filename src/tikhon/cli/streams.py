"""stdout, whose errors must be reported, and stderr, whose errors are ignored."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from tikhon.errors import StorageError


class Stdout:
    """The current stdout; a full disk is reported with the number of bytes lost."""

    def __init__(self) -> None:
        self._waiting = 0  # bytes since the last flush

    def write(self, text: str) -> int:
        """Write a text. Raises `StorageError`."""
        self._waiting += len(text.encode(errors="replace"))
        return self._checked(lambda: sys.stdout.write(_printable(text, sys.stdout)))

    def flush(self) -> None:
        """Flush. Raises `StorageError`."""
        self._checked(sys.stdout.flush)
        self._waiting = 0

    @property
    def encoding(self) -> str:
        """The encoding of stdout."""
        return sys.stdout.encoding or "utf-8"

    def __getattr__(self, name: str) -> object:
        return getattr(sys.stdout, name)

    def _checked(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StorageError(
                f"cannot print the result ({error.strerror}): {self._waiting:,} bytes are "
                f"needed, {_free_space()} free; files that were written are complete"
            ) from error


class Stderr:
    """The current stderr; failing progress output never ends a training."""

    def write(self, text: str) -> int:
        """Write a text, ignoring errors."""
        with suppress(OSError):
            return sys.stderr.write(_printable(text, sys.stderr))
        return 0

    def flush(self) -> None:
        """Flush, ignoring errors."""
        with suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(sys.stderr, name)


def _printable(text: str, stream: TextIO) -> str:
    """Replace characters that the stream cannot encode by "?"."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print each warning once, on one line, without source location."""
    shown: set[str] = set()

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            Stderr().write(f"warning: {message}\n")

    before = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def discard_output() -> None:
    """Discard unwritable output, which would raise again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")


def _free_space() -> str:
    """Return the free space where stdout goes."""
    with suppress(OSError, ValueError, AttributeError):
        status = os.fstatvfs(sys.stdout.fileno())
        return f"{status.f_bavail * status.f_frsize:,} bytes"
    return "unknown"
