"""The two abstract classes that every penalty is one of."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self, TypeGuard

import torch
from torch import Tensor

from tikhon.arguments import (
    MAX_FLOAT32,
    MAX_FLOAT64,
    MIN_POSITIVE,
    as_number,
    check_field,
    check_flag_field,
    is_positive,
)
from tikhon.errors import describe, unknown_name


@dataclass(frozen=True, eq=False)
class Penalty(ABC):
    """A function of one tensor, to be minimised: `strength * omega(w)`.

    `strength` is lambda, finite and >= 0. A 0-d tensor is used unchanged (it may be batched by
    `torch.vmap`, so no code branches on its value). A schedule (a callable of the step) or a
    controller (an object with `next`) is resolved by `tikhon.regularize`, step by step, through
    `with_strength`; until then `value`, `grad` and `prox` raise TypeError.

    A subclass is a frozen dataclass (`eq=False`, since fields may hold tensors) that reads the
    strength as `self.lam` and defines `value`, and `grad` where it has a closed form.

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True, eq=False)
    ... class Cubic(tk.Penalty):
    ...     def value(self, w):
    ...         return self.lam * w.abs().pow(3).sum()
    >>> Cubic(0.5).value(torch.tensor([1.0, -2.0]))
    tensor(4.5000)
    """

    strength: float | Tensor | Any = 1.0

    smooth: ClassVar[bool] = False  # differentiable everywhere: no prox is needed
    convex: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False  # a sum over entries
    constraint: ClassVar[bool] = False  # value is 0 or inf; the prox ignores strength and step
    diagonal: ClassVar[bool] = True  # the prox is exact for a tensor step (a diagonal metric)
    real: ClassVar[bool] = False  # it orders or bounds numbers, so complex weights have no place
    rows: ClassVar[str] = "tensor"  # the view of the weights that it sees by default
    above: ClassVar[dict[str, float]] = {}  # fields that are numbers, and what each is above
    shares: ClassVar[tuple[str, ...]] = ()  # fields in [0, 1]
    flags: ClassVar[tuple[str, ...]] = ()
    unweighted: ClassVar[str] = "it has no field of that name"  # why it takes no weights

    def __new__(cls, *args: object, **arguments: object) -> Self:
        """Refuse `weights` by name where the class has none."""
        if "weights" in arguments and "weights" not in cls.__dataclass_fields__:
            raise TypeError(f"{cls.__name__} takes no weights: {cls.unweighted}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", check_strength(self.strength, type(self).__name__))
        check_weights(getattr(self, "weights", None), type(self).__name__)
        for name, low in self.above.items():
            check_number(self, name, low)
        for name in self.shares:
            check_field(self, name, "in [0, 1]", lambda share: 0 <= share <= 1)
        for name in self.flags:
            check_flag_field(self, name)

    @abstractmethod
    def value(self, w: Tensor) -> Tensor:
        """0-d value, a sum over entries (never a mean), accumulated in at least float32."""

    def grad(self, w: Tensor) -> Tensor:
        """Gradient (an element of the subdifferential, finite everywhere), w's shape and dtype."""
        with torch.enable_grad():
            leaf = w.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf), leaf)[0]

    @property
    def lam(self) -> float | Tensor:
        """The strength as a number; TypeError while it is a schedule or a controller."""
        if isinstance(self.strength, (float, int, Tensor)):
            return self.strength
        name = type(self).__name__
        raise TypeError(
            f"the strength of {name} is a {type(self.strength).__name__}, which has no value "
            f"before a step is known; attach it with tikhon.regularize(...), or give a number "
            f"by penalty.with_strength(0.01)"
        )

    def with_strength(self, strength: float | Tensor) -> Self:
        """The same penalty at another strength; a constraint, which has none, returns itself."""
        if self.constraint:
            return self
        changed = copy(self)  # not dataclasses.replace: the other fields were checked once
        object.__setattr__(changed, "strength", check_strength(strength, type(self).__name__))
        return changed

    def for_parameter(
        self,
        name: str,
        shape: torch.Size | None = None,
        view: Callable[[Tensor], Tensor] | None = None,
    ) -> Self:
        """The penalty bound to the parameter `name`.

        A field that is a mapping from names becomes its entry. For a sum over entries, tensors
        (`weights`, `center`) are then broadcast to the parameter's `shape` and read by `view`,
        as the target reads the parameter. ValueError if a mapping lacks the name or a tensor
        does not fit.

        >>> from tikhon.penalties import L2
        >>> before = {"fc.weight": torch.ones(2, 3)}
        >>> L2(0.1, center=before).for_parameter("fc.weight", view=torch.ravel).center.shape
        torch.Size([6])
        """
        bound = {}
        for field in fields(self):
            held = getattr(self, field.name)
            if isinstance(held, Mapping):
                if name not in held:
                    raise ValueError(
                        unknown_name(f"{field.name} of {type(self).__name__}", name, held)
                    )
                held = held[name].detach()
                bound[field.name] = held
            if isinstance(held, Tensor) and field.name != "strength" and self.elementwise:
                bound[field.name] = self._read(field.name, held, shape, view)
        return replace(self, **bound) if bound else self

    def _read(self, field: str, held: Tensor, shape: torch.Size | None, view: Any) -> Tensor:
        if shape is not None:
            try:
                held = held.expand(shape)
            except RuntimeError:
                raise ValueError(
                    f"{field} of {type(self).__name__} has shape {tuple(held.shape)}, which does "
                    f"not broadcast to the parameter's shape {tuple(shape)}"
                ) from None
        return view(held) if view else held


