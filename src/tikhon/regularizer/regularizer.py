"""When: penalties on the user's own optimizer, through its step hooks."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn, optim

from tikhon import notebook
from tikhon.regularizer.audit import (
    LOOKS,
    Audit,
    Trace,
    assign,
    warn,
    warn_of_contradictions,
    warn_of_lost_layers,
)
from tikhon.regularizer.controller import Controller, Observation
from tikhon.regularizer.orthant import add_pseudo_gradients, keep_orthants
from tikhon.regularizer.plan import (
    Plan,
    Unread,
    cloned,
    closure_of,
    innermost,
    sight,
    sizes_of,
    steps_of,
    untraced,
)
from tikhon.regularizer.shards import refuse_inexact, zeros_of
from tikhon.regularizer.step import (
    add_gradients,
    bound_gains,
    reading_of,
    refuse_unsupported,
    remember,
    settle,
    shrink,
    shrink_cautiously,
)
from tikhon.regularizer.targets import is_lazy, slots, summed
from tikhon.regularizer.terms import Binding, Dial, How, Term, Terms, bind, replayed
from tikhon.wrappers import unwrap


def regularize(
    model: nn.Module, optimizer: optim.Optimizer, terms: Terms, *, how: How = "objective"
) -> Regularizer:
    """Put penalties and constraints on the weights that `optimizer` trains; your loop stays.

    `how="objective"` minimises exactly `loss + strength * penalty`: by gradient for smooth
    penalties, otherwise by prox in the optimizer's own metric, which leaves exact zeros.
    `how="decoupled"` moves by `lr * strength` outside the metric, as AdamW decays weights;
    "independent" by `strength` times what a scheduler has made of lr (lr over its start), as in
    AdamW's paper; "cautious" as "decoupled", only where the optimizer's own move agrees.

    Args:
        model: the module; wrappers (DistributedDataParallel, torch.compile) are looked through.
        optimizer: any torch optimizer; wrappers such as Accelerate's are looked through.
        terms: a penalty for all weights, or a dict from patterns (see `select`) to a penalty, a
            `Term` or a list of these. Every matching term applies.
        how: the mode of terms that do not name their own.

    Raises ValueError for a pattern without match, two prox terms on one parameter, or when the
    optimizer holds none of the parameters; TypeError where the optimizer cannot do it exactly.

    >>> model = nn.Linear(3, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    >>> reg = tk.regularize(model, optimizer, tk.L1(10.0))
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(8, 3)).square().mean().backward()
    ...     optimizer.step()
    >>> reg.sparsity()
    {'weight': 1.0}
    """
    return Regularizer(model, optimizer, terms, how=how)


class Regularizer:
    """Penalties attached to an optimizer; a handle, and a context manager that removes itself.

    The order within a step: penalty gradients (after the user's own clipping), decoupled smooth
    decay, the optimizer's step, prox, constraints, controllers. After the step `.grad` is what the
    user's backward left there. A parameter whose `.grad` is None is left alone, as weight_decay
    leaves it alone. Pickled or deep-copied together with its optimizer, it attaches itself again.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        terms: Terms,
        *,
        how: How = "objective",
    ) -> None:
        self.model = unwrap(model)
        self.terms = terms
        self.how: How = how
        self.steps = 0
        self._bindings = bind(self.model, slots(self.model), terms, how)
        self._lazy = any(map(is_lazy, self.model.parameters()))
        self._gradients: list[tuple[nn.Parameter, Tensor]] = []  # the user's own
        self._earlier: dict[str, Tensor] = {}  # weights for controllers with needs_before
        self._moved: dict[str, Tensor] | None = {}  # weights that shares are measured from
        self._fresh: list[Binding] = []  # whose parameters have no state before the step
        self._unread: Unread | None = None  # whether the last step was skipped
        self._warned = False  # of layers that were lost
        self._handles: list[Any] = []
        self.attach(optimizer)

    # -- the handle ---------------------------------------------------------------------------

    def attach(self, optimizer: optim.Optimizer) -> None:
        """Move to `optimizer`, for instance one that was built anew for the same parameters."""
        self.remove()
        self.optimizer = optimizer = innermost(optimizer)
        self._plan = Plan.of(optimizer, self._bindings)
        if not any(self._plan.routes.values()):
            names = ", ".join(binding.target.name for binding in self._bindings[:5])
            raise ValueError(
                f"the optimizer holds none of the matched parameters ({names}); attach to the "
                f"optimizer that was built from this model's parameters"
            )
        self._check_terms()
        beside = _attached.setdefault(optimizer, weakref.WeakSet())
        earlier = [binding for other in beside for binding in other._bindings]
        warn_of_contradictions(self.model, optimizer, self._bindings, earlier)
        beside.add(self)
        self._steps_before = steps_of(optimizer) - self.steps
        self._last_seen = None
        self._handles = [
            optimizer.register_step_pre_hook(untraced(self._pre_step)),
            optimizer.register_step_post_hook(untraced(self._post_step)),
        ]

    def remove(self) -> None:
        """Detach from the optimizer; weights and the optimizer stay as they are."""
        self._recount()
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _attached[self.optimizer].discard(self)
        self._handles = []

    def __repr__(self) -> str:
        names = [binding.name for binding in self._bindings]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        kind = type(self.optimizer).__name__
        return f"Regularizer({', '.join(names[:3])}{more}; {kind}, step {self.steps})"

    def _repr_html_(self) -> str:
        head = ("term", "mode", "strength", "value", "zeros", "share of the move")
        rows = [
            (t.name, t.how, t.strength, t.value, t.zeros, "" if t.share is None else t.share)
            for t in self.trace()
        ]
        return notebook.card(repr(self), (), head, rows)

    def __enter__(self) -> Regularizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._recount()
        lost = ("_handles", "_plan", "_last_seen")
        return {k: v for k, v in vars(self).items() if k not in lost}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _handles=[])
        with warnings.catch_warnings(action="ignore"):
            self.attach(self.optimizer)
        self._steps_before = state["_steps_before"]

    # -- reading ------------------------------------------------------------------------------

    @torch.no_grad()
    def value(self) -> Tensor:
        """Sum of all penalties over the whole weights, a detached 0-d tensor."""
        self._check_active()
        values = [self._value(b) for b in self._bindings if not b.base.constraint]
        return sum(values[1:], values[0]) if values else torch.zeros(())

    @torch.no_grad()
    def sparsity(self) -> dict[str, float]:
        """Share of exact zeros in each regularized parameter."""
        self._check_active()
        params = {n: p for b in self._bindings for n, p in zip(b.target.names, b.target.params)}
        counts = {name: zeros_of(param) for name, param in params.items()}
        return {name: zeros / max(1, entries) for name, (zeros, entries) in counts.items()}

    def strengths(self) -> dict[str, float]:
        """The strength in force of every term on every parameter, by `parameter/Penalty`."""
        self._recount()
        return {b.name: float(b.dial.value) for b in self._bindings if not b.base.constraint}

    def dials(self) -> list[Dial]:
        """The strengths with what moves them, one for all parameters that share it."""
        return list(self._dials().values())

    def replay(self, steps: int) -> dict[Any, list[Term]]:
        """The terms with the strengths that `Hypergradient` found, for another run of `steps`."""
        return replayed(self._bindings, steps)

    def audit(self) -> Audit:
        """Who gets what: every parameter, its terms, mode, strength now, and why excluded."""
        self._check_active()
        return assign(self.model, slots(self.model), self._bindings, self.optimizer)

    @torch.no_grad()
    def trace(self) -> list[Trace]:
        """What each term is and did: value, zeros and its share of a recent update.

        The share is measured in the first step and in the step after each call of `trace`, so it
        costs nothing in the others. It is None before it was measured.
        """
        self._check_active()
        zeros = self.sparsity()
        self._moved = {} if self._moved is None else self._moved
        return [
            Trace(
                name=b.name,
                parameter=b.target.name,
                penalty=type(b.base).__name__,
                how="constraint" if b.base.constraint else b.how,
                strength=float(b.dial.value),
                value=float(self._value(b)),
                zeros=sum(zeros[name] for name in b.target.names) / len(b.target.names),
                share=None if b.share is None else float(b.share),
            )
            for b in self._bindings
        ]

    def state_dict(self) -> dict[str, Any]:
        """Steps, strengths, the memory of controllers, of 16-bit rounding and of gradients."""
        dials = self._dials()
        return {
            "schema_version": 1,
            "steps": self.steps,
            "strengths": {name: dial.value for name, dial in dials.items()},
            "memory": {name: cloned(dial.memory) for name, dial in dials.items()},
            "rounding": cloned(self._bindings[0].rounding.lost),
            "averages": cloned(
                {b.name: b.average for b in self._bindings if b.average is not None}
            ),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the `state_dict` was taken; ValueError if the terms are others."""
        dials = self._dials()
        if set(dials) != set(state["strengths"]):
            raise ValueError(
                f"the state is of other terms: it has {sorted(state['strengths'])}, this "
                f"Regularizer has {sorted(dials)}; build it with the same terms first"
            )
        self.steps = state["steps"]
        for name, dial in dials.items():
            dial.memory = cloned(state["memory"][name])
            dial.turn(self.steps)
            if isinstance(dial.source, Controller):
                dial.set(state["strengths"][name])
        self._bindings[0].rounding.lost = cloned(state["rounding"])
        averages = cloned(state.get("averages", {}))
        for binding in self._bindings:
            binding.average = averages.get(binding.name)

    # -- one step -----------------------------------------------------------------------------

    def _pre_step(self, optimizer: optim.Optimizer, args: Any, kwargs: Any) -> Any:
        if self._unread is not None:
            self._recount()
        if self._lazy or self._plan.sizes != sizes_of(optimizer):
            self._rematch()
        self._fresh = bound_gains(self._plan, self._plan.bounded) if self._plan.bounded else []
        if self._plan.late and self._moved is None:
            return None
        for binding in self._plan.copied:
            self._earlier[binding.name] = binding.read().clone()
        closure = closure_of(args, kwargs)
        if closure is None:
            self._penalize()
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
                    loss = loss + sum(self._value(b) for b in self._plan.active("gradient"))
            return loss

        return evaluate

    def _penalize(self, *, decay: bool = True) -> None:
        """All that comes before the optimizer's own step."""
        plan, measure = self._plan, self._moved is not None
        scale = getattr(self.optimizer, "grad_scale", None)  # fused ones divide inside
        skipped = getattr(self.optimizer, "found_inf", None)
        if plan.routes["gradient"]:
            self._gradients = add_gradients(plan, scale, measure=measure)
        if plan.routes["orthant"]:
            self._gradients += add_pseudo_gradients(
                plan, scale, skipped, first=decay, measure=measure
            )
        if decay and plan.routes["decay"]:
            shrink(plan, skipped, measure=measure)
        if decay and plan.routes["cautious"]:
            remember(plan)
        if measure:
            self._moved = {b.name: b.read().clone() for b in self._bindings}

    def _post_step(self, optimizer: optim.Optimizer, args: Any, kwargs: Any) -> None:
        """All that comes after it, except when a GradScaler has found an overflow."""
        self._restore_gradients()
        plan = self._plan
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None:
            if skipped.device.type == "cpu" or plan.is_consulted(self.steps + 1):
                if skipped:
                    return
                skipped = None
            elif not plan.constant:
                self._unread = Unread(skipped)
        moved, self._moved = self._moved or {}, None
        for binding in plan.active("decay") if moved else ():
            own = (binding.read() - moved[binding.name]).norm()
            binding.share = binding.share / (binding.share + own)  # type: ignore[operator]
        if self._fresh:
            bound_gains(plan, self._fresh)
        if plan.consulted["moved"]:
            self._consult("moved")
        if plan.routes["cautious"]:
            shrink_cautiously(plan, skipped, measure=bool(moved))
        if plan.routes["orthant"]:
            keep_orthants(plan)
        if plan.routes["prox"]:
            settle(plan, "prox", skipped, moved)
        if plan.routes["project"]:
            settle(plan, "project", skipped, moved)
        self.steps += 1
        if plan.consulted["settled"]:
            self._consult("settled")
        if self.steps in LOOKS and not self._warned:
            self._warned = warn_of_lost_layers(optimizer, plan.active("prox"))
        for dial in plan.moving:
            dial.turn(self.steps)
        self._last_seen = sight(plan.watched)

    @torch.no_grad()
    def _consult(self, phase: str) -> None:
        """Ask the controllers of a phase for their strengths."""
        shared: dict[int, dict[str, Any]] = {}
        step = self.steps + (phase == "moved")
        for dial, held in self._plan.consulted[phase]:
            controller = cast(Controller, dial.source)
            bindings = [b for b in held if b.trained]
            if step % controller.every or not bindings:
                continue
            scratch = shared.setdefault(id(controller), {})
            readings = [reading_of(b, self._plan, self._earlier.get(b.name)) for b in bindings]
            observation = Observation(readings, self.model, dial.memory, scratch)
            with torch.enable_grad():
                dial.set(controller.next(cast(float, dial.value), observation, step))

    def _recount(self) -> None:
        """Take the last step back from the count if the device has skipped it."""
        unread, self._unread = self._unread, None
        if unread:
            self.steps -= 1
            for dial in self._plan.moving:
                dial.turn(self.steps)

    def _restore_gradients(self) -> None:
        for param, grad in reversed(self._gradients):  # the first of several is the user's
            param.grad = grad
        self._gradients = []

    # -- bindings and groups ------------------------------------------------------------------

    def _held(self, binding: Binding) -> bool:
        return all(id(param) in self._plan.groups for param in binding.target.params)

    def _rematch(self) -> None:
        """Notice add_param_group, and lazy parameters that have got their shape."""
        if self._lazy and not any(map(is_lazy, self.model.parameters())):
            known = self._dials()
            self._bindings = bind(self.model, slots(self.model), self.terms, self.how)
            for binding in self._bindings:
                binding.dial = known.get(binding.dial.name, binding.dial)
            self._lazy = False
            self._plan = Plan.of(self.optimizer, self._bindings)
        if self._plan.sizes != sizes_of(self.optimizer):
            self._plan = Plan.of(self.optimizer, self._bindings)
            self._check_terms()

    def _check_terms(self) -> None:
        for binding in filter(self._held, self._bindings):
            refuse_inexact(binding)
            refuse_unsupported(self.optimizer, binding)

    def _check_active(self) -> None:
        """Warn if the weights were trained without the hooks, which copies of optimizers lose."""
        self._recount()
        if not self._handles:
            return
        missed = steps_of(self.optimizer) - self._steps_before - self.steps
        first = self._bindings[0].target.params[0]
        behind = self._last_seen is not None and self._last_seen.was_left_behind_by(first)
        if missed > 0 or behind:
            warn(
                f"penalty inactive since step {self.steps}: the weights were trained on without "
                f"this Regularizer; call attach(optimizer) with the optimizer in use, and load "
                f"the state_dict of the Regularizer together with the optimizer's"
            )

    def _dials(self) -> dict[str, Dial]:
        self._recount()
        return {binding.dial.name: binding.dial for binding in self._bindings}

    def _value(self, binding: Binding) -> Tensor:
        return summed(binding.penalty.value(binding.read()), binding.target.params[0])


_attached: weakref.WeakKeyDictionary[optim.Optimizer, weakref.WeakSet[Regularizer]]
_attached = weakref.WeakKeyDictionary()
