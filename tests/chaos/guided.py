"""A fuzzer that keeps what reaches new lines, in plain Python.

It changes inputs of a corpus; one that makes tikhon take a step from line to line that none before
it took joins the corpus. Where Atheris is installed, `atheris_run.py` draws the
changes in its stead.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import tikhon

Target = Callable[[bytes], None]
PACKAGE = str(Path(tikhon.__file__).parent)
WORDS = (
    *(
        b"\n",
        b"\r",
        b"\r\n",
        b'"',
        b'""',
        b",",
        b";",
        b"\t",
        b"|",
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
    ),
    *(b"nan", b"inf", b"-", b"1e400", b"1" + b"0" * 25, b"0x1p3", b"9999-12-31", b"null"),
    *(b"[", b"]", b"{", b"}", b"=", b"[[penalties]]", b"strength", b"\xe2\x80\xa8"),
    b"\x00\x00\x08\x03",
)


@dataclass
class Guided:
    """One target, the inputs that showed something new, and what went wrong."""

    target: Target
    corpus: list[bytes]
    allowed: tuple[type[Exception], ...]
    draw: random.Random
    seen: set[tuple[str, int, int]] = field(default_factory=set)
    tried: int = 0
    refused: int = 0
    failures: dict[str, bytes] = field(default_factory=dict)

    def run(self, *, count: int = 0, seconds: float = 0.0) -> None:
        """So many inputs, or as many as fit into a time."""
        for content in list(self.corpus):
            self.once(content)
        end = time.monotonic() + seconds
        while self.tried < count or time.monotonic() < end:
            content = self.changed(self.draw.choice(self.corpus))
            if self.once(content) and len(content) < 20_000:
                self.corpus.append(content)

    def once(self, content: bytes) -> bool:
        """Whether the input reached something new."""
        self.tried += 1
        before, other = len(self.seen), sys.gettrace()  # that of a measured coverage
        sys.settrace(self.trace)
        try:
            self.target(content)
        except self.allowed:
            self.refused += 1
        except Exception as error:
            sys.settrace(other)
            self.failures.setdefault(f"{type(error).__name__}: {str(error)[:200]}", content)
        finally:
            sys.settrace(other)
        return len(self.seen) > before

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(PACKAGE):
            return None
        last = 0

        def lines(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            if event == "line":
                self.seen.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return lines

        return lines

    def changed(self, content: bytes) -> bytes:
        """The content after one to four random changes."""
        for _ in range(self.draw.randint(1, 4)):
            place = self.draw.randint(0, len(content))
            end = min(place + self.draw.choice((1, 1, 2, 4, 16, 64)), len(content))
            piece = self.draw.choice(
                (
                    self.draw.choice(WORDS),
                    self.draw.randbytes(self.draw.randint(1, 4)),
                    content[place:end] * 2,
                    self.draw.choice(self.corpus)[: self.draw.randint(0, 80)],
                    b"",
                )
            )
            content = (
                content[:place] + piece + content[end if self.draw.random() < 0.6 else place :]
            )
        return content