class Slopes(NamedTuple):
    """How steeply a penalty leaves zero: numbers or tensors that broadcast to what it sees.

    At w = 0 it grows as `entries * sum|w| + rows * |w_g|`, |w_g| the norms of the rows; None where
    there is no such part.
    """

    entries: float | Tensor | None = None
    rows: float | Tensor | None = None


@dataclass(frozen=True, eq=False)
class Proximable(Penalty):
    """A penalty with a proximal operator.

    >>> isinstance(tk.L1(0.1), tk.Proximable), isinstance(tk.L2(0.1), tk.Proximable)
    (True, True)
    >>> tk.L1(0.5).prox(torch.tensor([2.0, -0.3]), 1.0)
    tensor([1.5000, 0.0000])
    """

    @abstractmethod
    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """argmin_z 1/2 (z-w)' diag(1/step) (z-w) + value(z).

        `step` >= 0: a number, a 0-d tensor or a tensor of w's shape (the optimizer's metric).
        """

    def support(self, w: Tensor) -> Tensor:
        """Bool mask, w's shape: the entries that the penalty leaves non-zero."""
        return w != 0

    def slopes(self, w: Tensor) -> Slopes | None:
        """What holds weights at zero; None unless it is a slope of entries, of rows or of both.

        With it zeros are exact under optimizers that know no prox: a zero is left only where the
        gradient of the loss is steeper.
        """
        return None

    def steepness(self, w: Tensor) -> float | Tensor:
        """How large the entries of its gradient are near zero; over a row, their root mean square.

        The strength, unless the slopes tell it.
        """
        found = self.slopes(w)
        if found is None:
            return self.lam
        entries = 0.0 if found.entries is None else found.entries
        if found.rows is None:
            return entries
        size = math.prod(w.shape[1:]) if w.ndim > 1 else w.numel()
        return entries + found.rows / max(1, size) ** 0.5


