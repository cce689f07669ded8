"""What a loop holds beside its model and optimizer, found among the variables of its functions."""

from __future__ import annotations

import inspect
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

T = TypeVar("T")
FRAMES = 12  # functions from the step of the optimizer outwards
OWN = 3  # references to the variables of a frame: its own, the one here, that of the count
MANY = 64  # entries of a list or a dictionary that are looked at
_OWN = tuple(str(Path(module.__file__ or "").parent) for module in (torch, __import__("tikhon")))
_KINDS = (
    nn.Module,
    Tensor,  # trained leaves that stand by themselves
    Optimizer,
    LRScheduler,
    DataLoader,
    torch.amp.GradScaler,
    itertools.cycle,
    _BaseDataLoaderIter,
)
_PLAIN = (
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    type,
    str,
    bytes,
    int,
    float,
    complex,
    *_KINDS,
)


class Surroundings:
    """What the functions that called this hold in variables, and in objects that these hold."""

    def __init__(self, frame: FrameType | None) -> None:
        self._found: dict[type, dict[str, Any]] = {kind: {} for kind in _KINDS}
        seen: set[int] = set()
        for name, value in _named(frame):
            kind = _kind(type(value))
            if kind is None or id(value) in seen:
                continue
            seen.add(id(value))
            if kind is not Tensor or (value.requires_grad and value.is_leaf):
                self._found[kind].setdefault(name, value)

    def of(self, kind: type[T]) -> Mapping[str, T]:
        """Values of one of the kinds, each under the name of its variable."""
        return self._found[kind]


@lru_cache(512)
def _kind(kind: type) -> type | None:
    """The kind of a type's values; asked of the type, for an instance may be a proxy."""
    return next((known for known in _KINDS if issubclass(kind, known)), None)


@lru_cache(512)
def _holds(kind: type) -> str:
    """What is looked at in values of a type: their entries, their attributes, or nothing."""
    if issubclass(kind, dict | list | tuple):
        return "entries"
    return "" if issubclass(kind, _PLAIN) else "attributes"


def _named(frame: FrameType | None) -> Iterator[tuple[str, Any]]:
    count, spaces = 0, set[int]()
    while frame is not None and count < FRAMES:
        if not frame.f_code.co_filename.startswith(_OWN):
            count += 1
            found = _variables(frame)
            if id(frame.f_globals) not in spaces:
                spaces.add(id(frame.f_globals))
                found += list(frame.f_globals.items())
            for name, value in found:
                yield name, value
                if _holds(type(value)):
                    yield from _within(name, value)
        frame = frame.f_back


def _variables(frame: FrameType) -> list[tuple[str, object]]:
    """The local ones of a function, of which nothing is kept alive.

    Until Python 3.13 the dictionary of a running function is a copy that stays with it, and with
    it the batch and the graph of this step; it is emptied, unless the user holds it (`locals()`).
    """
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return []  # a module, whose variables are its globals
    space = frame.f_locals
    found = list(space.items())
    if type(space) is dict and sys.getrefcount(space) <= OWN:
        space.clear()
    return found


def _within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds itself."""
    if _holds(type(value)) == "entries":
        if len(value) > MANY:
            return
        pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
        yield from ((f"{name}[{key!r}]", part) for key, part in pairs if _kind(type(part)))
        return
    try:
        held = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return
    if isinstance(held, dict):
        pairs = list(held.items())
        yield from ((f"{name}.{key}", part) for key, part in pairs if _kind(type(part)))
