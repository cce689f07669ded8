"""How much of an exam is taken, and what it came to.

`TIKHON_CHAOS=1` asks for the long form, another number for that share of it (0.1 for a tenth);
`TIKHON_CHAOS_SEED` draws other examples.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass, field

SHARE = float(os.environ.get("TIKHON_CHAOS", "0"))
SEED = int(os.environ.get("TIKHON_CHAOS_SEED", "0"))


def count(quick: int, full: int) -> int:
    """How many examples: the quick form, or the share of the full one that is asked for."""
    return max(quick, round(full * SHARE))


def rng(name: object) -> random.Random:
    """The random numbers of one exam."""
    return random.Random(f"{SEED}-{name}")


@dataclass
class Tally:
    """Tried, survived (as if nothing had been), noticed (refused by name); the rest is lost."""

    exam: str
    tried: int = 0
    survived: int = 0
    noticed: int = 0
    lost: list[str] = field(default_factory=list)

    def add(self, outcome: str, what: str = "") -> None:
        """One example: "survived", "noticed", or what went wrong with it."""
        self.tried += 1
        if outcome in ("survived", "noticed"):
            setattr(self, outcome, getattr(self, outcome) + 1)
        else:
            self.lost.append(f"{what}: {outcome}")
            print(f"\nlost: {self.lost[-1]}", file=sys.__stdout__, flush=True)

    def close(self) -> None:
        """Print the figures; fail for whatever was lost."""
        print(
            f"\n{self.exam}: {self.tried} tried, {self.survived} survived, "
            f"{self.noticed} noticed, {len(self.lost)} lost"
        )
        assert not self.lost, "\n".join(self.lost[:10])
        assert self.tried == self.survived + self.noticed > 0


def disorder(text: str) -> str:
    """What an error must never look like, if `text` looks like it."""
    for sign in ("Traceback", "unexpected"):
        if sign in text:
            return text[-600:]
    return ""


def timeless(value: object) -> object:
    """A document without what a clock or a folder's name decides."""
    gone = {
        "seconds",
        "microseconds",
        "command",
        "next",
        "output",
        "report",
        "path",
        "reason",
        "notice",
    }
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in gone}
    if isinstance(value, list):
        return [timeless(item) for item in value]
    return value