def check_strength(strength: object, owner: str) -> Any:
    """A number >= 0, a 0-d tensor, a schedule or a controller; raises for anything else.

    Numbers of other kinds, such as numpy's, come back as floats.
    """
    if isinstance(strength, Tensor):
        if strength.ndim:
            raise ValueError(
                f"{owner}: strength is one number, received a tensor of shape "
                f"{tuple(strength.shape)}; per-entry factors go into weights=..."
            )
        if strength.is_complex() or strength.dtype == torch.bool:
            raise TypeError(
                f"{owner}: strength must be a number >= 0, received a tensor of {strength.dtype}"
            )
        return strength
    number = as_number(strength)
    if number is not None:
        if not 0 <= number < math.inf:
            raise ValueError(
                f"{owner}: strength must be finite and >= 0, received {describe(strength)}"
            )
        if number > MAX_FLOAT64:
            raise ValueError(
                f"{owner}: strength must be at most {MAX_FLOAT64:g}, whose square is still a "
                f"number of float64, received {describe(strength)}"
            )
        return number
    if not (callable(strength) or hasattr(strength, "next")):
        raise TypeError(
            f"{owner}: strength must be a number >= 0, a 0-d tensor, a schedule or a controller, "
            f"received {describe(strength)}"
        )
    return strength


def check_weights(weights: object, owner: str) -> None:
    """Raise unless the factors, a tensor or a mapping from names to tensors, are >= 0."""
    named = weights.items() if isinstance(weights, Mapping) else [("", weights)]
    for name, factors in named:
        if factors is None:
            continue
        if not isinstance(factors, Tensor):
            raise TypeError(
                f"{owner}: weights must be a tensor or a mapping from parameter names "
                f"to tensors, received {describe(factors)}"
            )
        if factors.is_complex():
            raise TypeError(f"{owner}: weights must be real, received {describe(factors)}")
        bad = ~((factors >= 0) & factors.isfinite())
        if bad.any():
            where = f" for {name!r}" if name else ""
            raise ValueError(
                f"{owner}: weights{where} must be finite and >= 0, received "
                f"{factors[bad][0].item():g}"
            )


def check_number(owner: Penalty, name: str, low: float) -> None:
    """Make the field `name` a plain number above `low` that float32 can compute with, or raise."""
    check_field(owner, name, f"> {low:g}", lambda number: low < number < math.inf)
    check_field(
        owner,
        name,
        f"from {max(low, MIN_POSITIVE):g} to {MAX_FLOAT32:g}, which float32 can compute with",
        is_positive,
    )


def is_metric(step: object) -> TypeGuard[Tensor]:
    """Whether `step` has one entry per weight (else it is one number for all)."""
    return isinstance(step, Tensor) and step.ndim > 0


def as_tensor(step: Any, like: Tensor) -> Tensor:
    """`step` as a tensor on the device of `like`, to be compared entry by entry."""
    if isinstance(step, Tensor):
        return step.to(like.dtype)
    largest = torch.finfo(like.dtype).max  # a longer step is as long as its dtype goes
    return torch.full((), min(step, largest), dtype=like.dtype, device=like.device)


def upcast(w: Tensor) -> Tensor:
    """`w` in at least float32: sums of squares in float16 overflow, in bfloat16 they stall."""
    return w.float() if w.dtype in (torch.float16, torch.bfloat16) else w


def keep_nonfinite(moved: Tensor, w: Tensor) -> Tensor:
    """`moved` where w is finite, w itself elsewhere: what has diverged must show."""
    return torch.where(w.isfinite(), moved, w)


def weighted(x: Any, weights: Tensor | Mapping[str, Tensor] | None) -> Any:
    """`x * weights`, or x where there are none."""
    if isinstance(weights, Mapping):
        raise TypeError("weights are given by parameter name; choose with for_parameter(name)")
    return x if weights is None else x * weights


def refuse_metric(penalty: Penalty, step: float | Tensor) -> None:
    """Raise for a tensor step where the prox in a diagonal metric is not known exactly."""
    if is_metric(step):
        raise ValueError(
            f"{type(penalty).__name__} has no exact prox for a step of shape "
            f"{tuple(step.shape)} (a per-weight step, as of Adam); give one number, or attach it "
            f'with how="decoupled" or to an optimizer such as SGD'
        )
