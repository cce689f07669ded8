"""Plan the work of a step once: the move of each term, and updates of strengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn, optim

from tikhon.penalties import kernels
from tikhon.penalties.base import Penalty
from tikhon.penalties.constraints import Constraint, TopK
from tikhon.penalties.elementwise import MCP, SCAD
from tikhon.regularizer.controller import Controller
from tikhon.regularizer.metric import (
    Gain,
    Group,
    Rule,
    decoupled_rate,
    has_coupled_decay,
    has_gain,
    is_uniform,
    rule_of,
)
from tikhon.regularizer.rounding import HALF_TYPES
from tikhon.regularizer.targets import is_lazy
from tikhon.regularizer.terms import Binding, LiveStrength, Route, split_strengths_by_group


class Location(NamedTuple):
    """Where a module holds a parameter."""

    parameters: dict[str, nn.Parameter | None]  # the module's parameters
    attribute: str
    param: nn.Parameter
    # at planning time: `model.bfloat16()` and a new `param.data` keep the parameter
    dtype: torch.dtype
    shape: tuple[int, ...]  # () if not known yet


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Bindings of the parameters held by an optimizer, by route, with their live strengths."""

    optimizer: optim.Optimizer
    rule: Rule | None  # the rule of its gain, None if unknown
    # the parameters of each of its groups when the plan was made
    params: tuple[tuple[nn.Parameter, ...], ...]
    places: tuple[Location, ...]  # where the model held the parameters of the terms
    bindings: tuple[Binding, ...]  # those of parameters held by the optimizer
    groups: dict[int, int]  # group index by parameter id
    group_indices: tuple[int, ...]  # indices of groups with terms
    routes: dict[Route, tuple[Binding, ...]]  # bindings by route
    live: tuple[LiveStrength, ...]  # all live strengths, up to date after `turn`
    scheduled: tuple[LiveStrength, ...]  # those of schedules, which change after every step
    tensors: tuple[LiveStrength, ...]  # those given as tensors, which may change in place
    # those of controllers with the bindings they read, by phase
    controlled: dict[str, tuple[tuple[LiveStrength, tuple[Binding, ...]], ...]]
    # bindings whose previous weights a controller needs
    needing_weights_before: tuple[Binding, ...]
    fused: dict[Binding, FusedProx]  # bindings whose prox a kernel may apply in place
    gain_bounded: tuple[Binding, ...]  # bindings whose gain must be bounded
    like_own_decay: frozenset[Binding]  # L2 bindings equal to the optimizer's own weight_decay
    faces: tuple[Binding, ...]  # constraints that act along their bound, as the metric is unknown
    watched_param: nn.Parameter | None  # the parameter that shows training without us
    acts_only_afterwards: bool  # whether nothing precedes the optimizer's own step

    @classmethod
    def of(
        cls, optimizer: optim.Optimizer, bindings: Sequence[Binding], places: Sequence[Location]
    ) -> StepPlan:
        """Plan for the optimizer's current groups."""
        groups = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        split_strengths_by_group(bindings, groups)
        held = bindings_held_by(optimizer, bindings)
        routes: dict[Route, list[Binding]] = {route: [] for route in get_args(Route)}
        for binding in held:
            routes[route_of(binding, optimizer)].append(binding)
        needing_weights_before = tuple(
            b for b in held if isinstance(b.live.source, Controller) and b.live.source.needs_before
        )
        rule = rule_of(optimizer)
        live_strengths = tuple({id(b.live): b.live for b in bindings}.values())
        controlled = _readings_of_controllers(held, live_strengths)
        gain_bounded = _bindings_to_bound(rule, routes["prox"], controlled)
        return cls(
            optimizer=optimizer,
            rule=rule,
            params=tuple(tuple(group["params"]) for group in optimizer.param_groups),
            places=tuple(places),
            bindings=tuple(held),
            groups=groups,
            group_indices=tuple({groups[id(p)]: None for b in held for p in b.target.params}),
            routes={route: tuple(found) for route, found in routes.items()},
            live=live_strengths,
            scheduled=tuple(
                d for d in live_strengths if d.varies and not isinstance(d.source, Controller)
            ),
            tensors=tuple(s for s in live_strengths if isinstance(s.source, Tensor)),
            controlled=controlled,
            needing_weights_before=needing_weights_before,
            fused={
                b: FusedProx.of(b, rule, groups, gain_bounded)
                for b in (*routes["prox"], *routes["project"])
                if b.in_place
            },
            gain_bounded=gain_bounded,
            like_own_decay=frozenset(
                b
                for b in routes["gradient"]
                if b.is_plain_decay
                and has_coupled_decay(rule, optimizer.param_groups[groups[id(b.target.params[0])]])
            ),
            faces=(faces := tuple(b for b in routes["project"] if keeps_to_face(b, optimizer))),
            watched_param=held[0].target.params[0] if held else None,
            acts_only_afterwards=not (
                routes["gradient"]
                or routes["decay"]
                or routes["cautious"]
                or routes["orthant"]
                or faces
                or gain_bounded
                or needing_weights_before
            ),
        )

    def is_current(self) -> bool:
        """Return whether optimizer and model hold the identical parameters."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.params):
            return False
        for group, params in zip(groups, self.params):
            if len(group["params"]) != len(params) or not all(map(is_, group["params"], params)):
                return False
        for parameters, attribute, param, dtype, shape in self.places:
            if parameters.get(attribute) is not param or param.dtype is not dtype:
                return False
            if not is_lazy(param) and param.shape != shape:
                return False
        return True

    @property
    def constant(self) -> bool:
        """Whether all strengths are constant, so that steps need no counting."""
        return not self.scheduled and not any(self.controlled.values())

    def has_controller_due(self, step: int) -> bool:
        """Return whether a controller reads the weights in this step, counted from 1."""
        found = (live.source for phase in self.controlled.values() for live, _ in phase)
        return any(step % cast(Controller, source).every == 0 for source in found)

    def first_on(self, *routes: Route) -> Binding | None:
        """Return the first binding on any of these routes."""
        return next((b for route in routes for b in self.routes[route]), None)

    def active(self, route: Route) -> list[Binding]:
        """Return the bindings of a route that act in this step."""
        return [b for b in self.routes[route] if b.is_active]

    @property
    def active_groups(self) -> list[Group]:
        """The current groups with terms."""
        return [self.optimizer.param_groups[number] for number in self.group_indices]

    def group(self, param: nn.Parameter) -> Group:
        """Return the parameter's current group; groups may be replaced between steps."""
        return self.optimizer.param_groups[self.groups[id(param)]]


