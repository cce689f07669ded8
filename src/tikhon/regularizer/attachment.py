"""Apply the terms of a Regularizer in the steps of one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn, optim

from tikhon.penalties.base import Proximable
from tikhon.regularizer.activity import BypassDetector, DriftDetector, GradientArrival
from tikhon.regularizer.audit import CHECK_STEPS, warn, warn_of_lost_layers
from tikhon.regularizer.controller import Controller, Observation
from tikhon.regularizer.coupled import BorrowedDecay
from tikhon.regularizer.hooks import (
    Args,
    Closure,
    EvalHook,
    NewArguments,
    Options,
    StepHooks,
    hook_owners,
    with_closure,
)
from tikhon.regularizer.optimizers import WeightCopies, is_torch_optimizer
from tikhon.regularizer.orthant import add_pseudo_gradients, keep_orthants
from tikhon.regularizer.plan import DeferredFlag, Location, StepPlan
from tikhon.regularizer.step import (
    DecayRecord,
    add_gradients,
    apply_cautious_decay,
    apply_decay,
    apply_proxes,
    bound_gains,
    check_rates,
    reading_of,
    store_weights,
    undo_decay,
)
from tikhon.regularizer.targets import all_reduce_sum, local
from tikhon.regularizer.terms import Binding, Route

GRADIENT_ROUTES: tuple[Route, ...] = "gradient", "orthant"  # terms that act through the gradient
LASTING_ROUTES: tuple[Route, ...] = "prox", "orthant", "project"  # whose zeros or bounds persist


class Attachment:
    """Terms on the parameters of one optimizer, applied in its steps.

    Attributes:
        optimizer: the optimizer.
        steps: steps taken since attaching, excluding skipped ones.
        plan: the work of a step, for the current parameters.
    """

    def __init__(
        self,
        optimizer: optim.Optimizer,
        model: nn.Module,
        steps: int,
        is_bound: Callable[[], bool],
        notice: Callable[[], None],
        around: str = "",
    ) -> None:
        self.optimizer, self.model, self.steps = optimizer, model, steps
        self.plan: StepPlan
        self.activity: BypassDetector
        self._is_bound = is_bound  # whether the model is unchanged; called occasionally
        self.copies: WeightCopies | None = None  # copies of the weights in the optimizer's state
        self._notice = notice  # called when parameters are replaced or added
        self._around = around  # class name of a wrapper around the optimizer
        self._drift: DriftDetector | None = None
        self._is_torchs = is_torch_optimizer(optimizer)
        self._recomputed = GradientArrival()  # a gradient within the step, lacking what was added
        self._noted: Sequence[Binding] = ()  # terms whose gradients may be cleared by the step
        self._gradients: dict[nn.Parameter, Tensor] = {}  # the user's own
        self._replaced: dict[
            nn.Parameter, tuple[Tensor, int]
        ] = {}  # what is there, and its version
        self._decayed: list[DecayRecord] = []
        self._averages: list[tuple[Binding, Tensor | None]] = []  # averages before the step
        self._fresh: list[Binding] = []  # terms without optimizer state before the step
        self._earlier: dict[str, Tensor] = {}  # weights for controllers with needs_before
        self._moved: dict[str, Tensor] | None = {}  # weights to measure shares from
        self._unread: DeferredFlag | None = None  # whether the last step was skipped
        self._warned = False  # about lost layers
        self._is_told = False  # whether it was reported that the optimizer computes gradients
        self._hooks: StepHooks | None = None
        self._evaluation: EvalHook | None = None

    def plan_steps(self, bindings: Sequence[Binding], places: Sequence[Location]) -> None:
        """Plan a step for these terms and the current parameters."""
        self.plan = StepPlan.of(self.optimizer, bindings, places)
        self._own_decay = BorrowedDecay(self.plan)
        before = getattr(self, "activity", None)
        if before is None or before.param is not self.plan.watched:
            self.activity = BypassDetector(self.optimizer, self.plan.watched, self.steps)

    def begin(self) -> None:
        """Start acting in steps."""
        kept = self.plan.first(*LASTING_ROUTES)
        if self._around and kept is not None:
            self._drift = DriftDetector(kept.target.params[0])
        self._hooks = StepHooks(
            self.optimizer, self._before, self._after, self._failed, owner=self
        )
        if self.copies is not None and self.copies.averaged:
            self._evaluation = EvalHook(
                self.optimizer,
                lambda: zero_masks(self.plan.held),
                lambda zeros: apply_to_copies(
                    self.plan.held, params_by_name(self.plan.held), zeros
                ),
            )

    def remove(self) -> None:
        """Stop acting in steps."""
        self.recount()
        if self._drift is not None:
            self._drift.stop()
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        if self._evaluation is not None:
            self._evaluation.remove()
            self._evaluation = None

    @property
    def acts(self) -> bool:
        """Whether it acts in the optimizer's steps: begun and not removed."""
        return self._hooks is not None

    @property
    def is_passed_by(self) -> bool:
        """Whether its weights were trained since its last step."""
        return self.activity.trained_without_us(self.steps)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters it acts on."""
        return (
            [p for binding in self.plan.held for p in binding.target.params] if self.acts else []
        )

    def measure(self) -> None:
        """Measure each term's share of the next step."""
        self._moved = {} if self._moved is None else self._moved

    def recount(self) -> None:
        """Correct the step count if the device skipped the last step."""
        unread, self._unread = self._unread, None
        if unread:
            self.steps -= 1
            for live in self.plan.scheduled:
                live.update(self.steps)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an attachment is bound to its optimizer: copy the Regularizer")

    # -- one step -----------------------------------------------------------------------------

    def _before(self, args: Args, kwargs: Options) -> NewArguments:
        if self._unread is not None:
            self.recount()
        if not self.plan.is_current() or (self.steps in CHECK_STEPS and not self._is_bound()):
            self._notice()
        plan = self.plan
        check_rates(plan)
        for live in plan.tensors:
            live.update(self.steps)
        for live in plan.scheduled:
            if live.late:
                live.update(self.steps)
        self.activity.begin()
        if self._drift is not None:
            self._look_between(self._drift)
        self._fresh = bound_gains(plan, plan.bounded) if plan.bounded else []
        if plan.late and self._moved is None and not self._may_clear:
            return None
        for binding in plan.copied:
            self._earlier[binding.name] = binding.read().clone()
        changed = with_closure(args, kwargs, self._penalized)
        if changed is None:
            self._penalize(lent=self._is_alone)
            pulled = None if self._is_torchs else plan.first(*GRADIENT_ROUTES)
            if pulled is not None:
                self._recomputed.expect(pulled.target.params[0])
        return changed

    def _look_between(self, drift: DriftDetector) -> None:
        """Warn of weights that move between steps, during the first steps only."""
        if len(hook_owners(self.optimizer)) > 1:  # another handle moves them after ours
            drift.stop()
            self._drift = None
            return
        kept, kind, moved = (
            self.plan.first(*LASTING_ROUTES),
            type(self.optimizer).__name__,
            drift.begin(),
        )
        if kept is not None and moved:
            warn(
                f"{kept.name} acts in the steps of {kind}, and {self._around} around it moves the "
                f"weights between these, or another optimizer does: zeros and bounds do not "
                f"outlast that; for exact ones regularize a plain {kind}"
            )
        if moved or drift.over:
            self._drift = None

    def _penalized(self, closure: Closure) -> Closure:
        """Wrap the closure to add penalties, as it clears what a pre-hook adds to `.grad`."""
        first = True

        def evaluate() -> object:
            nonlocal first
            self._restore_gradients(others=True)
            loss = closure()
            self._penalize(decay=first)
            first = False
            if isinstance(self.optimizer, optim.LBFGS):  # its line search compares losses
                with torch.no_grad():
                    penalties = sum(penalty_value(b) for b in self.plan.active("gradient"))
                    loss = cast(Tensor, loss) + penalties
            return loss

        return evaluate

    def _penalize(self, *, decay: bool = True, lent: bool = False) -> None:
        """Do everything that precedes the optimizer's own move.

        `lent` says whether its weight_decay may be used for it.
        """
        plan, measure = self.plan, self._moved is not None
        self._noted = plan.held if self._may_clear else ()
        for binding in self._noted:
            binding.note_gradients()
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
        for param in self._gradients:
            ours = cast(Tensor, param.grad)
            self._replaced[param] = ours, ours._version
        if decay and plan.routes["decay"]:
            apply_decay(plan, skipped, self._decayed, measure=measure)
        if decay and plan.routes["cautious"]:
            store_weights(plan)
        if measure:
            self._moved = {b.name: b.read().clone() for b in plan.held}
        if own_decay:
            self._own_decay.lend(own_decay)

    def _after(self) -> None:
        """Do everything that follows it."""
        try:
            self._finish()
        finally:
            self._forget_who_moved()

    def _finish(self) -> None:
        """Make the moves after the optimizer's own, unless a GradScaler found an overflow.

        As the optimizer has already stepped, errors do not prevent the remaining moves; the first
        one is raised at the end.
        """
        recomputed = not self._is_torchs and self._recomputed.arrived()
        self._restore_gradients(others=not recomputed)
        if recomputed:
            self._warn_of_gradients_of_its_own()
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
                self._unread = DeferredFlag(skipped)
        moved, self._moved = self._moved or {}, None
        for binding in plan.active("decay") if moved else ():
            own = (binding.read() - moved[binding.name]).norm()
            binding.share = binding.share / (binding.share + own)  # type: ignore[operator]
        errors: list[Exception] = []
        try:
            self._apply_proxes(skipped, moved, errors)
        finally:
            self.steps += 1
            self.activity.end()
            for live in plan.scheduled:
                live.advance(self.steps)
            if self._drift is not None:
                self._drift.end()
        if plan.consulted["after_prox"]:
            errors += self._consult("after_prox")
        if self.steps in CHECK_STEPS and not self._warned:
            self._warned = warn_of_lost_layers(self.optimizer, plan.active("prox"))
        if errors:
            raise errors[0]

    def _apply_proxes(
        self, skipped: Tensor | None, moved: dict[str, Tensor], errors: list[Exception]
    ) -> None:
        """Apply proxes and constraints to every parameter; `errors` collects their exceptions."""
        plan = self.plan
        if self._fresh:
            bound_gains(plan, self._fresh)
        if plan.consulted["before_prox"]:
            errors += self._consult("before_prox")
        if plan.routes["cautious"]:
            apply_cautious_decay(plan, skipped, measure=bool(moved))
        if plan.routes["orthant"]:
            copies = self.copies
            keep_orthants(plan, copies.keys if copies and not copies.averaged else ())
        if plan.routes["prox"]:
            errors += apply_proxes(plan, "prox", skipped, moved)
        if plan.routes["project"]:
            errors += apply_proxes(plan, "project", skipped, moved)

    @torch.no_grad()
    def _consult(self, phase: str) -> list[Exception]:
        """Ask the controllers of a phase for strengths; return their exceptions.

        A controller that raises keeps its strength and memory.
        """
        errors: list[Exception] = []
        shared: dict[int, dict[str, object]] = {}
        step = self.steps + (phase == "before_prox")
        for live, held in self.plan.consulted[phase]:
            controller = cast(Controller, live.source)
            bindings = [b for b in held if b.trained]
            if step % controller.every or not bindings:
                continue
            scratch = shared.setdefault(id(controller), {})
            readings = [reading_of(b, self.plan, self._earlier.get(b.name)) for b in bindings]
            memory = dict(live.memory)
            observation = Observation(readings, self.model, live.memory, scratch)
            try:
                with torch.enable_grad():
                    live.set(controller.next(cast(float, live.value), observation, step))
            except Exception as error:
                live.memory = memory
                errors.append(error)
        return errors

    def _failed(self) -> None:
        """Restore the user's gradients and weights after a step that raised."""
        self._recomputed.arrived()
        self._restore_gradients(others=False)  # if told late, backward may have run again since
        decayed, self._decayed = self._decayed, []
        undo_decay(self.plan, decayed)
        for binding, average in self._averages:
            binding.average, binding.facing = average, None
        self._averages = []
        for binding in self.plan.routes["cautious"]:
            binding.before = None
        self._earlier.clear()
        self._forget_who_moved()
        self.activity.look()

    @property
    def _may_clear(self) -> bool:
        """Whether gradients may be cleared within the step, by the optimizer or another hook."""
        return not self._is_torchs or len(self.optimizer._optimizer_step_post_hooks) > 1

    @property
    def _is_alone(self) -> bool:
        """Whether no other hook observes or changes the optimizer within its step."""
        hooks = self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks
        return all(len(found) == 1 for found in hooks)

    def _forget_who_moved(self) -> None:
        for binding in self._noted:
            binding.moved = False
        self._noted = ()

    def _warn_of_gradients_of_its_own(self) -> None:
        pulled = self.plan.first(*GRADIENT_ROUTES)
        if self._is_told or pulled is None:
            return
        self._is_told = True
        kind = type(self.optimizer).__name__
        warn(
            f"{kind} computes gradients within its step, where {pulled.name} has no "
            f"part in them: give the function that computes them to `step` as its closure, or "
            f"regularize a plain optimizer such as AdamW"
        )

    def _restore_gradients(self, *, others: bool) -> None:
        """Restore the user's gradients, except where they were zeroed.

        `others` says whether to also replace tensors that the optimizer put in their place.
        """
        self._own_decay.give_back()
        for param, grad in self._gradients.items():
            now = param.grad
            ours, version = self._replaced.get(param, (now, None))
            if now is ours and now is not None:
                still = version in (None, now._version) or bool(local(now).any())
            else:
                still = now is not None and others
            if still:
                param.grad = grad
        self._gradients, self._replaced = {}, {}


