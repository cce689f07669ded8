"""What a loop holds beside its model and optimizer, found among the variables of its functions."""

from __future__ import annotations

import inspect
import itertools
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

FRAMES = 12  # functions from the step of the optimizer outwards
OWN = 3  # references to the variables of a frame: its own, the one here, that of the count
MANY = 64  # entries of a list or a dictionary that are looked at
_OWN = tuple(str(Path(module.__file__ or "").parent) for module in (torch, __import__("tikhon")))
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
    bool,
    Tensor,
    nn.Module,
    Optimizer,
    LRScheduler,
    DataLoader,
    _BaseDataLoaderIter,
    torch.amp.GradScaler,
)


@dataclass(frozen=True)
class Surroundings:
    """What was found, each under the name of its variable."""

    modules: Mapping[str, nn.Module]
    tensors: Mapping[str, Tensor]  # trained leaves that stand by themselves
    optimizers: Mapping[str, Optimizer]
    schedulers: Mapping[str, LRScheduler]
    loaders: Mapping[str, DataLoader[object]]
    scalers: Mapping[str, torch.amp.GradScaler]
    cycles: Mapping[str, itertools.cycle[object]]
    iterators: Mapping[str, _BaseDataLoaderIter]  # over a loader


def surroundings(frame: FrameType | None) -> Surroundings:
    """Among the variables of the functions that called this, and of the objects they hold."""
    found = Surroundings({}, {}, {}, {}, {}, {}, {}, {})
    kinds = (
        (found.modules, nn.Module),
        (found.optimizers, Optimizer),
        (found.schedulers, LRScheduler),
        (found.loaders, DataLoader),
        (found.scalers, torch.amp.GradScaler),
        (found.cycles, itertools.cycle),
        (found.iterators, _BaseDataLoaderIter),
    )
    seen: set[int] = set()
    for name, value in _named(frame):
        if id(value) in seen:
            continue
        seen.add(id(value))
        for kept, kind in kinds:
            if issubclass(type(value), kind):  # `isinstance` would ask proxies
                kept.setdefault(name, value)  # pyright: ignore[reportAttributeAccessIssue]
        if issubclass(type(value), Tensor):
            tensor = cast(Tensor, value)
            if tensor.requires_grad and tensor.is_leaf:
                found.tensors.setdefault(name, tensor)  # pyright: ignore[reportAttributeAccessIssue]
    return found


def _named(frame: FrameType | None) -> Iterator[tuple[str, object]]:
    count, spaces = 0, set[int]()
    while frame is not None and count < FRAMES:
        if not frame.f_code.co_filename.startswith(_OWN):
            count += 1
            found = _variables(frame)
            if id(frame.f_globals) not in spaces:
                spaces.add(id(frame.f_globals))
                found += list(frame.f_globals.items())
            for name, value in found:
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


def _within(name: str, value: Any) -> Iterator[tuple[str, object]]:
    """A value, and what it holds itself."""
    yield name, value
    if issubclass(type(value), dict | list | tuple):
        if len(value) <= MANY:
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"{name}[{key!r}]", part) for key, part in list(pairs))
    elif not issubclass(type(value), _PLAIN):
        try:
            held = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return
        if isinstance(held, dict):
            yield from ((f"{name}.{key}", part) for key, part in list(held.items()))
