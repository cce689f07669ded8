"""Torch calls of a forward pass and its loss: reshapes, softmaxes, detaches, sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tikhon.diagnosis.functions import BINARY, ONE_SIDED, Function
from tikhon.diagnosis.modes import Args, Functions, Located, Options, function_name, user_line

DROPOUTS = set(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout "
    "feature_dropout".split()
)
RANDOM_FUNCTIONS = set(
    "bernoulli rand rand_like randn randn_like normal multinomial randperm randint uniform "
    "exponential rsample rrelu gumbel_softmax".split()
)
DETACHING = set(
    "detach data argmax argmin argsort item tolist numpy __float__ tensor long int bool "
    "round".split()
)
# these cut the graph if their truth values or indices are used
PARTLY_DETACHING = set(
    "gt ge lt le eq ne __gt__ __ge__ __lt__ __le__ __eq__ topk max min sort kthvalue mode".split()
)


@dataclass(frozen=True)
class Call:
    """One call of a torch function: its name, the module, the user's line, and shapes."""

    name: str
    module: str
    line: str
    shapes: tuple[tuple[int, ...], ...] = ()
    output: tuple[int, ...] | None = None
    dim: int | None = None
    attached: bool = False  # some input requires a gradient
    cut: bool = False  # and the output does not
    parts: bool = False  # and a part of the output does not
    silent: bool = False  # called without gradients in a pass that has them
    target_range: tuple[float, float] | None = None  # of a binary cross-entropy
    swapped: bool = False  # of a loss: only the target argument requires a gradient

    @property
    def place(self) -> str:
        """The line if known, else the module."""
        return self.line or self.module or "forward"


class CallTrace(Located):
    """Context that records the calls of one forward pass and its loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: list[Call] = []

    def named(self, *names: str) -> list[Call]:
        """Return the calls of functions with these names."""
        return [call for call in self.calls if call.name in names]

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Record the call and return its result."""
        inputs = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        graded = torch.is_grad_enabled()
        attached = any(t.requires_grad for t in inputs)
        shapes = tuple(tuple(t.shape) for t in inputs)  # before an in-place reshape
        output = func(*args, **kwargs)
        name = function_name(func)
        has = isinstance(output, Tensor)
        checked = name in ONE_SIDED
        target_range, swapped = _target_range(name, args, kwargs) if checked else (None, False)
        loses = attached and graded and not (has and output.requires_grad)
        self.calls.append(
            Call(
                name,
                self.stack[-1],
                user_line(),
                shapes,
                tuple(output.shape) if has else None,
                _dim(name, args, kwargs),
                attached,
                loses and name in DETACHING,
                loses and name in PARTLY_DETACHING,
                self.graded and not graded and attached,
                target_range,
                swapped,
            )
        )
        return output


def _target_range(
    name: str, args: Args, kwargs: Options
) -> tuple[tuple[float, float] | None, bool]:
    """Return the range of the targets, and whether outputs are passed as targets.

    Probabilities may be, on purpose, in a reversed divergence of distributions.
    """
    arguments = {**dict(zip(("input", "target"), args)), **kwargs}
    answer, goal = arguments.get("input"), arguments.get("target")
    if not isinstance(answer, Tensor) or not isinstance(goal, Tensor) or not goal.numel():
        return None, False
    value_range = float(goal.detach().min()), float(goal.detach().max())
    swapped = goal.requires_grad and not answer.requires_grad
    if name in ("cross_entropy", "kl_div"):
        swapped = swapped and value_range[0] < 0 and not kwargs.get("log_target")
    return value_range if name in BINARY else None, swapped


class WithoutDetach(Functions):
    """Context in which `.detach()`, `.data` and `no_grad` have no effect."""

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Return the tensor itself instead of a detached one."""
        if function_name(func) in ("detach", "detach_", "data") and args:
            return args[0]
        with torch.enable_grad():
            return func(*args, **kwargs)


class WithoutDropout(Functions):
    """Context in which functional dropout is the identity and random slopes are their mean."""

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Return the input of a dropout unchanged."""
        if function_name(func) in DROPOUTS and args:
            return args[0]
        if function_name(func) == "rrelu":
            return torch.nn.functional.rrelu(*args[:3])
        return func(*args, **kwargs)


class LeakyActivations(Functions):
    """Context in which flat parts of activations have a tenth of the maximum slope."""

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Return the leaky version of an activation."""
        name = function_name(func)
        if name in ("relu", "relu6"):
            return torch.nn.functional.leaky_relu(args[0], 0.1)
        slope = {"tanh": 0.1, "sigmoid": 0.025}.get(name)
        return func(*args, **kwargs) if slope is None else func(*args, **kwargs) + slope * args[0]


def _dim(name: str, args: Args, kwargs: Options) -> int | None:
    """Return the axis of a softmax, counted from the front; None means torch's old default."""
    values = [*args[:2], None, None]
    if name not in ("softmax", "log_softmax") or not isinstance(values[0], Tensor):
        return None
    arguments = kwargs.get("dim", values[1])
    ndim = values[0].ndim
    if not isinstance(arguments, int):
        return 0 if ndim in (0, 1, 3) else 1
    return arguments % ndim if ndim else None
