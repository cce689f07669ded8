"""Detect training that bypasses us.

Lost hooks, another optimizer, `step` never called, a wrapper that moves weights afterwards,
gradients recomputed within a step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn, optim
from torch.utils.hooks import RemovableHandle

from tikhon.regularizer.targets import is_lazy, local

_ALLOWED_EDITS = 4  # edits of a weight by user code, between attaching and training
_SAMPLE_SIZE = 16
_DRIFT_STEPS = 13  # steps in which movement between steps is looked for


class BypassDetector:
    """State of a parameter after our last step, to detect training without us.

    Others may also move it between our steps (a second optimizer on a shared trunk, the two passes
    of SAM): up to the largest number of changes seen between two of them is allowed.
    """

    def __init__(self, optimizer: optim.Optimizer, param: nn.Parameter | None, steps: int) -> None:
        self.optimizer, self.param = optimizer, param
        self.uncounted = optimizer_steps(optimizer) - steps  # optimizer steps that were not ours
        self._allowed = 1  # such as loading weights
        self._version_at_start = 0
        self._has_stepped = False
        self._sample: Tensor | None = None  # of the weights, until our first step
        self.record()

    def begin(self) -> None:
        """Note the start of our step."""
        if self.param is not None:
            self._version_at_start = self.param._version
            if self._has_stepped:
                self._allowed = max(self._allowed, self._version_at_start - self._version)

    def record_move(self) -> None:
        """Note the optimizer's move in this step."""
        if self.param is not None:
            self._allowed = max(self._allowed, self.param._version - self._version_at_start)

    def end(self) -> None:
        """Note the end of our step."""
        self._has_stepped = True
        self.record()

    def is_bypassed(self, steps: int) -> bool:
        """Return whether the parameter was trained since our last step."""
        if optimizer_steps(self.optimizer) - self.uncounted > steps:
            return True
        if self.param is None or is_lazy(self.param):
            return False
        moved, grad = self.param._version - self._version, self.param.grad
        fresh = grad is not None and (
            self._grad() is not grad or grad._version != self._grad_version
        )
        if self._has_stepped:
            return fresh and moved > self._allowed
        if moved:
            return moved > _ALLOWED_EDITS or (fresh and moved > 1)
        # changed without autograd noticing, as by `param.data.sub_`
        return self._sample is not None and not torch.equal(
            self._sample, _sample_weights(self.param)
        )

    def record(self) -> None:
        """Record the current state of the parameter."""
        param = self.param
        if param is None:
            return
        readable = not (self._has_stepped or is_lazy(param) or param.is_meta)
        self._sample = _sample_weights(param) if readable else None
        grad = param.grad
        self._version = param._version
        self._grad: Callable[[], Tensor | None] = (
            (lambda: None) if grad is None else weakref.ref(grad)
        )
        self._grad_version = 0 if grad is None else grad._version


class DriftDetector:
    """Detect weights that move between our steps, so that zeros and bounds are lost.

    Wrappers do so that average weights with their own copies (Lookahead), or act after the inner
    optimizer's step, even if they undo it before the next step (schedule-free wrappers): hence
    weights are also checked when the next gradient arrives. Perturbations undone after that (SAM)
    do not count.
    """

    def __init__(self, param: nn.Parameter) -> None:
        self._param = param
        self._at_start: Tensor | None = None  # at the start of a step
        self._at_end: Tensor | None = None  # at its end
        self._drifted_at_gradient = False  # when the next gradient arrived
        self._arrival = GradientArrival(self._check_at_gradient)
        self._steps = self._drift_count = 0

    @property
    def is_done(self) -> bool:
        """Whether enough steps have been checked."""
        return self._steps >= _DRIFT_STEPS or is_lazy(self._param)

    def begin(self) -> bool:
        """Note a step's start; return whether weights have moved between steps twice."""
        self.stop()
        now = _sample_weights(self._param)
        self._drift_count += self._drifted_at_gradient or self._has_drifted(now)
        self._at_start, self._steps, self._drifted_at_gradient = now, self._steps + 1, False
        return self._drift_count > 1

    def end(self) -> None:
        """Note a step's end."""
        self._at_end = _sample_weights(self._param)
        self._arrival.expect(self._param)

    def stop(self) -> None:
        """Stop waiting for gradients."""
        self._arrival.arrived()

    def _check_at_gradient(self) -> None:
        self._drifted_at_gradient = self._has_drifted(_sample_weights(self._param))

    def _has_drifted(self, now: Tensor) -> bool:
        if self._at_end is None or self._at_start is None or now.shape != self._at_end.shape:
            return False
        between, ours = (now - self._at_end).norm(), (self._at_end - self._at_start).norm()
        rounding = 4 * torch.finfo(now.dtype).eps * self._at_end.norm()
        return bool(between > 0.01 * ours + rounding)


class GradientArrival:
    """Detect the arrival of a gradient, and run a callback on the first one."""

    def __init__(self, callback: Callable[[], None] | None = None) -> None:
        self._callback = callback
        self._handle: RemovableHandle | None = None
        self._arrived = False

    def expect(self, param: nn.Parameter) -> None:
        """Start waiting for this parameter's gradient."""
        if param.requires_grad and param.is_leaf:
            self._handle = param.register_post_accumulate_grad_hook(self._on_gradient)

    def arrived(self) -> bool:
        """Return whether a gradient has arrived, and stop waiting."""
        self._stop()
        arrived, self._arrived = self._arrived, False
        return arrived

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _on_gradient(self, param: Tensor) -> None:
        self._stop()
        self._arrived = True
        if self._callback is not None:
            self._callback()


def optimizer_steps(optimizer: optim.Optimizer) -> int:
    """The largest step counter in the optimizer's state, 0 if it keeps none."""
    states = [state for state in optimizer.state.values() if isinstance(state, dict)]
    return int(max((state.get("step", 0) for state in states), default=0))


def _sample_weights(param: nn.Parameter) -> Tensor:
    weights = local(param).flatten()
    return weights[:: max(1, weights.numel() // _SAMPLE_SIZE)][:_SAMPLE_SIZE].clone()
