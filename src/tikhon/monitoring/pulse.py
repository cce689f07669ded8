"""Every step of a watched loop, in as little time as can be; sampled steps are handed on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tikhon.monitoring.company import Company
from tikhon.monitoring.first_bad import Call
from tikhon.monitoring.hooks import Hook
from tikhon.monitoring.sampling import Sampler
from tikhon.monitoring.spikes import SpikeGuard
from tikhon.monitoring.touches import Touches
from tikhon.monitoring.window import readable
from tikhon.regularizer.hooks import exclude_from_compile, with_closure
from tikhon.regularizer.targets import local
from tikhon.wrappers import own_parameters

FEW = 20  # forward passes without a step
SHORT = 64  # entries that python adds up in less time than a kernel takes to begin


class Pulse:
    """Hooks on a model and its optimizer: counts, one small gradient, one version, one rate.

    After a large batch every function and every object comes from slow memory: what a step does
    that is not sampled stands here, flat. The gradient is that of the smallest trained tensor of
    the first layer: whatever goes wrong on the way there or back ends in it. `read` is called
    after a sampled step, `fail` where that gradient is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        every: int,
        *,
        sampler: Sampler,
        guard: SpikeGuard,
        read: Callable[[], None],
        fail: Callable[[], None],
    ) -> None:
        self._model, self._optimizer, self._every = model, optimizer, every
        self._sampler, self._guard, self._read, self._fail = sampler, guard, read, fail
        self.company = Company(model, optimizer, lambda: self.step)
        self.touches = Touches(optimizer)
        self.step = 0
        self.calls: list[Call] = []  # what this step's forward began with
        self.called = False  # since the last step
        self.empty = 0  # steps in a row in which no tensor of the optimizer had a gradient
        self.again = 0  # steps without a pass, along the gradient of the step before
        self.unstepped = 0  # backward passes since steps became rare
        self.usual = 0  # the most forward passes between two steps
        self.late: Tensor | None = None  # whether a gradient was changed after its sampled step
        self._passes = self._earlier = 0  # with a graph: since the last step, and before it
        self._few = FEW  # passes without a step that are nothing special
        self._depth = 0  # a step that calls another runs its hooks again
        self._graded = self._follows = False
        self._rate: object = None
        self._latch: Tensor | None = None  # the first bad step, on its device
        self._stepped: Tensor | None = None  # the gradient of the last step, small as it is
        self._version = 0  # of that
        self._held: tuple[Tensor, int] | None = None  # the gradient of a sampled step, after it
        self._backward: RemovableHandle | None = None  # counts passes once steps are rare
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        self._tensor = _sentinel(model, held)
        self._own = id(self._tensor) in held
        self._whole = self._tensor if self._tensor is not None and readable(self._tensor) else None
        self._short = (
            self._whole is not None and self._whole.ndim == 1 and len(self._whole) <= SHORT
        )
        self._handles = [
            model.register_forward_pre_hook(Hook(self._forward), with_kwargs=True),
            optimizer.register_step_pre_hook(exclude_from_compile(self._before)),
            optimizer.register_step_post_hook(exclude_from_compile(self._after)),
        ]
        self._sampled = True  # the coming step
        sampler.listen((), first=True)

    @property
    def beating(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    @property
    def forwards(self) -> int:
        """Passes of the model that built a graph."""
        return self._earlier + self._passes

    @property
    def batch(self) -> list[Any]:
        """The arguments of the last forward pass."""
        return [call[1:] for call in self.calls[:1]]

    @property
    def bad_step(self) -> int:
        """The step of the first gradient that is not finite, as far as one was seen; this one."""
        if self._latch is not None and math.isfinite(first := float(self._latch)):
            return int(first)
        return self.step

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._sampler.close()
        self._count_no_more()

    # every step

    def _forward(self, module: nn.Module, args: object, kwargs: object) -> None:
        if module is not self._model:  # the loop calls its parts
            if any(module is called for called, _, _ in self.calls):
                self.calls = []
            self.calls.append((module, args, kwargs))
        else:
            self.calls = [(module, args, kwargs)]
        begins, self.called = not self.called, True
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if begins or module is self._model:
            self._depth = 0
            self._passes += 1
            if self._passes > self._few:
                self._unusual()
            if self._sampled and module is self._model:
                self._sampler.forward(module, [args, kwargs])

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        gradient = self._tensor.grad if self._tensor is not None else None
        version = gradient._version if gradient is not None else 0
        self._depth += 1
        if self._depth > 1:  # the outermost step alone counts
            return None
        if gradient is not None and not self.called:
            self.again += gradient is self._stepped and version == self._version
        self._stepped, self._version = gradient, version
        rate = optimizer.param_groups[0].get("lr")
        if rate != self._rate and isinstance(rate, float):
            self._rate = rate
            self.company.schedules.rated(rate)
        written = self.touches.tensor
        if written is not None and written._version != self.touches.version:
            self.touches.written(self.step)
        if self._follows:
            self._follows = self.company.readers.follow()
        if self._sampled:
            self._search(sys._getframe(1))
        if len(args) > 1 or kwargs:
            changed = with_closure(args, kwargs, self._looking)
            if changed is not None:
                return changed
        self._look()
        if self._guard.acts:
            self._guard.before(self.step)
        return None

    def _look(self) -> None:
        """At the gradient, and on a sampled step at the weights before they are moved."""
        gradient = self._tensor.grad if self._tensor is not None else None
        if gradient is not None:
            gradient = local(gradient) if self._sampler.sharded else gradient
            if not gradient.is_cpu:
                self._latched(gradient)
            else:
                total = sum(gradient.tolist()) if self._short else gradient.sum().item()
                if not math.isfinite(total) and not skipped(self._optimizer):
                    self._fail()
        groups = self._optimizer.param_groups
        self._graded = (self._own and gradient is not None) or any(
            p.grad is not None for g in groups for p in g["params"]
        )
        if self._sampled:
            self._sampler.look()

    def _after(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth:
            return
        passes, self._passes, self.unstepped = self._passes, 0, 0
        self._earlier += passes
        if passes > self.usual:
            self.usual, self._few = passes, max(FEW, 5 * passes)
        if self._backward is not None:
            self._count_no_more()
        written = self.touches.tensor
        if written is not None:
            self.touches.version = written._version
        self.empty = 0 if self._graded else self.empty + 1
        self._graded = self.called = False
        if self._guard.acts:
            self._guard.after()
        if self._sampled:
            self._end()
        self.step += 1
        if self.step % self._every == 0:
            self._sampled = True
            self._sampler.listen(self.batch)
            self.company.followers.listen()

    # sampled steps, and what is rare

    def _search(self, frame: FrameType | None) -> None:
        self.company.find(frame, self.forwards)
        self._sampler.found = self.company.scaler
        self._follows = self.company.readers.follows

    def _looking(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with a look at its gradients: LBFGS and Lightning go backward inside."""

        def evaluate() -> Any:
            self._sampler.evaluation()
            loss = closure()
            self._look()
            return loss

        return evaluate

    def _latched(self, gradient: Tensor) -> None:
        """Note on its device whether it is bad, until the next reading."""
        if not skipped(self._optimizer):
            now = torch.where(torch.isfinite(gradient.sum()), torch.inf, self.step)
            self._latch = now if self._latch is None else torch.minimum(self._latch, now)

    def _end(self) -> None:
        """A sampled step is made: no one should write to its gradient before the next pass."""
        if self._sampler.kept is not None and not skipped(self._optimizer):
            self._read()
            self.late = None
            gradient = self._whole.grad if self._whole is not None else None
            if gradient is not None and gradient.layout == torch.strided:
                self._held, self._few = (gradient, gradient._version), 0
        self._sampler.close()
        self._sampled = False
        if self.step == 0 and not self.calls:  # the loop calls parts, as Lightning modules do
            self._handles += [
                part.register_forward_pre_hook(Hook(self._forward), with_kwargs=True)
                for part in self._model.children()
            ]

    def _unusual(self) -> None:
        """The first pass after a sampled step, or one of many without a step."""
        if self._held is not None:
            gradient, version = self._held
            written = gradient._version != version
            self.late = gradient.count_nonzero().clamp(max=1).float() * written
            self._held, self._few = None, max(FEW, 5 * self.usual)
        rare = self._passes > self._few and self._backward is None
        if rare and self._whole is not None:
            self._backward = self._whole.register_post_accumulate_grad_hook(self._reached)

    def _reached(self, parameter: Tensor) -> None:
        self.unstepped += 1

    def _count_no_more(self) -> None:
        if self._backward is not None:
            self._backward.remove()
            self._backward = None


def skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer under GradScaler leaves this step out: inf is expected there."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _sentinel(model: nn.Module, held: set[int]) -> Tensor | None:
    """The smallest trained tensor of the first layer that has one, of the optimizer if it can."""
    layers = [[p for p in own_parameters(module) if p.requires_grad] for module in model.modules()]
    own = next((kept for layer in layers if (kept := [p for p in layer if id(p) in held])), None)
    return min(own or next(filter(None, layers), []), key=Tensor.numel, default=None)
