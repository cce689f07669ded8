"""Contexts that intercept every torch function a program calls, and locate the call."""

from __future__ import annotations

import linecache
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tikhon.diagnosis.functions import Function

LOSS = "the loss"  # the place of calls outside the model
_OURS = str(Path(__file__).parents[1]) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
Args = tuple[Any, ...]
Options = Mapping[str, Any]


class Functions(TorchFunctionMode, ABC):
    """Context in which `call` replaces every torch function."""

    def __torch_function__(
        self, func: Function, types: object, args: Args = (), kwargs: Options | None = None
    ) -> object:
        return self.call(func, args, kwargs or {})

    @abstractmethod
    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Return the result of a call of `func` to the program."""


class Located(Functions):
    """Context that tracks the running module: its name is on top of `stack`."""

    outside = LOSS

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.stack = [self.outside]
        self.graded = torch.is_grad_enabled()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self.graded = torch.is_grad_enabled()
        for name, module in self.model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(partial(self.enter, name), with_kwargs=True),
                module.register_forward_hook(partial(self.leave, name), always_call=True),
            ]
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def enter(
        self, name: str, module: nn.Module, args: Args, kwargs: dict[str, Any]
    ) -> tuple[Args, dict[str, Any]] | None:
        """Run before a module's forward; may return other arguments for it."""
        self.stack.append(name)

    def leave(self, name: str, module: nn.Module, args: Args, output: object) -> None:
        """Run after a module's forward."""
        if len(self.stack) > 1:
            self.stack.pop()


def function_name(func: Function) -> str:
    """Return the name of a torch function or property, without an in-place underscore."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "")
    return name if name.startswith("__") else name.rstrip("_")


def user_line() -> str:
    """Return "file.py:12: code" of the user's line behind the current `Functions.call`, or ""."""
    frame = sys._getframe(3)  # behind `call` and `__torch_function__`
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_OURS):
            return ""
        if not path.startswith(_TORCH) and not path.startswith("<frozen"):
            code = linecache.getline(path, frame.f_lineno, frame.f_globals).strip()
            where = f"{os.path.basename(path)}:{frame.f_lineno}"
            return f"{where}: {code[:70]}" if code else where
        frame = frame.f_back
    return ""


def inside_torch() -> bool:
    """Whether the current `Functions.call` was made by torch itself."""
    return sys._getframe(3).f_code.co_filename.startswith(_TORCH)
