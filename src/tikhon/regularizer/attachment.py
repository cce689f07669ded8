"""The steps of one optimizer, and what the terms of a Regularizer do in each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn, optim

from tikhon.regularizer.activity import Activity
from tikhon.regularizer.audit import LOOKS, warn_of_lost_layers
from tikhon.regularizer.controller import Controller, Observation
from tikhon.regularizer.coupled import OwnDecay
from tikhon.regularizer.hooks import StepHooks
from tikhon.regularizer.optimizers import Copies
from tikhon.regularizer.orthant import add_pseudo_gradients, keep_orthants
from tikhon.regularizer.plan import Place, Plan, Unread, closure_of
from tikhon.regularizer.step import (
    add_gradients,
    bound_gains,
    check_rates,
    reading_of,
    remember,
    replace_weights,
    shrink,
    shrink_cautiously,
    unshrink,
)
from tikhon.regularizer.targets import summed
from tikhon.regularizer.terms import Binding


class Attachment:
    """The terms on the parameters that one optimizer holds, acting in its steps.

    Attributes:
        optimizer: whose steps these are.
        steps: how many it has taken since it was attached, skipped ones not counted.
        plan: what a step does, for the parameters as they are now.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        model: nn.Module,
        steps: int,
        is_bound: Callable[[], bool],
        notice: Callable[[], None],
    ) -> None:
        self.optimizer, self.model, self.steps = optimizer, model, steps
        self.plan: Plan
        self.activity: Activity
        self._is_bound = is_bound  # whether the whole model is as it was; asked now and then
        self.copies: Copies | None = None  # of the weights, in the optimizer's state
        self._notice = notice  # called where parameters were replaced or added
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []  # the user's own
        self._replaced: list[Tensor | None] = []  # what stands in their place
        self._decayed: list[Binding] = []
        self._averages: list[tuple[Binding, Tensor | None]] = []  # from before the step
        self._fresh: list[Binding] = []  # whose parameters have no state before the step
        self._earlier: dict[str, Tensor] = {}  # weights for controllers with needs_before
        self._moved: dict[str, Tensor] | None = {}  # weights that shares are measured from
        self._unread: Unread | None = None  # whether the last step was skipped
        self._warned = False  # of layers that were lost
        self._hooks: StepHooks | None = None

    def plan_steps(self, bindings: Sequence[Binding], places: Sequence[Place]) -> None:
        """Work out what a step does, for these terms and the parameters as they are now."""
        self.plan = Plan.of(self.optimizer, bindings, places)
        self._own_decay = OwnDecay(self.plan)
        before = getattr(self, "activity", None)
        if before is None or before.param is not self.plan.watched:
            self.activity = Activity(self.optimizer, self.plan.watched, self.steps)

    def begin(self) -> None:
        """Act from the next step on."""
        self._hooks = StepHooks(
            self.optimizer, self._before, self._after, self._failed, owner=self
        )

    def remove(self) -> None:
        """Act no more."""
        self.recount()
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    @property
    def acts(self) -> bool:
        """Whether it acts in the optimizer's steps: begun and not removed."""
        return self._hooks is not None

    def measure(self) -> None:
        """Measure the share of each term in the next step."""
        self._moved = {} if self._moved is None else self._moved

    def recount(self) -> None:
        """Take the last step back from the count if the device has skipped it."""
        unread, self._unread = self._unread, None
        if unread:
            self.steps -= 1
            for live in self.plan.scheduled:
                live.update(self.steps)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an attachment is bound to its optimizer: copy the Regularizer")

    # -- one step -----------------------------------------------------------------------------

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._unread is not None:
            self.recount()
        if not self.plan.is_current() or (self.steps in LOOKS and not self._is_bound()):
            self._notice()
        plan = self.plan
        check_rates(plan)
        for live in plan.tensors:
            live.update(self.steps)
        self.activity.begin()
        self._fresh = bound_gains(plan, plan.bounded) if plan.bounded else []
        if plan.late and self._moved is None:
            return None
        for binding in plan.copied:
            self._earlier[binding.name] = binding.read().clone()
        closure = closure_of(args, kwargs)
        if closure is None:
            self._penalize(lent=True)
            return None
        return (args[0], self._penalized(closure)), {}

    def _penalized(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with the penalties inside: it zeroes what a pre-hook adds to `.grad`."""
        first = True

        def evaluate() -> Any:
            nonlocal first
            self._restore_gradients()
            loss = closure()
            self._penalize(decay=first)
            first = False
            if isinstance(self.optimizer, optim.LBFGS):  # its line search compares losses
                with torch.no_grad():
                    loss = loss + sum(value_of(b) for b in self.plan.active("gradient"))
            return loss

        return evaluate

    def _penalize(self, *, decay: bool = True, lent: bool = False) -> None:
        """All that comes before the optimizer's own move.

        `lent` says whether its own weight_decay may be used for that move.
        """
        plan, measure = self.plan, self._moved is not None
        scale = getattr(self.optimizer, "grad_scale", None)  # fused ones divide inside
        skipped = getattr(self.optimizer, "found_inf", None)
        own_decay: dict[int, float] | None = None
        if plan.routes["gradient"]:
            own_decay = {} if lent and plan.coupled else None
            add_gradients(plan, scale, self._gradients, measure=measure, own_decay=own_decay)
        if plan.routes["orthant"]:
            if decay:
                self._averages = [(b, b.average) for b in plan.routes["orthant"]]
            add_pseudo_gradients(
                plan, scale, skipped, self._gradients, first=decay, measure=measure
            )
        if self._gradients:
            self._replaced = [param.grad for param, _ in self._gradients]
        if decay and plan.routes["decay"]:
            shrink(plan, skipped, self._decayed, measure=measure)
        if decay and plan.routes["cautious"]:
            remember(plan)
        if measure:
            self._moved = {b.name: b.read().clone() for b in plan.held}
        if own_decay:
            self._own_decay.lend(own_decay)

    def _after(self) -> None:
        """All that comes after it, except when a GradScaler has found an overflow."""
        self._restore_gradients()
        self._decayed.clear()
        self._averages = []
        self.activity.moved()
        plan = self.plan
        skipped = getattr(self.optimizer, "found_inf", None)
        if skipped is not None:
            if skipped.device.type == "cpu" or plan.is_consulted(self.steps + 1):
                if skipped:
                    self.activity.end()
                    return
                skipped = None
            elif not plan.constant:
                self._unread = Unread(skipped)
        moved, self._moved = self._moved or {}, None
        for binding in plan.active("decay") if moved else ():
            own = (binding.read() - moved[binding.name]).norm()
            binding.share = binding.share / (binding.share + own)  # type: ignore[operator]
        try:
            self._apply_proxes(skipped, moved)
        finally:  # the optimizer has taken its step, whatever a penalty of the user's raises
            self.steps += 1
            self.activity.end()
            for live in plan.scheduled:
                live.update(self.steps)
        if plan.consulted["after_prox"]:
            self._consult("after_prox")
        if self.steps in LOOKS and not self._warned:
            self._warned = warn_of_lost_layers(self.optimizer, plan.active("prox"))

    def _apply_proxes(self, skipped: Tensor | None, moved: dict[str, Tensor]) -> None:
        """Proxes and constraints: every parameter's, then the first error that one raised."""
        plan = self.plan
        if self._fresh:
            bound_gains(plan, self._fresh)
        if plan.consulted["before_prox"]:
            self._consult("before_prox")
        if plan.routes["cautious"]:
            shrink_cautiously(plan, skipped, measure=bool(moved))
        if plan.routes["orthant"]:
            keep_orthants(plan, self.copies and self.copies.key)
        errors: list[Exception] = []
        if plan.routes["prox"]:
            errors += replace_weights(plan, "prox", skipped, moved)
        if plan.routes["project"]:
            errors += replace_weights(plan, "project", skipped, moved)
        if errors:
            raise errors[0]

    @torch.no_grad()
    def _consult(self, phase: str) -> None:
        """Ask the controllers of a phase for their strengths."""
        shared: dict[int, dict[str, Any]] = {}
        step = self.steps + (phase == "before_prox")
        for live, held in self.plan.consulted[phase]:
            controller = cast(Controller, live.source)
            bindings = [b for b in held if b.trained]
            if step % controller.every or not bindings:
                continue
            scratch = shared.setdefault(id(controller), {})
            readings = [reading_of(b, self.plan, self._earlier.get(b.name)) for b in bindings]
            observation = Observation(readings, self.model, live.memory, scratch)
            with torch.enable_grad():
                live.set(controller.next(cast(float, live.value), observation, step))

    def _failed(self) -> None:
        """The step has raised: gradients and weights become the user's own again."""
        if self._replaced:  # if told late, they may have been zeroed or recomputed since
            still = [p.grad is ours for (p, _), ours in zip(self._gradients, self._replaced)]
            self._gradients = [pair for pair, same in zip(self._gradients, still) if same]
        self._restore_gradients()
        decayed, self._decayed = self._decayed, []
        unshrink(self.plan, decayed)
        for binding, average in self._averages:
            binding.average, binding.facing = average, None
        self._averages = []
        for binding in self.plan.routes["cautious"]:
            binding.before = None
        self._earlier.clear()
        self.activity.look()

    def _restore_gradients(self) -> None:
        self._own_decay.give_back()
        for param, grad in reversed(self._gradients):  # the first of several is the user's
            param.grad = grad
        self._gradients, self._replaced = [], []


def value_of(binding: Binding) -> Tensor:
    """The penalty over the whole weights."""
    return summed(binding.penalty.value(binding.read()), binding.target.params[0])
