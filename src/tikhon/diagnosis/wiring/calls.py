"""What a forward pass and its loss call: reshapes, softmaxes, cuts of the graph, random numbers.

A function mode sees every torch function with its arguments; the module it is called in comes from
forward hooks, and the line from the first frame that is neither torch's nor tikhon's.
"""

from __future__ import annotations

import linecache
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tikhon.diagnosis.functions import ATTENDING, BINARY, ONE_SIDED, Function

LOSS = "the loss"  # the place of what is called outside of the model
_OURS = str(Path(__file__).parents[2]) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
DROPOUTS = {
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "feature_dropout",
}
DRAWS = {
    "bernoulli",
    "rand",
    "rand_like",
    "randn",
    "randn_like",
    "normal",
    "multinomial",
    "randperm",
    "randint",
    "uniform",
    "exponential",
    "rsample",
}
CUTS = {
    "detach",
    "data",
    "argmax",
    "item",
    "tolist",
    "numpy",
    "__float__",
    "tensor",
    "long",
    "int",
    "round",
}


@dataclass(frozen=True)
class Call:
    """One call of a torch function: its name, the module, the user's line, and shapes."""

    name: str
    module: str
    line: str
    shapes: tuple[tuple[int, ...], ...] = ()
    output: tuple[int, ...] | None = None
    dim: int | None = None
    attached: bool = False  # some input has a gradient to receive
    cut: bool = False  # and the output has none
    silent: bool = False  # called without gradients, inside of a pass that has them
    goals: tuple[float, float] | None = None  # range of the targets of a binary cross-entropy
    swapped: bool = False  # of a loss: only what stands for the targets has a gradient to receive

    @property
    def place(self) -> str:
        """The line where there is one, else the module."""
        return self.line or self.module or "forward"


class Located(TorchFunctionMode):
    """Context in which the module that is at work is known: its name stands on top of a stack."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._stack = [LOSS]
        self._handles: list[RemovableHandle] = []
        self._graded = torch.is_grad_enabled()

    def __enter__(self) -> Self:
        self._graded = torch.is_grad_enabled()
        for name, module in self._model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(self._enter(name)),
                module.register_forward_hook(self._leave, always_call=True),
            ]
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda module, args: self._stack.append(name)

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if len(self._stack) > 1:
            self._stack.pop()


class Calls(Located):
    """Context in which the calls of one forward pass and its loss are recorded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: list[Call] = []

    def named(self, *names: str) -> list[Call]:
        """The calls of functions with these names."""
        return [call for call in self.calls if call.name in names]

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        graded = torch.is_grad_enabled()
        attached = any(t.requires_grad for t in inputs)
        shapes = tuple(tuple(t.shape) for t in inputs)  # before an in-place reshape
        output = func(*args, **kwargs)
        name = function_name(func)
        has = isinstance(output, Tensor)
        goals, swapped = _goals(name, args, kwargs) if name in ONE_SIDED else (None, False)
        self.calls.append(
            Call(
                name,
                self._stack[-1],
                user_line(),
                shapes,
                tuple(output.shape) if has else None,
                _dim(name, args, kwargs),
                attached,
                attached and graded and not (has and output.requires_grad) and name in CUTS,
                self._graded and not graded and attached,
                goals,
                swapped,
            )
        )
        return output


def _goals(
    name: str, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[tuple[float, float] | None, bool]:
    """The range of the targets, and whether answers stand in their place.

    Probabilities may stand there on purpose where a loss of distributions is turned round.
    """
    given = {**dict(zip(("input", "target"), args)), **kwargs}
    answer, goal = given.get("input"), given.get("target")
    if not isinstance(answer, Tensor) or not isinstance(goal, Tensor) or not goal.numel():
        return None, False
    ends = float(goal.detach().min()), float(goal.detach().max())
    swapped = goal.requires_grad and not answer.requires_grad
    if name in ("cross_entropy", "kl_div"):
        swapped = swapped and ends[0] < 0 and not kwargs.get("log_target")
    return ends if name in BINARY else None, swapped


class FirstBad(TorchFunctionMode):
    """Context that keeps the first call which makes a non-finite number of finite ones.

    With `slopes` it is the first whose slope has no finite value: a root or a norm of zero.
    """

    def __init__(self, *, slopes: bool = False) -> None:
        super().__init__()
        self.slopes = slopes
        self.name, self.place = "", ""
        self.smallest: float | None = None

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        output = func(*args, **(kwargs or {}))
        name = function_name(func)
        inputs = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        if self.name or not inputs or not isinstance(output, Tensor):
            return output
        with torch._C.DisableTorchFunction():
            if self.slopes:
                bad = name in STEEP and any(t.requires_grad for t in inputs) and _touches(output)
            else:
                bad = _goes_bad(name, output, inputs)
            if bad:
                self.name, self.place = name, user_line() or name
                parts = inputs[1:] if name in DIVISIONS and len(inputs) > 1 else inputs[:1]
                self.smallest = min(float(t.detach().min()) for t in parts if t.numel())
        return output


STEEP = {"sqrt", "norm", "std", "pow", "__pow__"}  # of which the slope at 0 may be infinite
MASKS = {"masked_fill", "where", "full_like", "full", "triu"}
DIVISIONS = {"div", "true_divide", "__truediv__"}


def _infinite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all())


def _goes_bad(name: str, output: Tensor, inputs: list[Tensor]) -> bool:
    """Whether a call makes what is not finite; scores of -inf are a mask while others are left."""
    if name in ATTENDING:
        numbers = not any(bool(t.detach().isnan().any()) for t in inputs)
        return numbers and bool(output.detach().isnan().any())
    if name in MASKS and bool((output.detach() != math.inf).all()) and not output.isnan().any():
        return False
    return _infinite(output) and not any(_infinite(t) for t in inputs)


def _touches(output: Tensor) -> bool:
    return bool((output.detach() == 0).any())


class Joined(TorchFunctionMode):
    """Context in which nothing is detached: `.detach()`, `.data` and `no_grad` do not cut."""

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if function_name(func) in ("detach", "detach_", "data") and args:
            return args[0]
        with torch.enable_grad():
            return func(*args, **(kwargs or {}))


class Calm(TorchFunctionMode):
    """Context in which functional dropout passes everything."""

    def __torch_function__(
        self,
        func: Function,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = function_name(func)
        if name in DROPOUTS and args:
            return args[0]
        return func(*args, **(kwargs or {}))


def function_name(func: Function) -> str:
    """The name of a torch function without underscores of in-place forms; properties by theirs."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "")
    return name if name.startswith("__") else name.rstrip("_")


def user_line() -> str:
    """`file.py:12: code` of the nearest frame of the user's own code, or nothing."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_OURS):
            return ""
        if not path.startswith(_TORCH) and not path.startswith("<frozen"):
            code = linecache.getline(path, frame.f_lineno, frame.f_globals).strip()
            where = f"{os.path.basename(path)}:{frame.f_lineno}"
            return f"{where}: {code[:70]}" if code else where
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _dim(name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> int | None:
    """The axis of a softmax, counted from the front; what None meant before it had to be given."""
    values = [*args[:2], None, None]
    if name not in ("softmax", "log_softmax") or not isinstance(values[0], Tensor):
        return None
    given = kwargs.get("dim", values[1])
    ndim = values[0].ndim
    if not isinstance(given, int):
        return 0 if ndim in (0, 1, 3) else 1
    return given % ndim if ndim else None
