"""Whether weights are trained without us: hooks lost, another optimizer, no call of `step`,
a wrapper that goes on after it, gradients that a step computes itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn, optim
from torch.utils.hooks import RemovableHandle

from tikhon.regularizer.targets import is_lazy, local

_EDITS = 4  # changes that a user's own code makes to a weight between attaching and training
_SAMPLE = 16
_PERIODS = 13  # steps in which weights that move between them are looked for


class Activity:
    """What one parameter was after our last step, to notice training that goes on without us.

    Between two of our steps others may move it as well (a second optimizer on a shared trunk,
    the two passes of SAM): the most that was seen between two of them is allowed again.
    """

    def __init__(self, optimizer: optim.Optimizer, param: nn.Parameter | None, steps: int) -> None:
        self.optimizer, self.param = optimizer, param
        self.uncounted = steps_of(optimizer) - steps  # steps of the optimizer that were not ours
        self._allowed = 1  # as by weights that a user loads
        self._begun = 0
        self._acted = False
        self._sample: Tensor | None = None  # of the weights, until our first step
        self.look()

    def begin(self) -> None:
        """Our step begins."""
        if self.param is not None:
            self._begun = self.param._version
            if self._acted:
                self._allowed = max(self._allowed, self._begun - self._version)

    def moved(self) -> None:
        """The optimizer has made its move of this step."""
        if self.param is not None:
            self._allowed = max(self._allowed, self.param._version - self._begun)

    def end(self) -> None:
        """Our step ends."""
        self._acted = True
        self.look()

    def trained_without_us(self, steps: int) -> bool:
        """Whether the parameter has been trained since our last step."""
        if steps_of(self.optimizer) - self.uncounted > steps:
            return True
        if self.param is None or is_lazy(self.param):
            return False
        moved, grad = self.param._version - self._version, self.param.grad
        fresh = grad is not None and (self._grad() is not grad or grad._version != self._backward)
        if self._acted:
            return fresh and moved > self._allowed
        if moved:
            return moved > _EDITS or (fresh and moved > 1)
        # moved behind autograd's back, as by `param.data.sub_`
        return self._sample is not None and not torch.equal(self._sample, _sample(self.param))

    def look(self) -> None:
        """What the parameter is now is known."""
        param = self.param
        if param is None:
            return
        readable = not (self._acted or is_lazy(param) or param.is_meta)
        self._sample = _sample(param) if readable else None
        grad = param.grad
        self._version = param._version
        self._grad: Callable[[], Tensor | None] = _nothing if grad is None else weakref.ref(grad)
        self._backward = 0 if grad is None else grad._version


class Drift:
    """Whether weights move between our steps, so that zeros and bounds do not outlast these.

    Wrappers do that which average the weights with copies of their own (Lookahead) or go on when
    the optimizer inside has stepped, also those that put back before the next step what they have
    moved (schedule-free wrappers): the weights are looked at where the next gradient arrives, too.
    A perturbation that is taken back after that (SAM) is none.
    """

    def __init__(self, param: nn.Parameter) -> None:
        self._param = param
        self._found: Tensor | None = None  # at the beginning of a step
        self._left: Tensor | None = None  # at its end
        self._strayed = False  # where the next gradient arrived
        self._arrival = Arrival(self._stray)
        self._steps = self._moved = 0

    @property
    def over(self) -> bool:
        """Whether it has looked for long enough."""
        return self._steps >= _PERIODS or is_lazy(self._param)

    def begin(self) -> bool:
        """A step begins; whether the weights have now moved between steps twice."""
        self.stop()
        now = _sample(self._param)
        self._moved += self._strayed or self._apart(now)
        self._found, self._steps, self._strayed = now, self._steps + 1, False
        return self._moved > 1

    def end(self) -> None:
        """It has ended."""
        self._left = _sample(self._param)
        self._arrival.expect(self._param)

    def stop(self) -> None:
        """Look no more at gradients that arrive."""
        self._arrival.arrived()

    def _stray(self) -> None:
        self._strayed = self._apart(_sample(self._param))

    def _apart(self, now: Tensor) -> bool:
        if self._left is None or self._found is None:
            return False
        between, ours = (now - self._left).norm(), (self._left - self._found).norm()
        rounding = 4 * torch.finfo(now.dtype).eps * self._left.norm()
        return bool(between > 0.01 * ours + rounding)


class Arrival:
    """Whether a gradient arrives once it is expected, and what is done with the first one."""

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self._then = then
        self._handle: RemovableHandle | None = None
        self._arrived = False

    def expect(self, param: nn.Parameter) -> None:
        """From here on, for this parameter's gradient."""
        if param.requires_grad and param.is_leaf:
            self._handle = param.register_post_accumulate_grad_hook(self._arrive)

    def arrived(self) -> bool:
        """Whether one has arrived; it is expected no more."""
        self._stop()
        arrived, self._arrived = self._arrived, False
        return arrived

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _arrive(self, param: Tensor) -> None:
        self._stop()
        self._arrived = True
        if self._then is not None:
            self._then()


def steps_of(optimizer: optim.Optimizer) -> int:
    """The largest step counter in the optimizer's state, 0 if it keeps none."""
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    return int(max((state.get("step", 0) for state in states), default=0))


def _sample(param: nn.Parameter) -> Tensor:
    weights = local(param).flatten()
    return weights[:: max(1, weights.numel() // _SAMPLE)][:_SAMPLE].clone()


def _nothing() -> None:
    return None
