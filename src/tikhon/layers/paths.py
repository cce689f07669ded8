"""Locate a module in its model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from types import FrameType
from typing import cast

import torch
from torch import nn

from tikhon.wrappers import named_modules

Pattern = str | type[nn.Module]


def matches(pattern: Pattern, path: str, module: nn.Module) -> bool:
    """Whether a shell glob on module paths or a module type names this module."""
    if isinstance(pattern, str):
        return fnmatchcase(path, pattern)
    if not isinstance(pattern, type):
        raise TypeError(
            f"a pattern is a glob on module paths or a module type, received {pattern!r}"
        )
    return isinstance(module, pattern)


def pattern_name(pattern: Pattern) -> str:
    """The pattern as messages name it."""
    return pattern if isinstance(pattern, str) else pattern.__name__


def path_in_running_model(module: nn.Module) -> str:
    """The path of `module` in the outermost module whose method is running, or "".

    It reads the call stack, so that a module that fails can say where it is in a model that
    nothing has walked over before. For messages of errors only.
    """
    if torch.compiler.is_compiling():  # the stack cannot be traced; with fullgraph this is raised
        torch._dynamo.graph_break(f"{type(module).__name__} refuses its input")
    walk: Callable[[nn.Module], str] = _outermost_path
    if "torch._dynamo" in sys.modules:
        walk = torch.compiler.disable(walk)  # type: ignore[assignment]
    return walk(module)


def _outermost_path(module: nn.Module) -> str:
    path, frame = "", cast("FrameType | None", sys._getframe(1))
    while frame is not None:
        code = frame.f_code
        caller = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        method = getattr(type(caller), code.co_name, None)
        if isinstance(caller, nn.Module) and getattr(method, "__code__", None) is code:
            path = next((p for p, m in named_modules(caller) if m is module), path)
        frame = frame.f_back
    return path