def _readings_of_controllers(
    held: Sequence[Binding], live_strengths: Sequence[LiveStrength]
) -> dict[str, tuple[tuple[LiveStrength, tuple[Binding, ...]], ...]]:
    """Return what each controller reads, by phase."""
    found: dict[str, list[tuple[LiveStrength, tuple[Binding, ...]]]] = {
        "before_prox": [],
        "after_prox": [],
    }
    for live in live_strengths:
        if isinstance(live.source, Controller):
            found[live.source.phase].append((live, tuple(b for b in held if b.live is live)))
    return {phase: tuple(pairs) for phase, pairs in found.items()}


def _bindings_to_bound(
    rule: Rule | None,
    proxes: Sequence[Binding],
    controlled: dict[str, tuple[tuple[LiveStrength, tuple[Binding, ...]], ...]],
) -> tuple[Binding, ...]:
    """Return the bindings whose gain must be bounded."""
    if not (rule and rule.memory):
        return ()
    # controllers that seek zeros try strengths that must not enter the moments
    seeking = [b for _, read in controlled["before_prox"] for b in read]
    return tuple(b for b in proxes if b.how == "objective" and b not in seeking)


def route_of(binding: Binding, optimizer: optim.Optimizer) -> Route:
    """Return the move by which the term acts under this optimizer."""
    if binding.how != "objective":
        return binding.route
    if binding.route == "prox" and not has_gain(optimizer):
        return "orthant"
    # a small gradient is lost in a 16-bit sum with the weight; separate moves accumulate
    short = any(param.dtype in HALF_TYPES for param in binding.target.params)
    if binding.route == "gradient" and short and is_uniform(optimizer):
        return "decay"
    return binding.route


def is_euclidean(binding: Binding, optimizer: optim.Optimizer) -> bool:
    """Return whether a projection uses the Euclidean distance instead of the metric.

    If both agree; if the optimizer's metric, or the projection in it, is unknown; and for TopK,
    which goes by size alone: in a metric whose steps grow where gradients vanish it would drop the
    weights that fit.
    """
    base = binding.base
    if not base.constraint:
        return False
    plain = base.elementwise or isinstance(base, TopK) or binding.how != "objective"
    if plain or not has_gain(optimizer):
        return True
    return not (base.diagonal or is_uniform(optimizer))


def keeps_to_face(binding: Binding, optimizer: optim.Optimizer) -> bool:
    """Return whether a constraint acts along its bound, which needs no metric."""
    known = type(binding.base).normals if isinstance(binding.base, Constraint) else None
    return known not in (None, Constraint.normals) and not has_gain(optimizer)