@torch.no_grad()
def zero_masks(bindings: Sequence[Binding]) -> dict[str, Tensor]:
    """Return masks of current zeros by parameter, for terms that make zeros."""
    targets = [binding.target for binding in bindings if binding.route == "prox"]
    named = ((name, p) for t in targets for name, p in zip(t.names, t.params))
    return {name: param.detach() == 0 for name, param in named}


def params_by_name(bindings: Sequence[Binding]) -> dict[str, nn.Parameter]:
    """Return the parameters that terms act on, by name."""
    targets = [binding.target for binding in bindings]
    return {name: p for target in targets for name, p in zip(target.names, target.params)}


@torch.no_grad()
def apply_to_copies(
    bindings: Sequence[Binding],
    params: Mapping[str, nn.Parameter],
    zeros: Mapping[str, Tensor] | None = None,
) -> None:
    """Apply zeros (by default the current ones) and constraints to other copies of the weights."""
    for binding in bindings:
        target = binding.target
        own = tuple(params[name] for name in target.names)
        if binding.route == "prox":
            for name, param, trained in zip(target.names, own, target.params):
                param.masked_fill_(trained == 0 if zeros is None else zeros[name], 0)
        elif binding.route == "project":
            assert isinstance(binding.base, Proximable)
            held = replace(target, params=own)
            whole = local(own[0]) if binding.whole else held.read()
            projected = binding.base.prox(whole, 1.0)
            local(own[0]).copy_(projected) if binding.whole else held.write_(projected)


def penalty_value(binding: Binding) -> Tensor:
    """Return the penalty on the full weights."""
    return all_reduce_sum(binding.penalty.value(binding.read()), binding.target.params[0])
