"""Hooks that run at every step of a watched loop, at the lowest cost."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tikhon.monitoring.first_nonfinite import Call
from tikhon.monitoring.hooks import Hook
from tikhon.monitoring.loop_monitors import LoopMonitors
from tikhon.monitoring.passes import receives_gradients
from tikhon.monitoring.sampling import Sampler
from tikhon.monitoring.spikes import SpikeGuard
from tikhon.monitoring.weight_writes import WeightWrites
from tikhon.regularizer.hooks import exclude_from_compile, with_closure
from tikhon.regularizer.targets import local
from tikhon.wrappers import own_parameters

USUAL_PASSES = 20  # forward passes without a step
SHORT_LENGTH = 64  # entries that python adds up in less time than a kernel takes to begin


class LoopHooks:
    """Hooks on a model and its optimizer: counts, one small gradient, one version, one rate.

    After a large batch every function and every object comes from slow memory: what happens in
    steps that are not sampled is written here without helpers. The gradient is that of a sentinel,
    the smallest trained tensor of the first layer: non-finite values propagate to it. `read` is
    called after a sampled step, `fail` where that gradient is not finite.
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
        self.monitors = LoopMonitors(model, optimizer, lambda: self.step)
        self.weight_writes = WeightWrites(optimizer)
        self.step = 0
        self.calls: list[Call] = []  # what this step's forward began with
        self.was_called = False  # since the last step
        self.steps_without_gradient = 0  # in a row: no tensor of the optimizer had one
        self.repeated_steps = 0  # steps without a pass, along the gradient of the step before
        self.passes_without_step = 0  # backward passes since steps became rare
        self.max_passes = 0  # the most forward passes between two steps
        self.written_after_step: Tensor | None = None  # a gradient changed after its sampled step
        self._passes = self._earlier_passes = 0  # with a graph: since the last step, and before it
        self._pass_limit = USUAL_PASSES  # passes without a step that are nothing special
        self._step_depth = 0  # a step that calls another runs its hooks again
        self._has_gradient = False
        self._rate: object = None
        self._first_bad_step: Tensor | None = None  # on its device
        self._last_gradient: Tensor | None = None  # the sentinel's in the last step
        self._last_version = 0  # of that
        self._sampled_gradient: tuple[Tensor, int] | None = None  # and version, after the step
        self._pass_counter: RemovableHandle | None = None  # counts passes once steps are rare
        optimized = {id(p) for g in optimizer.param_groups for p in g["params"]}
        sentinel = self._sentinel = _choose_sentinel(model, optimized)
        self._is_sentinel_optimized = id(sentinel) in optimized
        self._hooked_sentinel: Tensor | None = None
        self._is_short = False
        if sentinel is not None and receives_gradients(sentinel):
            self._hooked_sentinel = sentinel
            self._is_short = sentinel.ndim == 1 and len(sentinel) <= SHORT_LENGTH
        self._handles = [
            model.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True),
            optimizer.register_step_pre_hook(exclude_from_compile(self._before_step)),
            optimizer.register_step_post_hook(exclude_from_compile(self._after_step)),
        ]
        self._is_sampled = True  # the coming step
        sampler.begin((), first=True)

    @property
    def is_active(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._handles)

    @property
    def forwards(self) -> int:
        """Passes of the model that built a graph."""
        return self._earlier_passes + self._passes

    @property
    def batch(self) -> list[Any]:
        """The arguments of the last forward pass."""
        return [call[1:] for call in self.calls[:1]]

    @property
    def bad_step(self) -> int:
        """The step of the first gradient that is not finite, as far as one was seen; this one."""
        if self._first_bad_step is not None and math.isfinite(
            first := float(self._first_bad_step)
        ):
            return int(first)
        return self.step

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._sampler.close()
        self._stop_counting()

    # every step

    def _before_forward(self, module: nn.Module, args: object, kwargs: object) -> None:
        if module is not self._model:  # the loop calls its parts
            if any(module is was_called for was_called, _, _ in self.calls):
                self.calls = []
            self.calls.append((module, args, kwargs))
        else:
            self.calls = [(module, args, kwargs)]
        is_first, self.was_called = not self.was_called, True
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.monitors.target_networks.passes_without_graph += 1
            return
        if is_first or module is self._model:
            self._step_depth = 0
            self._passes += 1
            if self._passes > self._pass_limit:
                self._after_rare_pass()
            if self._is_sampled and module is self._model:
                self._sampler.forward(module, [args, kwargs])

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        gradient = self._sentinel.grad if self._sentinel is not None else None
        version = gradient._version if gradient is not None else 0
        self._step_depth += 1
        if self._step_depth > 1:  # the outermost step alone counts
            return None
        if gradient is not None and not self.was_called:
            is_same = gradient is self._last_gradient and version == self._last_version
            self.repeated_steps += is_same
        self._last_gradient, self._last_version = gradient, version
        rate = optimizer.param_groups[0].get("lr")
        if rate != self._rate and isinstance(rate, float):
            self._rate = rate
            self.monitors.schedules.rates.add(rate)
        weight = self.weight_writes.tensor
        if weight is not None and weight._version != self.weight_writes.version:
            self.weight_writes.record_write(self.step)
        if self._is_sampled:
            self.monitors.find(sys._getframe(1), self.forwards, self._sampler.trained_inputs)
            self._sampler.found_scaler = self.monitors.scaler
        if len(args) > 1 or kwargs:
            changed = with_closure(args, kwargs, self._wrap_closure)
            if changed is not None:
                return changed
        self._check_gradient()
        if self._guard.checks_every_step:
            self._guard.before_step(self.step)
        return None

    def _check_gradient(self) -> None:
        """Check the sentinel's gradient; on a sampled step, copy the weights before they move."""
        gradient = self._sentinel.grad if self._sentinel is not None else None
        if gradient is not None:
            gradient = local(gradient) if self._sampler.is_sharded else gradient
            if not gradient.is_cpu:
                self._check_on_device(gradient)
            else:
                total = sum(gradient.tolist()) if self._is_short else gradient.sum().item()
                if not math.isfinite(total) and not is_step_skipped(self._optimizer):
                    self._fail()
        groups = self._optimizer.param_groups
        self._has_gradient = (self._is_sentinel_optimized and gradient is not None) or any(
            p.grad is not None for g in groups for p in g["params"]
        )
        if self._is_sampled:
            self._sampler.before_step()

    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        self._step_depth = max(0, self._step_depth - 1)
        if self._step_depth:
            return
        passes, self._passes, self.passes_without_step = self._passes, 0, 0
        self._earlier_passes += passes
        if passes > self.max_passes:
            self.max_passes, self._pass_limit = passes, max(USUAL_PASSES, 5 * passes)
        if self._pass_counter is not None:
            self._stop_counting()
        weight = self.weight_writes.tensor
        if weight is not None:
            self.weight_writes.version = weight._version
        self.steps_without_gradient = 0 if self._has_gradient else self.steps_without_gradient + 1
        self._has_gradient = self.was_called = False
        if self._guard.checks_every_step:
            self._guard.after_step()
        if self._is_sampled:
            self._end_sample()
        self.step += 1
        if self.step % self._every == 0:
            self._is_sampled = True
            self._sampler.begin(self.batch)
            self.monitors.target_networks.begin_sample()

    # sampled steps, and what is rare

    def _wrap_closure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with a look at its gradients: LBFGS and Lightning go backward inside."""

        def evaluate() -> Any:
            self._sampler.evaluation()
            loss = closure()
            self._check_gradient()
            return loss

        return evaluate

    def _check_on_device(self, gradient: Tensor) -> None:
        """Note on its device whether it is bad, until the next reading."""
        if not is_step_skipped(self._optimizer):
            step = torch.where(torch.isfinite(gradient.sum()), torch.inf, self.step)
            first = self._first_bad_step
            self._first_bad_step = step if first is None else torch.minimum(first, step)

    def _end_sample(self) -> None:
        """A sampled step is made: no one should write to its gradient before the next pass."""
        if self._sampler.step_tensors is not None and not is_step_skipped(self._optimizer):
            self._read()
            self.written_after_step = None
            gradient = self._hooked_sentinel.grad if self._hooked_sentinel is not None else None
            if gradient is not None and gradient.layout == torch.strided:
                self._sampled_gradient, self._pass_limit = (gradient, gradient._version), 0
        self._sampler.close()
        self._is_sampled = False
        if self.step == 0 and not self.calls:  # the loop calls parts, as Lightning modules do
            self._handles += [
                part.register_forward_pre_hook(Hook(self._before_forward), with_kwargs=True)
                for part in self._model.children()
            ]

    def _after_rare_pass(self) -> None:
        """The first pass after a sampled step, or one of many without a step."""
        if self._sampled_gradient is not None:
            gradient, version = self._sampled_gradient
            is_written = gradient._version != version
            self.written_after_step = gradient.count_nonzero().clamp(max=1).float() * is_written
            self._sampled_gradient, self._pass_limit = None, max(USUAL_PASSES, 5 * self.max_passes)
        is_rare = self._passes > self._pass_limit and self._pass_counter is None
        sentinel = self._hooked_sentinel
        if is_rare and sentinel is not None:
            self._pass_counter = sentinel.register_post_accumulate_grad_hook(self._count_pass)

    def _count_pass(self, parameter: Tensor) -> None:
        self.passes_without_step += 1

    def _stop_counting(self) -> None:
        if self._pass_counter is not None:
            self._pass_counter.remove()
            self._pass_counter = None


def is_step_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer under GradScaler leaves this step out: inf is expected there."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


def _choose_sentinel(model: nn.Module, optimized: set[int]) -> Tensor | None:
    """The smallest trained tensor of the first layer that has one, of the optimizer if it can."""
    layers = [[p for p in own_parameters(module) if p.requires_grad] for module in model.modules()]
    of_optimizer = [[p for p in layer if id(p) in optimized] for layer in layers]
    candidates = next(filter(None, [*of_optimizer, *layers]), [])
    return min(candidates, key=Tensor.numel, default=None)
