"""Step hooks that run once around the outermost `step`, and report exceptions.

torch wraps `step` in every optimizer class, so hooks run again within a `step` that calls
`super().step()`, and post hooks do not run after an exception. Here only the outermost call
counts, and a guard around the optimizer's `step` reports exceptions immediately.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import nn, optim

Args = tuple[object, ...]
Options = dict[str, object]
NewArguments = tuple[Args, Options] | None  # new arguments of a step, None if unchanged
Closure = Callable[..., object]
Result = TypeVar("Result")
_TORCH = cast(Any, optim.Optimizer.profile_hook_step).__code__.co_filename


class StepHooks:
    """Three functions on the steps of an optimizer.

    Attributes:
        on_start: called with the arguments of the outermost `step`; may return new ones as
            (args, kwargs).
        on_end: called after that `step` returns.
        on_failure: called if it, or one of the two, raises.
        owner: the owner of the functions.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        on_start: Callable[[Args, Options], NewArguments],
        on_end: Callable[[], None],
        on_failure: Callable[[], None],
        *,
        owner: object,
    ) -> None:
        self.on_start, self.on_end, self.on_failure = on_start, on_end, on_failure
        self.owner = owner
        self._depth = 0
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(exclude_from_compile(self._enter)),
            optimizer.register_step_post_hook(exclude_from_compile(self._exit)),
        ]
        self._guarded_hooks = _install_guard(optimizer)
        self._guarded_hooks.append(self)

    def remove(self) -> None:
        """Remove the hooks from the optimizer, and its guard if no others are left."""
        for handle in self._handles:
            handle.remove()
        if self in self._guarded_hooks:
            self._guarded_hooks.remove(self)
        if not self._guarded_hooks:
            _remove_guard(self._optimizer)

    def fail(self) -> None:
        """Report that the current step raised."""
        self._depth = 0
        self.on_failure()

    def _enter(self, optimizer: optim.Optimizer, args: Args, kwargs: Options) -> NewArguments:
        if self._depth and _count_active_steps(optimizer) == 1:
            self.fail()  # the last step raised outside the guard
        self._depth += 1
        return self.on_start(args, kwargs) if self._depth == 1 else None

    def _exit(self, optimizer: optim.Optimizer, args: Args, kwargs: Options) -> None:
        if not self._depth:
            return  # attached within this step
        self._depth -= 1
        if self._depth and _count_active_steps(optimizer) == 1:
            self._depth = 0  # an inner step raised, and the outer one continued
        if not self._depth:
            self.on_end()


class EvalHook:
    """Two functions around an optimizer's `eval`, which swaps an average into the parameters.

    Attributes:
        before: called with the trained weights still in place.
        after: called with the result of `before`, once they are swapped.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        before: Callable[[], Result],
        after: Callable[[Result], None],
    ) -> None:
        self._optimizer = optimizer
        self._earlier = cast(Any, optimizer).eval

        def evaluate(*args: object, **kwargs: object) -> object:
            trained = before()
            result = self._earlier(*args, **kwargs)
            after(trained)
            return result

        self._evaluate = evaluate
        vars(optimizer)["eval"] = evaluate

    def remove(self) -> None:
        """Restore the optimizer's `eval`, unless it was wrapped since."""
        if vars(self._optimizer).get("eval") is self._evaluate:
            vars(self._optimizer)["eval"] = self._earlier


def with_closure(
    args: Args, kwargs: Options, change: Callable[[Closure], Closure]
) -> NewArguments:
    """Change the closure in a step hook's arguments; None if there is none.

    It is the argument named closure or the first function; the optimizer itself is the first
    argument.
    """
    if callable(closure := kwargs.get("closure")):
        return args, {**kwargs, "closure": change(closure)}
    for place, given in enumerate(args[1:], 1):
        if callable(given) and not isinstance(given, nn.Module):
            return (*args[:place], change(given), *args[place + 1 :]), kwargs
    for name, given in kwargs.items():
        if callable(given) and not isinstance(given, nn.Module):
            return args, {**kwargs, name: change(given)}
    return None


def hook_owners(optimizer: optim.Optimizer) -> list[object]:
    """Return the owners of all hooks on the steps of this optimizer."""
    guard = vars(optimizer).get("step")
    return [one.owner for one in getattr(guard, "hooks", ())]


def _install_guard(optimizer: optim.Optimizer) -> list[StepHooks]:
    """Guard the optimizer's `step`, so that exceptions reach the hooks; return those."""
    earlier = vars(optimizer).get("step")  # such as a learning rate scheduler's wrapper
    if hasattr(earlier, "guards"):  # also within a scheduler's wrapper
        return cast(Any, earlier).hooks
    hooks: list[StepHooks] = []

    @functools.wraps(earlier or type(optimizer).step)
    def step(self: optim.Optimizer, *args: object, **kwargs: object) -> object:
        try:
            own = cast(Closure, type(self).step)
            return earlier(*args, **kwargs) if earlier else own(self, *args, **kwargs)
        except BaseException:
            for one in tuple(hooks):
                one.fail()
            raise

    guard = cast(Any, step)
    guard.guards, guard.earlier, guard.hooks = step, earlier, hooks
    vars(optimizer)["step"] = types.MethodType(step, optimizer)
    return hooks


def _remove_guard(optimizer: optim.Optimizer) -> None:
    """Restore the optimizer's `step`, unless it was wrapped since."""
    guard = vars(optimizer).get("step")
    if getattr(guard, "__func__", None) is getattr(guard, "guards", guard):
        del vars(optimizer)["step"]
        if cast(Any, guard).earlier is not None:
            vars(optimizer)["step"] = cast(Any, guard).earlier


def _count_active_steps(optimizer: optim.Optimizer) -> int:
    """Count the active calls of this optimizer's `step` on the stack, including this hook's."""
    count, frame = 0, cast("FrameType | None", sys._getframe(1))
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _TORCH and "wrapper" in code.co_name:
            count += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return count


def exclude_from_compile(hook: Callable[..., Result]) -> Callable[..., Result]:
    """Exclude the hook from the graph if the optimizer's step is compiled."""
    # Creating the optimizer imported the compiler, unless the command line prevents it.
    compiler = "torch._dynamo" in sys.modules
    apart = cast(Any, torch.compiler.disable)(hook) if compiler else hook

    def call(optimizer: optim.Optimizer, args: object, kwargs: object) -> Result:
        if torch.compiler.is_compiling():
            return apart(optimizer, args, kwargs)
        return hook(optimizer, args, kwargs)  # the indirection costs as much as a small kernel

    return call
