"""Attach penalties to the user's own optimizer, through its step hooks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel

from tikhon import notebook, plotting
from tikhon.regularizer.attachment import Attachment, apply_to_copies, penalty_value, zero_masks
from tikhon.regularizer.audit import (
    Audit,
    Trace,
    build_audit,
    check_terms_are_held,
    messages_on_lost_terms,
    warn,
    warn_of_contradictions,
)
from tikhon.regularizer.bound_terms import BoundTerms
from tikhon.regularizer.controller import Controller
from tikhon.regularizer.hooks import hook_owners
from tikhon.regularizer.optimizers import (
    as_list,
    check_weight_copies,
    inner_optimizer,
    refuse_gradient_wrappers,
)
from tikhon.regularizer.plan import bindings_held_by, clone_tensors, route_of
from tikhon.regularizer.shards import count_zeros, refuse_flattened, refuse_inexact
from tikhon.regularizer.step import refuse_unsupported
from tikhon.regularizer.targets import entries_of
from tikhon.regularizer.terms import (
    Binding,
    How,
    LiveStrength,
    Route,
    Term,
    Terms,
    replay_terms,
    split_strengths_by_optimizer,
)
from tikhon.wrappers import unwrap

Optimizers = optim.Optimizer | Iterable[optim.Optimizer] | Mapping[Any, optim.Optimizer]


def regularize(
    model: nn.Module, optimizer: Optimizers, terms: Terms, *, how: How = "objective"
) -> Regularizer:
    """Attach penalties and constraints to the weights that `optimizer` trains; your loop stays.

    `how="objective"` minimises exactly `loss + strength * penalty`: by gradient for smooth
    penalties, otherwise by a proximal step scaled like the optimizer's update, which gives exact
    zeros. `how="decoupled"` moves by `lr * strength` without that scale, like AdamW's weight
    decay; "independent" by `strength` times lr relative to its start, as in AdamW's paper;
    "cautious" like "decoupled", but only where the optimizer's own move agrees.

    Args:
        model: the module; wrappers (DistributedDataParallel, torch.compile) are unwrapped.
        optimizer: any torch optimizer, or a list or dict of those that train the model together
            (Muon for matrices, AdamW for the rest; one for each parameter); for a wrapper such as
            Accelerate's or SAM, the inner optimizer whose `step` moves the weights is used.
        terms: a penalty for all weights, or a dict from patterns (see `select`) to a penalty, a
            `Term` or a list of these. Every matching term applies.
        how: the default mode of terms.

    Raises ValueError for a pattern without match, two prox terms on one parameter, or when the
    optimizer holds none of the parameters; TypeError if the optimizer does not allow exactness.

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
    """Penalties attached to one or more optimizers; a handle and a context manager.

    Order within a step: penalty gradients (after the user's own clipping), decoupled smooth decay,
    the optimizer's step, prox, constraints, controllers. After the step, even if it raised,
    `.grad` is as the user's backward left it. Parameters whose `.grad` is None are skipped, as for
    weight_decay. Parameters replaced or added later are tracked. If pickled or deep-copied
    together with its optimizer, it attaches itself again.
    """

    model: nn.Module

    def __init__(
        self, model: nn.Module, optimizer: Optimizers, terms: Terms, *, how: How = "objective"
    ) -> None:
        if isinstance(model, AveragedModel):
            raise TypeError(
                "AveragedModel holds averages of weights, which no optimizer trains; regularize "
                "the model that it was made from"
            )
        self.model = unwrap(model)
        refuse_flattened(model)
        self.terms = terms
        self.how: How = how
        self._attachments: list[Attachment] = []
        self._bound = BoundTerms.of(self.model, terms, how)
        self._warned: set[str] = set()
        attachments = self._attachments_to(optimizer, [])
        sources = {id(b.live.source): b.live.source for b in self._bound.bindings}
        for source in sources.values():
            if isinstance(source, Controller):
                source.check(self.model)
        self._attach(attachments)

    # -- what is attached ---------------------------------------------------------------------

    def attach(self, optimizer: Optimizers) -> None:
        """Attach to other optimizers instead, such as one rebuilt for the same parameters."""
        steps = [attachment.steps for attachment in self._attachments]
        self.remove()
        if not self._bound.is_current():
            self._bound = self._bound.rebind(self._warn_once)
        self._attach(self._attachments_to(optimizer, steps))

    def _attachments_to(
        self, optimizer: Optimizers, steps: Sequence[int], *, first: bool = True
    ) -> list[Attachment]:
        """Build the attachments to every optimizer; raise for unused terms the `first` time."""
        given = as_list(optimizer)
        inner = [inner_optimizer(one) for one in given]
        found = list({id(one): one for one in inner}.values())
        if not found:
            raise ValueError("regularize needs an optimizer, received an empty list")
        counts = [*steps, *[max(steps, default=0)] * len(found)]
        around = {
            id(one): type(whole).__name__ for one, whole in zip(inner, given) if one is not whole
        }
        attachments = [
            Attachment(
                one, self.model, count, self._is_current, self._rebind, around.get(id(one), "")
            )
            for one, count in zip(found, counts)
        ]
        self._plan(attachments)
        if first:
            check_terms_are_held(self._bound.bindings, found)
        for attachment in attachments:
            own = attachment.plan.bindings
            whole = next(w for one, w in zip(inner, given) if one is attachment.optimizer)
            refuse_gradient_wrappers(whole, attachment.optimizer, own)
            routed: list[tuple[Binding, Route]]
            routed = [(b, route_of(b, attachment.optimizer)) for b in own]
            attachment.copies = check_weight_copies(attachment.optimizer, routed)
            others = [x for x in hook_owners(attachment.optimizer) if isinstance(x, Attachment)]
            earlier = [binding for other in others for binding in other.plan.bindings]
            warn_of_contradictions(self.model, attachment.optimizer, own, earlier)
        return attachments

    def _attach(self, attachments: list[Attachment]) -> None:
        self._attachments = attachments
        for attachment in attachments:
            attachment.begin()

    def _plan(self, attachments: Sequence[Attachment]) -> None:
        """Assign to every attachment the terms on parameters of its optimizer."""
        bindings = self._bound.bindings
        owners = [bindings_held_by(attachment.optimizer, bindings) for attachment in attachments]
        first = {b: i for i in reversed(range(len(owners))) for b in owners[i]}
        split_strengths_by_optimizer(bindings, first)
        free = [binding for binding in bindings if binding not in first]
        for i, (attachment, own) in enumerate(zip(attachments, owners)):
            seen = [*own, *free] if i == 0 else own  # strengths of unused terms move too
            attachment.plan_steps(seen, self._bound.places)
            for binding in attachment.plan.bindings:
                refuse_inexact(binding)
                refuse_unsupported(attachment.optimizer, binding)

    def _is_current(self) -> bool:
        return self._bound.is_current()

    def _rebind(self) -> None:
        """Track parameters replaced or added, in the model or in an optimizer."""
        before = [b for attachment in self._attachments for b in attachment.plan.bindings]
        self._bound = self._bound.rebind(self._warn_once)
        self._plan(self._attachments)
        if any(attachment.plan.bindings for attachment in self._attachments):
            for message in messages_on_lost_terms(
                self.model, before, self._bound.bindings, self.optimizers
            ):
                self._warn_once(message)
        else:
            self._warn_once(
                "the optimizer holds none of the regularized parameters any more: those of the "
                "model were replaced; give the new ones to the optimizer (add_param_group), or "
                "build it again and call attach(optimizer)"
            )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warn(message)

    def remove(self) -> None:
        """Detach from the optimizers, leaving weights and optimizers unchanged."""
        for attachment in self._attachments:
            attachment.remove()

    @property
    def steps(self) -> int:
        """Steps taken, excluding skipped ones; the maximum over optimizers."""
        return max(attachment.steps for attachment in self._attachments)

    @property
    def optimizer(self) -> optim.Optimizer:
        """The (first) optimizer."""
        return self._attachments[0].optimizer

    @property
    def optimizers(self) -> list[optim.Optimizer]:
        """All optimizers."""
        return [attachment.optimizer for attachment in self._attachments]

    def __repr__(self) -> str:
        names = [binding.name for binding in self._bound.bindings]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        kinds = ", ".join(type(one).__name__ for one in self.optimizers)
        return f"Regularizer({', '.join(names[:3])}{more}; {kinds}, step {self.steps})"

    def _repr_html_(self) -> str:
        head = ("term", "mode", "strength", "value", "zeros", "share of the move")
        rows = [
            (t.name, t.how, t.strength, t.value, t.zeros, "" if t.share is None else t.share)
            for t in self.trace()
        ]
        return notebook.html_card(repr(self), (), head, rows)

    def plot(self, *, ax: plotting.Axes | None = None) -> plotting.Display:
        """Plot the zeros of every term's parameter, and below the term's share of the last move.

        If nothing is zero (L2 alone), the values of the terms are shown instead of zeros.

        On the two matplotlib axes `ax`, or a new figure; InputError without matplotlib.
        """
        traces = self.trace()
        display = plotting.canvas(ax, 1, 1)
        above, below = display.axes_
        names = [trace.name for trace in traces]
        zeros = [trace.zeros for trace in traces]
        if any(zeros):
            plotting.bars(above, names, zeros, x="share of zeros")
            above.set_xlim(0, 1)
        else:
            plotting.bars(above, names, [trace.value for trace in traces], x="value of the term")
        shares = [0.0 if trace.share is None else trace.share for trace in traces]
        plotting.bars(below, names, shares, x="share of the move")
        below.set_xlim(0, 1)
        display.ax_.set_title(f"step {self.steps}")
        return display

    def __enter__(self) -> Regularizer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._correct_steps()
        if not self._bound.is_current():
            self._rebind()
        kept = {k: v for k, v in vars(self).items() if k != "_attachments"}
        made = [
            (a.optimizer, a.steps, a.activity.uncounted, a.acts, a.copies)
            for a in self._attachments
        ]
        return {**kept, "made": made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        optimizers, steps, uncounted, acts, copies = zip(*state.pop("made"))
        vars(self).update(state, _attachments=[])
        with warnings.catch_warnings(action="ignore"):
            self._attachments = self._attachments_to(optimizers, steps, first=False)
        for attachment, count, found in zip(self._attachments, uncounted, copies):
            attachment.activity.uncounted = count
            attachment.copies = found  # a copied optimizer may lack what its test needs
        if all(acts):
            self._attach(self._attachments)

    @torch.no_grad()
    def zeros(self) -> dict[str, Tensor]:
        """Return masks of current zeros by parameter, for terms that make zeros.

        For an average loaded into the model itself, see `apply`.
        """
        self._check_active()
        return zero_masks(self._bound.bindings)

    @torch.no_grad()
    def apply(self, copy: nn.Module, *, zeros: Mapping[str, Tensor] | None = None) -> None:
        """Apply zeros and constraints to a copy of the model (an EMA or SWA average).

        An average is zero only where the weight was zero in every step. If the copy is the model
        itself, into which an average was loaded, pass `zeros` from `zeros()` before that. Raises
        ValueError for a copy of another model.

        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> reg = tk.regularize(model, optimizer, tk.L1(10.0))
        >>> average = torch.optim.swa_utils.AveragedModel(model)
        >>> for _ in range(9):
        ...     model(torch.ones(1, 3)).sum().backward()
        ...     optimizer.step(); optimizer.zero_grad()
        ...     average.update_parameters(model)
        >>> reg.apply(average)
        >>> bool(average.module.weight.any())
        False
        """
        self._check_active()
        there = {name: entry.param for entry in entries_of(unwrap(copy)) for name in entry.names}
        for binding in self._bound.bindings:
            if missing := [name for name in binding.target.names if name not in there]:
                raise ValueError(f"the copy has no parameter {missing[0]!r}; is it of this model?")
        apply_to_copies(self._bound.bindings, there, zeros)

    # -- reading ------------------------------------------------------------------------------

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return the sum of all penalties on the full weights, a detached 0-d tensor."""
        self._check_active()
        values = [penalty_value(b) for b in self._bound.bindings if not b.base.constraint]
        return sum(values[1:], values[0]) if values else torch.zeros(())

    @torch.no_grad()
    def sparsity(self) -> dict[str, float]:
        """Return the share of exact zeros in each regularized parameter."""
        self._check_active()
        bindings = self._bound.bindings
        params = {n: p for b in bindings for n, p in zip(b.target.names, b.target.params)}
        counts = {name: count_zeros(param) for name, param in params.items()}
        return {name: zeros / max(1, entries) for name, (zeros, entries) in counts.items()}

    def strengths(self) -> dict[str, float]:
        """Return current strengths by `parameter/Penalty`."""
        self._correct_steps()
        bindings = self._bound.bindings
        return {b.name: float(b.live.value) for b in bindings if not b.base.constraint}

    def live_strengths(self) -> list[LiveStrength]:
        """Return the live strengths; parameters may share one."""
        return list(self._live_strengths().values())

    def replay(self, steps: int) -> dict[object, list[Term]]:
        """Return terms that replay the strengths found by `Hypergradient` over `steps` steps."""
        return replay_terms(self._bound.bindings, steps)

    def audit(self, *, steps_per_epoch: int | None = None) -> Audit:
        """Return the audit: every parameter with its terms, mode and strength, or why it is
        excluded.

        L2 that decays at one rate is also given as its time constant in steps, and with
        `steps_per_epoch` in epochs.

        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> reg = tk.regularize(model, optimizer, tk.L2(1e-3))
        >>> reg.audit(steps_per_epoch=50)["weight"].note
        'decay time 1,000 steps (20 epochs)'
        """
        self._check_active()
        entries, bound = entries_of(self.model), self._bound.bindings
        return build_audit(self.model, entries, bound, self.optimizers, steps_per_epoch)

    @torch.no_grad()
    def trace(self) -> list[Trace]:
        """Return the state and effect of each term: value, zeros, share of a recent update.

        The share is measured in the first step and in the step after each call of `trace`, at no
        cost in others. It is None until measured.
        """
        self._check_active()
        zeros = self.sparsity()
        for attachment in self._attachments:
            attachment.measure()
        return [
            Trace(
                name=b.name,
                parameter=b.target.name,
                penalty=type(b.base).__name__,
                how="constraint" if b.base.constraint else b.how,
                strength=float(b.live.value),
                value=float(penalty_value(b)),
                zeros=sum(zeros[name] for name in b.target.names) / len(b.target.names),
                share=None if b.share is None else float(b.share),
                entries=sum(param.numel() for param in b.target.params),
            )
            for b in self._bound.bindings
        ]

    def _check_active(self) -> None:
        """Check the current weights; warn if they were trained without the hooks."""
        self._correct_steps()
        if not self._bound.is_current():
            self._rebind()
        for live in self._live_strengths().values():
            if live.rejections is not None and (count := int(live.rejections)):
                live.rejections = None
                self._warn_once(
                    f"the strength of {live.name} was negative or not finite at {count} readings "
                    f"on the device, and taken as 0 there; look at what computes it"
                )
        bypassed = [a for a in self._attachments if a.acts and a.is_bypassed]
        active_ids = {id(p) for a in self._attachments if a not in bypassed for p in a.params}
        for attachment in bypassed:
            if id(attachment.activity.param) not in active_ids:  # moved by another one's steps
                kind = type(attachment.optimizer).__name__
                warn(
                    f"penalty inactive since step {attachment.steps}: the weights were trained on "
                    f"without this Regularizer, which acts in the `step` of its {kind}; call "
                    f"attach(optimizer) with the optimizer whose `step` moves the weights, and "
                    f"load the state_dict of the Regularizer together with the optimizer's"
                )

    def _correct_steps(self) -> None:
        for attachment in self._attachments:
            attachment.correct_steps()

    def _live_strengths(self) -> dict[str, LiveStrength]:
        self._correct_steps()
        return {binding.live.name: binding.live for binding in self._bound.bindings}

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return steps, strengths, and memory of controllers, 16-bit rounding and gradients."""
        live_strengths = self._live_strengths()
        return {
            "schema_version": 1,
            "steps": self.steps,
            "steps_of_each": [attachment.steps for attachment in self._attachments],
            "strengths": {name: live.value for name, live in live_strengths.items()},
            "memory": {name: clone_tensors(live.memory) for name, live in live_strengths.items()},
            "rounding": clone_tensors(self._bound.rounding.errors),
            "averages": clone_tensors(
                {b.name: b.average for b in self._bound.bindings if b.average is not None}
            ),
            "peaks": {b.name: list(b.peaks.values()) for b in self._bound.bindings if b.peaks},
            "lags": {b.name: list(b.lags.values()) for b in self._bound.bindings if b.lags},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; ValueError if it does not match."""
        if not isinstance(state, dict) or state.get("schema_version") != 1:
            held = sorted(map(str, state))[:5] if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"expected what Regularizer.state_dict() gave, with schema_version 1, received "
                f"{held}; a model's and an optimizer's state are loaded by these"
            )
        live_strengths = self._live_strengths()
        if set(live_strengths) != set(state["strengths"]):
            raise ValueError(
                f"the state is of other terms: it has {sorted(state['strengths'])}, this "
                f"Regularizer has {sorted(live_strengths)}; build it with the same terms first"
            )
        counts = state.get("steps_of_each", [state["steps"]])
        if len(counts) != len(self._attachments):
            raise ValueError(
                f"the state is of {len(counts)} optimizers, this Regularizer has "
                f"{len(self._attachments)}; give regularize the same optimizers in the same order"
            )
        for name, live in live_strengths.items():
            live.memory = clone_tensors(state["memory"][name])
        for attachment, count in zip(self._attachments, counts):
            attachment.steps = count
            for live in attachment.plan.live:
                live.update(count)
        for name, live in live_strengths.items():
            if isinstance(live.source, Controller):
                live.set(state["strengths"][name])
        self._bound.rounding.errors = clone_tensors(state["rounding"])
        averages = clone_tensors(state.get("averages", {}))
        for binding in self._bound.bindings:
            binding.average = averages.get(binding.name)
            if known := state.get("peaks", {}).get(binding.name):
                binding.peaks = dict(zip(binding.target.params, known))
            known = state.get("lags", {}).get(binding.name, ())
            binding.lags = dict(zip(binding.target.params, known))