def convex_step_limit(penalty: Penalty) -> float | Tensor | None:
    """Return half the step up to which the prox has one minimum, for penalties with a flat part.

    Where gradients vanish an adaptive step is unbounded, and the prox would jump to zero. Weights
    in the flat part are unaffected by the limit.
    """
    if not isinstance(penalty, MCP | SCAD):
        return None
    limit = penalty.gamma / 2 if isinstance(penalty, MCP) else (penalty.a - 1) / 2
    return limit if penalty.weights is None else limit / cast(Tensor, penalty.weights)


@dataclass(eq=False, slots=True)
class FusedProx:
    """A binding whose prox a kernel may apply in place, with cached tensors.

    They are refreshed when they move in memory.
    """

    binding: Binding
    param: nn.Parameter
    group_index: int  # of its group
    rule: Rule | None
    bounds_next_gain: bool  # whether the kernel may also bound the gain of the next step
    max_step: float  # limit of the prox step in a metric
    form: kernels.KernelForm | None = None
    address: int | None = None
    moment: Tensor | None = None
    state: object = None  # the optimizer's, whose moment was bounded
    version: int = -1  # of the moment at that time

    @classmethod
    def of(
        cls,
        binding: Binding,
        rule: Rule | None,
        groups: dict[int, int],
        gain_bounded: Sequence[Binding],
    ) -> FusedProx:
        """Build for a binding whose parameter a kernel may change; `groups` as in a `StepPlan`."""
        (param,), live, limit = (
            binding.target.params,
            binding.live,
            convex_step_limit(binding.base),
        )
        bounds_next_gain = (
            binding in gain_bounded and live.is_number and not live.varies and limit is None
        )
        most = math.inf if limit is None else cast(float, limit)  # kernels support no weights
        return cls(binding, param, groups[id(param)], rule, bounds_next_gain, most)

    def is_bounded(self, optimizer: optim.Optimizer) -> bool:
        """Return whether the kernel of the last step has bounded this step's gain."""
        return (
            self.state is optimizer.state
            and self.moment is not None
            and self.moment._version == self.version
        )

    def record_bound(self, optimizer: optim.Optimizer) -> None:
        """Note that the kernel has bounded the gain of the next step."""
        self.state, self.version = optimizer.state, cast(Tensor, self.moment)._version

    def job(self, optimizer: optim.Optimizer) -> kernels.KernelJob | None:
        """Return the kernel's work in this step, None if unsupported."""
        group = optimizer.param_groups[self.group_index]
        param, rule, least = self.param, self.rule, 0.0
        if param.data_ptr() != self.address:
            self.form = (
                kernels.kernel_form(self.binding.base, param)
                if kernels.is_supported(param)
                else None
            )
            self.address, self.moment = param.data_ptr(), None
        if self.form is None:
            return None
        if self.binding.base.constraint:
            return kernels.make_job(self.form, 0.0, param, 0.0)
        strength = self.binding.live.value
        if self.binding.how != "objective" or rule is None:
            gain = Gain(decoupled_rate(self.binding.how, group, self.binding.peaks.get(param)))
        elif param in self.binding.gains:
            gain = Gain(self.binding.gains[param])
        else:
            state = optimizer.state[param]
            gain = self.binding.lagged(param, rule.gain(optimizer, group, state))
            if gain.moment is not None and gain.moment is not self.moment:
                if not (gain.root and kernels.has_same_layout(param, gain.moment)):
                    return None
                self.moment, self.state = gain.moment, None
            if self.bounds_next_gain and gain.moment is not None:
                assert rule.memory
                memory = rule.memory(group, state)
                if memory.tensor is gain.moment and memory.beyond is None:
                    least = memory.least(strength * self.binding.steepness)
        most = math.inf if gain.moment is None else self.max_step
        numbers = gain.numerator, gain.moment, gain.scale, gain.eps, least, most
        return kernels.make_job(self.form, strength, param, *numbers)


class DeferredFlag:
    """A flag copied from the device asynchronously, read a step later without stalling."""

    def __init__(self, flag: Tensor) -> None:
        self._flag = flag.to("cpu", non_blocking=True)  # into pinned memory
        self._arrival = torch.Event(flag.device)
        self._arrival.record()

    def __bool__(self) -> bool:
        self._arrival.synchronize()  # waits only for the copy, not for later work
        return bool(self._flag)


def bindings_held_by(optimizer: optim.Optimizer, bindings: Sequence[Binding]) -> list[Binding]:
    """Return the bindings all of whose parameters the optimizer holds."""
    ours = {id(param) for group in optimizer.param_groups for param in group["params"]}
    return [b for b in bindings if all(id(param) in ours for param in b.target.params)]


def clone_tensors(memory: dict[str, Any]) -> dict[str, Any]:
    """Return a dict with cloned tensors."""
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in memory.items()}
