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

T = TypeVar("T")
MAX_FRAMES = 12  # functions from the step of the optimizer outwards
OWN_REFERENCES = 3  # to the variables of a frame: its own, the one here, that of the count
MAX_ENTRIES = 64  # entries of a list or a dictionary that are looked at
_LIBRARIES = (torch, __import__("tikhon"))
_LIBRARY_FOLDERS = tuple(str(Path(library.__file__ or "").parent) for library in _LIBRARIES)
_KINDS = (
    nn.Module,
    Tensor,  # trained leaves that stand by themselves
    Optimizer,
    LRScheduler,
    DataLoader,
    torch.amp.GradScaler,
    itertools.cycle,
)
_NOT_SEARCHED = (
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


class LoopVariables:
    """What the functions that called this hold in variables, and in objects that these hold."""

    def __init__(self, frame: FrameType | None) -> None:
        self._found: dict[type, dict[str, Any]] = {kind: {} for kind in _KINDS}
        self.modules: list[tuple[str, nn.Module]] = []  # under all their names
        seen: set[int] = set()
        for name, value in _named_variables(frame):
            kind = _searched_type(type(value))
            if kind is nn.Module:
                self.modules.append((name, value))
            if kind is None or id(value) in seen:
                continue
            seen.add(id(value))
            if kind is not Tensor or (value.requires_grad and value.is_leaf):
                self._found[kind].setdefault(name, value)

    def of_type(self, kind: type[T]) -> Mapping[str, T]:
        """Values of one of the kinds, each under the name of its variable."""
        return self._found[kind]


@lru_cache(512)
def _searched_type(kind: type) -> type | None:
    """The kind of a type's values; asked of the type, for an instance may be a proxy."""
    return next((known for known in _KINDS if issubclass(kind, known)), None)


@lru_cache(512)
def _contents_of(kind: type) -> str:
    """What is looked at in values of a type: their entries, their attributes, or nothing."""
    if issubclass(kind, dict | list | tuple):
        return "entries"
    return "" if issubclass(kind, _NOT_SEARCHED) else "attributes"


def _named_variables(frame: FrameType | None) -> Iterator[tuple[str, Any]]:
    count, namespaces = 0, set[int]()
    while frame is not None and count < MAX_FRAMES:
        if not frame.f_code.co_filename.startswith(_LIBRARY_FOLDERS):
            count += 1
            found = _frame_variables(frame)
            if id(frame.f_globals) not in namespaces:
                namespaces.add(id(frame.f_globals))
                found += list(frame.f_globals.items())
            for name, value in found:
                yield name, value
                if _contents_of(type(value)):
                    yield from _contents(name, value)
        frame = frame.f_back


def _frame_variables(frame: FrameType) -> list[tuple[str, object]]:
    """The local ones of a function, of which nothing is kept alive.

    Until Python 3.13 the dictionary of a running function is a copy that stays with it, and with
    it the batch and the graph of this step; it is emptied, unless the user holds it (`locals()`).
    """
    if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return []  # a module, whose variables are its globals
    local_variables = frame.f_locals
    found = list(local_variables.items())
    if type(local_variables) is dict and sys.getrefcount(local_variables) <= OWN_REFERENCES:
        local_variables.clear()
    return found


def _contents(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a value holds itself."""
    if _contents_of(type(value)) == "entries":
        if len(value) > MAX_ENTRIES:
            return
        pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
        yield from (
            (f"{name}[{key!r}]", part) for key, part in pairs if _searched_type(type(part))
        )
        return
    try:
        attributes = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return
    if isinstance(attributes, dict):
        pairs = list(attributes.items())
        yield from ((f"{name}.{key}", part) for key, part in pairs if _searched_type(type(part)))
