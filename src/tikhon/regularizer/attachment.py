"""Apply the terms of a Regularizer in the steps of one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn, optim

from tikhon.penalties.base import Proximable
from tikhon.regularizer.audit import CHECK_STEPS, warn, warn_of_lost_layers
from tikhon.regularizer.bypass_detection import BypassDetector, DriftDetector, GradientArrival
from tikhon.regularizer.controller import Controller, Observation
from tikhon.regularizer.coupled import BorrowedDecay
from tikhon.regularizer.faces import keep_faces, project_gradients
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
from tikhon.regularizer.rewrites import RewriteDetector
from tikhon.regularizer.step import (
    DecayRecord,
    add_gradients,
    apply_cautious_decay,
    apply_decay,
    apply_proxes,
    bound_gains,
    check_rates,
    note_gains,
    note_lags,
    note_peaks,
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
        is_model_current: Callable[[], bool],
        on_change: Callable[[], None],
        wrapper_name: str = "",
    ) -> None:
        self.optimizer, self.model, self.steps = optimizer, model, steps
        self.plan: StepPlan
        self.activity: BypassDetector
        self._is_model_current = is_model_current  # called occasionally
        self.copies: WeightCopies | None = None  # copies of the weights in the optimizer's state
        self._on_change = on_change  # called when parameters are replaced or added
        self._wrapper_name = wrapper_name  # class name of a wrapper around the optimizer
        self._drift: DriftDetector | None = None
        self._rewrites: RewriteDetector | None = None if wrapper_name else RewriteDetector()
        self._is_torch_optimizer = is_torch_optimizer(optimizer)
        self._inner_gradient = GradientArrival()  # within the step, without what was added
        self._recorded: Sequence[Binding] = ()  # terms whose gradients may be cleared by the step
        self._user_gradients: dict[nn.Parameter, Tensor] = {}  # the user's own
        # what was put in their place, and its version
        self._our_gradients: dict[nn.Parameter, tuple[Tensor, int]] = {}
        self._decay_records: list[DecayRecord] = []
        self._averages_before: list[tuple[Binding, Tensor | None]] = []  # averages before the step
        self._without_state: list[Binding] = []  # terms without optimizer state before the step
        self._weights_before: dict[str, Tensor] = {}  # weights for controllers with needs_before
        self._measured_from: dict[str, Tensor] | None = {}  # weights to measure shares from
        self._skipped_later: DeferredFlag | None = None  # whether the last step was skipped
        self._momenta: Sequence[object] = ()  # of the groups in the last step
        self._lagging = False  # whether buffers of gradients follow a momentum that moves
        self._warned = False  # about lost layers
        self._warned_of_own_gradients = False
        self._hooks: StepHooks | None = None
        self._evaluation: EvalHook | None = None

    def plan_steps(self, bindings: Sequence[Binding], places: Sequence[Location]) -> None:
        """Plan a step for these terms and the current parameters."""
        self.plan = StepPlan.of(self.optimizer, bindings, places)
        note_peaks(self.plan)
        self._own_decay = BorrowedDecay(self.plan)
        before = getattr(self, "activity", None)
        if before is None or before.param is not self.plan.watched_param:
            self.activity = BypassDetector(self.optimizer, self.plan.watched_param, self.steps)

    def begin(self) -> None:
        """Start acting in steps."""
        lasting = self.plan.first_on(*LASTING_ROUTES)
        if self._wrapper_name and lasting is not None:
            self._drift = DriftDetector(lasting.target.params[0])
        self._hooks = StepHooks(
            self.optimizer, self._on_step_start, self._on_step_end, self._undo_step, owner=self
        )
        if self.copies is not None and self.copies.averaged:
            self._evaluation = EvalHook(
                self.optimizer,
                lambda: zero_masks(self.plan.bindings),
                lambda zeros: apply_to_copies(
                    self.plan.bindings, params_by_name(self.plan.bindings), zeros
                ),
            )

    def remove(self) -> None:
        """Stop acting in steps."""
        self.correct_steps()
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
    def is_bypassed(self) -> bool:
        """Whether its weights were trained since its last step."""
        return self.activity.is_bypassed(self.steps)

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters it acts on."""
        return (
            [p for binding in self.plan.bindings for p in binding.target.params]
            if self.acts
            else []
        )

    def measure(self) -> None:
        """Measure each term's share of the next step."""
        self._measured_from = {} if self._measured_from is None else self._measured_from

    def correct_steps(self) -> None:
        """Correct the step count if the device skipped the last step."""
        skipped, self._skipped_later = self._skipped_later, None
        if skipped:
            self.steps -= 1
            for live in self.plan.scheduled:
                live.update(self.steps)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an attachment is bound to its optimizer: copy the Regularizer")

    # -- one step -----------------------------------------------------------------------------

    def _on_step_start(self, args: Args, kwargs: Options) -> NewArguments:
        if self._skipped_later is not None:
            self.correct_steps()
        if not self.plan.is_current() or (
            self.steps in CHECK_STEPS and not self._is_model_current()
        ):
            self._on_change()
        plan = self.plan
        check_rates(plan)
        note_peaks(plan)
        note_gains(plan)
        for live in plan.tensors:
            live.update(self.steps)
        for live in plan.scheduled:
            if live.is_pending:
                live.update(self.steps)
        self.activity.begin()
        if self._drift is not None:
            self._warn_of_drift(self._drift)
        if self._rewrites is not None:
            self._warn_of_rewrites(self._rewrites)
        self._without_state = bound_gains(plan, plan.gain_bounded) if plan.gain_bounded else []
        if (
            plan.acts_only_afterwards
            and self._measured_from is None
            and not self._gradients_may_vanish
        ):
            return None
        for binding in plan.needing_weights_before:
            self._weights_before[binding.name] = binding.read().clone()
        changed = with_closure(args, kwargs, self._wrap_closure)
        if changed is None:
            self._prepare_step(may_borrow=self._is_only_hook)
            binding = None if self._is_torch_optimizer else plan.first_on(*GRADIENT_ROUTES)
            if binding is not None:
                self._inner_gradient.expect(binding.target.params[0])
        return changed

    def _warn_of_drift(self, drift: DriftDetector) -> None:
        """Warn of weights that move between steps, during the first steps only."""
        if len(hook_owners(self.optimizer)) > 1:  # another handle moves them after ours
            drift.stop()
            self._drift = None
            return
        lasting, kind = self.plan.first_on(*LASTING_ROUTES), type(self.optimizer).__name__
        moved = drift.begin()
        if lasting is not None and moved:
            warn(
                f"{lasting.name} acts in the steps of {kind}, and {self._wrapper_name} around it "
                f"moves the weights between these, or another optimizer does: zeros and bounds do "
                f"not outlast that; for exact ones regularize a plain {kind}"
            )
        if moved or drift.is_done:
            self._drift = None

    def _warn_of_rewrites(self, rewrites: RewriteDetector) -> None:
        """Warn of weights that are set again after each step, looking at a few steps only."""
        if lost := rewrites.begin(self.plan.bindings):
            name, what = lost
            warn(
                f"{name} loses its {what} between the steps of {type(self.optimizer).__name__}: "
                f"something sets these weights again after each `step` (clipping, renormalising, "
                f"an average copied into the model, another optimizer); use a constraint in its "
                f"place (Box, MaxNorm, UnitNorm), or for averages `apply` of the Regularizer"
            )
        if lost or rewrites.is_done or len(hook_owners(self.optimizer)) > 1:
            self._rewrites = None

    def _wrap_closure(self, closure: Closure) -> Closure:
        """Wrap the closure to add penalties, as it clears what a pre-hook adds to `.grad`."""
        first = True

        def evaluate() -> object:
            nonlocal first
            self._restore_gradients(others=True)
            loss = closure()
            self._prepare_step(decay=first)
            first = False
            if isinstance(self.optimizer, optim.LBFGS):  # its line search compares losses
                with torch.no_grad():
                    penalties = sum(penalty_value(b) for b in self.plan.active("gradient"))
                    loss = cast(Tensor, loss) + penalties
            return loss

        return evaluate

    def _prepare_step(self, *, decay: bool = True, may_borrow: bool = False) -> None:
        """Do everything that precedes the optimizer's own move.

        `may_borrow` says whether its weight_decay may be used for it.
        """
        plan, measure = self.plan, self._measured_from is not None
        self._recorded = plan.bindings if self._gradients_may_vanish else ()
        for binding in self._recorded:
            binding.record_gradients()
        scale = getattr(self.optimizer, "grad_scale", None)  # fused ones divide inside
        skipped = getattr(self.optimizer, "found_inf", None)
        own_decay: dict[int, float] | None = None
        if plan.routes["gradient"]:
            own_decay = {} if may_borrow and plan.like_own_decay else None
            add_gradients(plan, scale, self._user_gradients, measure=measure, own_decay=own_decay)
        if decay:
            averaged = (*plan.routes["orthant"], *plan.faces)
            self._averages_before = [(binding, binding.average) for binding in averaged]
        if plan.routes["orthant"]:
            add_pseudo_gradients(
                plan, scale, skipped, self._user_gradients, first=decay, measure=measure
            )
        if plan.faces:
            project_gradients(plan, scale, skipped, self._user_gradients, first=decay)
        for param in self._user_gradients:
            ours = cast(Tensor, param.grad)
            self._our_gradients[param] = ours, ours._version
        if decay and plan.routes["decay"]:
            apply_decay(plan, skipped, self._decay_records, measure=measure)
        if decay and plan.routes["cautious"]:
            store_weights(plan)
        if measure:
            self._measured_from = {b.name: b.read().clone() for b in plan.bindings}
        if own_decay:
            self._own_decay.apply(own_decay)

    def _on_step_end(self) -> None:
        """Do everything that follows it."""
        try:
            self._complete_step()
        finally:
            self._clear_recorded()

    def _complete_step(self) -> None:
        """Make the moves after the optimizer's own, unless a GradScaler found an overflow.

        As the optimizer has already stepped, errors do not prevent the remaining moves; the first
        one is raised at the end.
        """
        recomputed = not self._is_torch_optimizer and self._inner_gradient.arrived()
        self._restore_gradients(others=not recomputed)
        if recomputed:
            self._warn_of_own_gradients()
        self._decay_records.clear()
        self._averages_before = []
        self.activity.record_move()
        plan = self.plan
        momenta = [group.get("momentum") for group in self.optimizer.param_groups]
        if momenta != self._momenta or self._lagging:
            known = self._momenta if len(self._momenta) == len(momenta) else momenta
            note_lags(plan, known)
            self._lagging = any(b.lags for b in plan.bindings)
            self._momenta = momenta
        skipped = getattr(self.optimizer, "found_inf", None)
        if skipped is not None:
            if skipped.device.type == "cpu" or plan.has_controller_due(self.steps + 1):
                if skipped:
                    self.activity.end()
                    return
                skipped = None
            elif not plan.constant:
                self._skipped_later = DeferredFlag(skipped)
        moved, self._measured_from = self._measured_from or {}, None
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
            if self._rewrites is not None:
                self._rewrites.end(plan.bindings)
        if plan.controlled["after_prox"]:
            errors += self._update_strengths("after_prox")
        if self.steps in CHECK_STEPS and not self._warned:
            self._warned = warn_of_lost_layers(self.optimizer, plan.active("prox"))
        if errors:
            raise errors[0]

    def _apply_proxes(
        self, skipped: Tensor | None, moved: dict[str, Tensor], errors: list[Exception]
    ) -> None:
        """Apply proxes and constraints to every parameter; `errors` collects their exceptions."""
        plan = self.plan
        if self._without_state:
            bound_gains(plan, self._without_state)
        if plan.controlled["before_prox"]:
            errors += self._update_strengths("before_prox")
        if plan.routes["cautious"]:
            apply_cautious_decay(plan, skipped, measure=bool(moved))
        if plan.routes["orthant"]:
            copies = self.copies
            keep_orthants(plan, copies.keys if copies and not copies.averaged else ())
        if plan.routes["prox"]:
            errors += apply_proxes(plan, "prox", skipped, moved)
        if plan.faces:
            keep_faces(plan)
        if plan.routes["project"]:
            errors += apply_proxes(plan, "project", skipped, moved)

    @torch.no_grad()
    def _update_strengths(self, phase: str) -> list[Exception]:
        """Ask the controllers of a phase for strengths; return their exceptions.

        A controller that raises keeps its strength and memory.
        """
        errors: list[Exception] = []
        shared: dict[int, dict[str, object]] = {}
        step = self.steps + (phase == "before_prox")
        for live, held in self.plan.controlled[phase]:
            controller = cast(Controller, live.source)
            if step % controller.every:
                continue
            bindings = [b for b in held if b.has_gradients]
            if not bindings:
                continue
            scratch = shared.setdefault(id(controller), {})
            readings = [
                reading_of(b, self.plan, self._weights_before.get(b.name)) for b in bindings
            ]
            memory = dict(live.memory)
            observation = Observation(readings, self.model, live.memory, scratch)
            try:
                with torch.enable_grad():
                    live.set(controller.next(cast(float, live.value), observation, step))
            except Exception as error:
                live.memory = memory
                errors.append(error)
        return errors

    def _undo_step(self) -> None:
        """Restore the user's gradients and weights after a step that raised."""
        self._inner_gradient.arrived()
        self._restore_gradients(others=False)  # backward may have run again since
        records, self._decay_records = self._decay_records, []
        undo_decay(self.plan, records)
        for binding, average in self._averages_before:
            binding.average, binding.orthant_point, binding.face = average, None, None
        self._averages_before = []
        for binding in (*self.plan.routes["cautious"], *self.plan.faces):
            binding.weights_before = None
        self._weights_before.clear()
        self._clear_recorded()
        self.activity.record()

    @property
    def _gradients_may_vanish(self) -> bool:
        """Whether gradients may be cleared within the step, by the optimizer or another hook."""
        return not self._is_torch_optimizer or len(self.optimizer._optimizer_step_post_hooks) > 1

    @property
    def _is_only_hook(self) -> bool:
        """Whether no other hook observes or changes the optimizer within its step."""
        hooks = self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks
        return all(len(registered) == 1 for registered in hooks)

    def _clear_recorded(self) -> None:
        for binding in self._recorded:
            binding.had_gradients = False
        self._recorded = ()

    def _warn_of_own_gradients(self) -> None:
        binding = self.plan.first_on(*GRADIENT_ROUTES)
        if self._warned_of_own_gradients or binding is None:
            return
        self._warned_of_own_gradients = True
        kind = type(self.optimizer).__name__
        warn(
            f"{kind} computes gradients within its step, where {binding.name} has no "
            f"part in them: give the function that computes them to `step` as its closure, or "
            f"regularize a plain optimizer such as AdamW"
        )

    def _restore_gradients(self, *, others: bool) -> None:
        """Restore the user's gradients, except where they were zeroed.

        `others` says whether to also replace tensors that the optimizer put in their place.
        """
        self._own_decay.restore()
        for param, grad in self._user_gradients.items():
            now = param.grad
            ours, version = self._our_gradients.get(param, (now, None))
            if now is ours and now is not None:
                still = version in (None, now._version) or bool(local(now).any())
            else:
                still = now is not None and others
            if still:
                param.grad = grad
        self._user_gradients, self._our_gradients = {}, {}


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
            whole = local(own[0]) if binding.sees_own_shape else held.read()
            projected = binding.base.prox(whole, 1.0)
            local(own[0]).copy_(projected) if binding.sees_own_shape else held.write_(projected)


def penalty_value(binding: Binding) -> Tensor:
    """Return the penalty on the full weights."""
    return all_reduce_sum(binding.penalty.value(binding.read()), binding.target.params[0])
