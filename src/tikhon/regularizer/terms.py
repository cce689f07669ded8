"""Terms, and their bindings to the parameters of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from tikhon.arguments import MAX_FLOAT32, is_one_of
from tikhon.errors import describe, unknown_name
from tikhon.penalties import kernels
from tikhon.penalties.base import Penalty, Proximable, check_strength
from tikhon.penalties.elementwise import L2
from tikhon.regularizer.controller import Controller
from tikhon.regularizer.metric import Gain
from tikhon.regularizer.rounding import RoundingErrors
from tikhon.regularizer.targets import (
    ROWS,
    Entry,
    Pattern,
    Product,
    Target,
    is_lazy,
    local,
    match,
    targets_of,
)

How = Literal["objective", "decoupled", "independent", "cautious"]
Route = Literal["gradient", "decay", "cautious", "prox", "orthant", "project"]
Strength = float | Tensor | Callable[[int], float] | Controller

_SUMS = {
    frozenset({"L1", "L2"}): "ElasticNet",
    frozenset({"L1", "GroupLasso"}): "SparseGroupLasso",
}


@dataclass(frozen=True, eq=False)
class Term:
    """A penalty and how it is applied.

    Args:
        penalty: the penalty.
        rows: meaning of a row (see `select`); by default that of the penalty.
        how: "objective", "decoupled", "independent" or "cautious"; by default that of
            `regularize`.
        strength: replaces the penalty's: a number, a schedule (a callable of the step) or a
            controller.

    >>> Term(tk.L2(1e-3), how="decoupled").how
    'decoupled'
    """

    penalty: Penalty
    rows: str | None = None
    how: How | None = None
    strength: Strength | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.penalty, Penalty):
            raise TypeError(f"Term: penalty must be a Penalty, received {describe(self.penalty)}")
        if self.how is not None:
            _check_how(self.how)
        if self.rows is not None and not is_one_of(self.rows, ROWS):
            raise ValueError(unknown_name("rows", self.rows, ROWS))
        if self.strength is not None:
            owner = f"Term({type(self.penalty).__name__})"
            object.__setattr__(self, "strength", check_strength(self.strength, owner))


Terms = Penalty | Term | Mapping[Any, Penalty | Term | Sequence[Penalty | Term]]


@dataclass(eq=False)
class LiveStrength:
    """The current strength of a term, or of one of its parameters, and its source."""

    name: str
    source: Strength
    value: float | Tensor
    memory: dict[str, Any] = field(default_factory=dict)
    is_zero: bool = field(default=False, init=False)  # 0: nothing to do
    is_pending: bool = field(default=False, init=False)  # the schedule raised at this step
    rejections: Tensor | None = field(default=None, init=False)  # values clamped on the device

    @classmethod
    def of(cls, name: str, source: Strength) -> LiveStrength:
        """Create a live strength at its start."""
        live = cls(name, source, 0.0)
        live.value = source.start if isinstance(source, Controller) else 0.0
        live.update(0)
        return live

    @property
    def varies(self) -> bool:
        """Whether the strength is a schedule or a controller."""
        return not isinstance(self.source, (float, int, Tensor))

    @property
    def is_number(self) -> bool:
        """Whether the current strength is a number, not a tensor."""
        return not isinstance(self.value, Tensor)

    def update(self, step: int) -> None:
        """Set the value of a number or schedule at `step`, counted from 0."""
        if isinstance(self.source, Controller):
            return
        self.set(self.source(step) if callable(self.source) else self.source)
        self.is_pending = False

    def advance(self, step: int) -> None:
        """Advance to the value at `step`, deferring exceptions to the step that needs it.

        A table with as many strengths as steps ends there.
        """
        try:
            self.update(step)
        except Exception:
            self.is_pending = True

    def set(self, value: float | Tensor) -> None:
        """Set the value; a negative or non-finite one raises, or becomes 0 on a device."""
        if isinstance(value, Tensor):
            value = self._checked(value)
        else:
            value = self._check_size(check_strength(value, self._owner))
        self.value = value
        self.is_zero = not isinstance(value, Tensor) and value == 0

    @property
    def _owner(self) -> str:
        return f"the strength of {self.name} from {type(self.source).__name__}"

    def _checked(self, value: Tensor) -> Tensor:
        check_strength(value, self._owner)
        if not value.is_cpu:  # counted on the device, reported when the host next synchronises
            fine = value.detach().isfinite() & (value.detach() >= 0)
            self.rejections = (~fine).long() + (0 if self.rejections is None else self.rejections)
            return torch.where(fine, value, 0)
        try:
            number = float(value.detach())
        except RuntimeError:  # one of many under vmap
            return value
        self._check_size(check_strength(number, self._owner))
        return value

    def _check_size(self, number: float) -> float:
        """Return the number if its square, used by adaptive steps, is finite in float32."""
        if number > MAX_FLOAT32:
            raise ValueError(
                f"{self._owner}: strength must be at most {MAX_FLOAT32:g}, whose square is still "
                f"a number of float32, received {number!r}"
            )
        return number


@dataclass(eq=False)
class Binding:
    """One term on one target."""

    name: str
    target: Target
    base: Penalty
    how: How
    live: LiveStrength
    rounding: RoundingErrors
    term: str = ""  # pattern and penalty of the term
    share: float | Tensor | None = None  # of the last measured update
    average: Tensor | None = None  # of gradients, or of what presses against a bound
    orthant_point: Tensor | None = None  # the orthant of the current step
    face: Tensor | None = None  # normals of the bound that holds weights in the current step
    weights_before: Tensor | None = None  # before the step, for cautious decay and faces
    # gains of this step, if the optimizer renews them within it
    gains: dict[nn.Parameter, float | Tensor] = field(default_factory=dict)
    # while a momentum moves: the last one, what its buffer holds and moves, over a steady one's
    lags: dict[nn.Parameter, tuple[float, float, float]] = field(default_factory=dict)
    # largest learning rates so far, for independent decay
    peaks: dict[nn.Parameter, float | Tensor] = field(default_factory=dict)
    had_gradients: bool = False  # whether it had gradients, if the optimizer may clear them

    def lagged(self, param: nn.Parameter, gain: Gain) -> Gain:
        """Return the gain of a parameter whose momentum is not steady."""
        lag = self.lags.get(param)
        return gain if lag is None else gain._replace(numerator=gain.numerator * lag[2])

    @property
    def penalty(self) -> Penalty:
        """The penalty with its current strength."""
        if self.base.strength is not self.live.value:
            self.base = self.base.with_strength(self.live.value)
        return self.base

    @property
    def route(self) -> Route:
        """The term's move in a step, if the optimizer has a gain (see `Plan`)."""
        if self.base.constraint:
            return "project"
        if isinstance(self.base, Proximable) and not self.base.smooth:
            return "prox"
        if self.how == "cautious":
            return "cautious"
        return "gradient" if self.how == "objective" else "decay"

    @cached_property
    def is_plain_decay(self) -> bool:
        """Whether the term is weight decay as in torch."""
        base = self.base
        alone = len(self.target.params) == 1
        return alone and type(base) is L2 and base.center is None and base.weights is None

    @cached_property
    def steepness(self) -> float | Tensor:
        """Size of the penalty's gradient near zero, at strength 1."""
        penalty = cast(Proximable, self.base.with_strength(1.0))
        return penalty.steepness(self.read())

    @cached_property
    def has_kernel(self) -> bool:
        """Whether a kernel supports the prox."""
        routed = self.route in ("prox", "project")
        return routed and len(self.target.params) == 1 and kernels.has_kernel(self.base)

    @cached_property
    def has_rows_in_memory(self) -> bool:
        """Whether the rows are those of the parameter in memory, without a copy."""
        (view, *others), (param, *_) = self.target.views, self.target.params
        return not others and view.lead == (0,) and not view.split and param.ndim > 1

    @cached_property
    def in_place(self) -> bool:
        """Whether a kernel works on the parameter's memory."""
        return self.has_kernel and (self.sees_own_shape or self.has_rows_in_memory)

    @property
    def is_active(self) -> bool:
        """Whether the term acts in this step: non-zero strength, and gradients."""
        return (not self.live.is_zero or self.base.constraint) and self.has_gradients

    @property
    def has_gradients(self) -> bool:
        """Whether all parameters of the target have gradients."""
        for param in self.target.params:
            if param.grad is None:
                return self.had_gradients
        return True

    def record_gradients(self) -> None:
        """Record whether there are gradients, in case the optimizer clears them."""
        self.had_gradients = all(param.grad is not None for param in self.target.params)

    @property
    def sees_own_shape(self) -> bool:
        """Whether the penalty is elementwise and sees one parameter in its own shape."""
        return self.base.elementwise and len(self.target.params) == 1

    def read(self) -> Tensor:
        """Return the weights in the penalty's view, which may share the parameter's memory."""
        named = zip(self.target.names, self.target.params)
        return self.arrange([self.rounding.read(name, param) for name, param in named])

    def write_(self, w: Tensor) -> None:
        """Set the weights from a modified result of `read`."""
        params = self.target.params
        if w.data_ptr() == local(params[0]).data_ptr() and w.is_contiguous() and w.numel():
            return  # modified in place
        if self.sees_own_shape:
            exact = [w]
        else:
            exact = [torch.empty_like(local(p), dtype=w.dtype) for p in params]
            self.target.place_(exact, w)
        for name, param, values in zip(self.target.names, params, exact):
            self.rounding.write_(name, param, values)

    def arrange(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of the parameters' shapes in the penalty's view."""
        return local(tensors[0]) if self.sees_own_shape else self.target.arrange(tensors)


def as_terms(terms: Terms) -> list[tuple[Pattern, Term]]:
    """Return (pattern, term) pairs from anything `regularize` accepts."""
    if not isinstance(terms, Mapping):
        terms = {"*": terms}
    flat = []
    for pattern, value in terms.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(item, Penalty | Term):
                raise TypeError(
                    f"terms must be a penalty, a Term, or a dict from patterns to them; received "
                    f"{describe(item)} for {pattern!r} (a name becomes a penalty by "
                    f"penalties.get(name, strength))"
                )
            flat.append((pattern, item if isinstance(item, Term) else Term(item)))
    if not flat:
        raise ValueError("terms are empty: give a penalty such as L2(1e-3)")
    return flat


def bind(
    model: nn.Module,
    candidates: Sequence[Entry],
    terms: Terms,
    how: How = "objective",
    *,
    on_missing: Callable[[str], None] | None = None,
) -> list[Binding]:
    """Bind every term to each parameter that its pattern matches.

    Raises ValueError for a pattern without match, unless `on_missing` is given, and for two prox
    terms on one parameter.
    """
    _check_how(how)
    bindings: list[Binding] = []
    rounding = RoundingErrors()
    for pattern, term in as_terms(terms):
        try:
            chosen = match(model, candidates, pattern)
        except ValueError as error:
            if on_missing is None:
                raise
            on_missing(str(error))
            continue
        penalty, mode = term.penalty, term.how or how
        kind = type(penalty).__name__
        strength = penalty.strength if term.strength is None else term.strength
        label = pattern if isinstance(pattern, str) else _pattern_text(pattern)
        shared = LiveStrength.of(f"{label}/{kind}", strength)
        for target in targets_of(chosen, model, term.rows or penalty.rows):
            name = _unique_name(f"{target.name}/{kind}", bindings)
            by_layer = isinstance(strength, Controller) and strength.per == "layer"
            live = LiveStrength.of(name, strength) if by_layer else shared
            binding = Binding(name, target, penalty, mode, live, rounding, shared.name)
            view = None if binding.sees_own_shape else target.views[0].of
            alone = len(target.params) == 1 and not is_lazy(target.params[0])
            shape = target.params[0].shape if alone else None
            if isinstance(target, Product):
                _refuse_in_factors(binding)
                shape, view = target.shape, None
            binding.base = penalty.for_parameter(target.name, shape, view)
            if isinstance(strength, Controller) and strength.phase == "before_prox":
                _refuse_without_zeros(binding)
            bindings.append(binding)
    _refuse_two_proxes(bindings)
    return bindings


def split_strengths_by_group(bindings: Sequence[Binding], groups: Mapping[int, int]) -> None:
    """Use one live strength for each optimizer group if a controller asks for it."""
    live_strengths = {binding.live.name: binding.live for binding in bindings}
    for binding in bindings:
        source, number = binding.live.source, groups.get(id(binding.target.params[0]))
        if isinstance(source, Controller) and source.per == "group" and number is not None:
            name = f"{binding.live.name.partition(' of group ')[0]} of group {number}"
            binding.live = live_strengths.setdefault(name, LiveStrength.of(name, source))


def split_strengths_by_optimizer(
    bindings: Sequence[Binding], held_by: Mapping[Binding, int]
) -> None:
    """Use one live strength for each optimizer if a varying strength spans several.

    Each advances with the steps of its own optimizer.
    """
    first: dict[str, int] = {}
    live_strengths = {binding.live.name: binding.live for binding in bindings}
    for binding in bindings:
        number, name = held_by.get(binding), binding.live.name
        if number is None or not binding.live.varies:
            continue
        if first.setdefault(name, number) != number:
            name = f"{name} of optimizer {number}"
            binding.live = live_strengths.setdefault(
                name, LiveStrength.of(name, binding.live.source)
            )


def replay_terms(bindings: Sequence[Binding], steps: int) -> dict[object, list[Term]]:
    """Return terms by parameter that replay the strengths of a run as schedules."""
    terms: dict[object, list[Term]] = {}
    for binding in bindings:
        names, source = binding.target.names, binding.live.source
        if isinstance(source, Controller):
            source = source.recorded(binding.live.memory, steps)
        strength = None if binding.base.constraint else source
        term = Term(binding.base, binding.target.rows, binding.how, strength)
        terms.setdefault(names[0] if len(names) == 1 else tuple(names), []).append(term)
    return terms


def _refuse_without_zeros(binding: Binding) -> None:
    if binding.route != "prox":
        raise TypeError(
            f"{type(binding.live.source).__name__} counts the zeros of a prox, and "
            f"{type(binding.base).__name__} gives none; use L1, GroupLasso or another of the kind"
        )


def _refuse_in_factors(binding: Binding) -> None:
    """Raise TypeError for terms that cannot act on a product through its factors."""
    if binding.route != "gradient" or isinstance(binding.live.source, Controller):
        raise TypeError(
            f'{binding.name}: rows="product" takes smooth penalties in objective mode, as L2, '
            f"with a number or a schedule as strength; the nuclear norm of a product is L2 of the "
            f"same strength on both factors"
        )


def _check_how(how: str) -> None:
    if not is_one_of(how, get_args(How)):
        raise ValueError(unknown_name("how", how, get_args(How)))


def _pattern_text(pattern: Pattern) -> str:
    if isinstance(pattern, tuple):
        return "|".join(map(_pattern_text, pattern))
    return pattern if isinstance(pattern, str) else pattern.__name__


def _unique_name(name: str, bindings: Sequence[Binding]) -> str:
    taken = {binding.name for binding in bindings}
    if name not in taken:
        return name
    return next(f"{name}#{n}" for n in range(2, len(taken) + 3) if f"{name}#{n}" not in taken)


def _refuse_two_proxes(bindings: Sequence[Binding]) -> None:
    for route in ("prox", "project"):
        seen: dict[int, Binding] = {}
        for binding in bindings:
            if binding.route != route:
                continue
            for param in binding.target.params:
                other = seen.setdefault(id(param), binding)
                if other is binding:
                    continue
                kinds = frozenset({type(other.base).__name__, type(binding.base).__name__})
                pair = " and ".join(sorted(kinds)) if len(kinds) > 1 else f"{min(kinds)} twice"
                what = (
                    "a prox of a sum is not a sum of proxes"
                    if route == "prox"
                    else ("projecting on two sets in turn does not end in both")
                )
                hint = f"use {_SUMS[kinds]}" if kinds in _SUMS else "keep one of them"
                raise ValueError(f"{pair} on {binding.target.name!r}: {what}; {hint}")
