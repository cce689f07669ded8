"""draft"""
from __future__ import annotations
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

@dataclass
class Setup:
    model: Any
    data: Any
    loss: Any
    optimizer: Any = None
    options: dict = field(default_factory=dict)

@dataclass(frozen=True)
class Program:
    name: str
    cause: str
    accepted: tuple
    source: str
    make: Callable[[bool], Setup]

PROGRAMS: dict[str, Program] = {}

def program(cause, source, accepted=()):
    def note(make):
        PROGRAMS[make.__name__] = Program(make.__name__, cause, (cause, *accepted), source, make)
        return make
    return note
