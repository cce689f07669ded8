"""Closed-loop strengths: what they see at each optimizer step, and the protocol they follow."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from tikhon.penalties.base import Penalty, Proximable, is_metric
from tikhon.penalties.elementwise import L2
from tikhon.penalties.group import GroupLasso, GroupMCP, LInf
from tikhon.targets import summed

Per = Literal["term", "layer", "group"]

_PROPORTIONAL, _INTEGRAL = 0.2, 0.01  # critically damped: the first squared is 4 times the second
_SAMPLE = 65536  # weights or rows that TargetSparsity looks at
_TOLERANCE = 1e-3  # by how much it may exceed its share


@dataclass(frozen=True, eq=False)
class Reading:
    """One parameter at one step, as a controller sees it.

    Tensors are of the view that the penalty sees, and belong to the Regularizer: read only.

    Attributes:
        name: the parameter's name.
        penalty: the penalty with the strength in force at this step.
        how: "objective" or "decoupled".
        params: the parameters themselves (their `.grad` is what the user's backward left).
        weights: after this step; for a controller with `phase="moved"`, between the optimizer's
            move and the prox.
        before: before this step, if the controller has `needs_before`, otherwise None.
        gain: the factor between the strength and the move that the penalty makes: the optimizer's
            stationary gain (a number, or a tensor of the shape of `weights`) in objective mode,
            its lr in decoupled mode.
        rate: the scalar part of the gain: how far a unit move in the optimizer's own metric
            goes (lr for Adam and its kin, lr / (1 - momentum) for SGD).
        arrange: puts tensors of the parameters' shapes (gradients) in the shape of `weights`.
    """

    name: str
    penalty: Penalty
    how: Literal["objective", "decoupled"]
    params: tuple[nn.Parameter, ...]
    weights: Tensor
    before: Tensor | None
    gain: float | Tensor
    rate: float | Tensor
    arrange: Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class Observation:
    """What a controller is given: the readings that share one strength.

    Attributes:
        readings: one a parameter; all of the term's if `per="term"`, those in one parameter group
            if `per="group"`, one if `per="layer"`.
        model: the (unwrapped) model.
        memory: numbers and tensors that the controller keeps for this strength from step to
            step. The Regularizer owns it and puts it in its state_dict.
        shared: a dict that is empty at each step and common to all strengths of the controller,
            for work that is done once a step (such as a validation gradient).
    """

    readings: Sequence[Reading]
    model: nn.Module
    memory: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


class Controller(ABC):
    """A strength that answers to the weights; a frozen value, its state is in `memory`.

    Class variables:
        phase: when `next` is called. "settled": after prox and constraints, the answer is the
            strength of the next step. "moved": between the optimizer's move and the prox, the
            answer is used by the prox of this same step.
        needs_before: whether readings hold the weights from before the step (a copy each step).
        reads_shards: whether `next` is right where a process holds a part of the weights (FSDP2).

    Attributes:
        start: the strength of the first step.
        per: "term" for one strength in all parameters of the term, "layer" for one each, "group"
            for one in each parameter group of the optimizer.
        every: `next` is called at every so manyth step.
    """

    phase: ClassVar[Literal["moved", "settled"]] = "settled"
    needs_before: ClassVar[bool] = False
    reads_shards: ClassVar[bool] = False
    start: float
    per: Per
    every: int = 1

    @abstractmethod
    def next(self, strength: float, observation: Observation, step: int) -> float:
        """The next strength, finite and >= 0; `step` counts optimizer steps from 1."""


@dataclass(frozen=True, eq=False)
class TargetSparsity(Controller):
    """The smallest strength whose prox leaves the asked share of exact zeros, at every step.

    At step t of the ramp the share is `target * (1 - (1 - t/steps)^3)`, from then on `target`;
    the strength is found by bisection on the prox itself, so it holds for every penalty that
    gives zeros, in every metric. What remains when the weights rest is a penalty of one strength.
    Where a penalty zeroes rows as a whole, rows are counted, not zeros inside the ones that stay.

    Args:
        target: share of zeros, in [0, 1).
        steps: optimizer steps until it is reached, at least 1; leave the rest of the run for the
            other weights to settle.
        per: one strength for all parameters of the term ("term": their zeros are counted
            together), one each ("layer") or one for each parameter group ("group").

    Raises ValueError for a share or a count out of its range; TypeError where the penalty gives
    no zeros. Of more than 65,536 weights (or rows) that share a strength a regular sample is
    counted.

    Reference: the cubic ramp is that of Zhu and Gupta (2017), https://arxiv.org/abs/1710.01878.

    >>> TargetSparsity(0.8, steps=100)
    TargetSparsity(target=0.8, steps=100, per='term')
    """

    target: float
    steps: int = field(default=200, kw_only=True)
    per: Per = field(default="term", kw_only=True)
    start: float = field(default=0.0, init=False, repr=False)
    phase: ClassVar[Literal["moved", "settled"]] = "moved"
    reads_shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self, "target", self.target, 0 <= self.target < 1, "in [0, 1)")
        _check(self, "steps", self.steps, self.steps >= 1, "at least 1")
        _check(self, "per", self.per, self.per in get_args(Per), "'term', 'layer' or 'group'")

    def next(self, strength: float, observation: Observation, step: int) -> float:
        """The strength for the prox of this step."""
        goal = self.target * (1 - (1 - min(step / self.steps, 1.0)) ** 3)
        readings = observation.readings
        parts = [(reading, *_sample(reading, len(readings))) for reading in readings]
        total = sum(_whole(reading, w.numel()) for reading, _, w, _ in parts)

        def excess(tried: float) -> float:
            zeros = 0.0
            for reading, penalty, w, gain in parts:
                left = penalty.with_strength(tried).prox(w, gain)
                zeros += _whole(reading, _zeros(penalty, left))
            return zeros / total - goal

        low, high = (strength / 1.1, strength * 1.1) if strength else (1e-8, 1e-7)
        while (beyond := excess(high)) < 0 and high < 1e12:
            low, high = high, high * 4
        while excess(low) >= 0:
            low, high = low / 4, low
            if low < 1e-12:
                return 0.0 if excess(0.0) >= 0 else high
        while high > 1.0001 * low and beyond > _TOLERANCE:
            middle = (low * high) ** 0.5
            if (reached := excess(middle)) < 0:
                low = middle
            else:
                high, beyond = middle, reached
        return high


@dataclass(frozen=True, eq=False)
class NormBound(Controller):
    """An upper bound on the size of the weights instead of a strength, for L2.

    The size is the root mean square `|w| / sqrt(entries)`, so that one bound means the same for
    every layer. The strength is a multiplier of the constraint `size <= bound`: it is 0 while the
    constraint holds by itself, and otherwise what keeps it. Its unit is the share of the weights
    that a step removes, hence the same for every lr and optimizer; an integral term is damped
    critically by a proportional one, and a step never removes more than half.

    Args:
        bound: the largest size, > 0; None to take `factor` times the size at `at`.
        at: the step (0 is the start) whose size is taken, or "inflection": the first step at
            which the growth of the size slows down.
        factor: > 0.
        interval: steps between the looks for the inflection, at least 1.
        per: one bound for each parameter ("layer"), for each parameter group of the optimizer
            ("group") or for all of the term ("term").

    Raises ValueError for an argument out of its range, TypeError for another penalty than L2 (the
    bound of an L1 norm is a constraint: `L1Ball`).

    Reference: Franke, Hefenbrock, Koehler and Hutter (2024), https://arxiv.org/abs/2311.09058.

    >>> NormBound(0.05).bound
    0.05
    """

    bound: float | None = None
    at: int | Literal["inflection"] = field(default=0, kw_only=True)
    factor: float = field(default=1.0, kw_only=True)
    interval: int = field(default=10, kw_only=True)
    per: Per = field(default="layer", kw_only=True)
    start: float = field(default=0.0, init=False, repr=False)

    reads_shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        bound, at = self.bound, self.at
        _check(self, "bound", bound, bound is None or 0 < bound < math.inf, "> 0 or None")
        fine = at == "inflection" or (isinstance(at, int) and at >= 0)
        _check(self, "at", at, fine, "a step >= 0 or 'inflection'")
        _check(self, "factor", self.factor, 0 < self.factor < math.inf, "> 0")
        _check(self, "interval", self.interval, self.interval >= 1, "at least 1")
        _check(self, "per", self.per, self.per in get_args(Per), "'term', 'layer' or 'group'")

    def next(self, strength: float, observation: Observation, step: int) -> float:
        """The strength of the next step."""
        readings, memory = observation.readings, observation.memory
        if not all(type(reading.penalty) is L2 for reading in readings):
            raise TypeError(
                f"NormBound bounds the size by L2, received {type(readings[0].penalty).__name__}; "
                f"for other norms use a constraint such as L1Ball or MaxNorm"
            )
        square = sum(_whole(r, float(r.weights.double().square().sum())) for r in readings)
        size = math.sqrt(square / sum(_whole(r, r.weights.numel()) for r in readings))
        if "bound" not in memory and self._is_due(size, memory, step):
            memory["bound"] = self.bound or self.factor * size
            memory["set_at"] = step
        rate = float(readings[0].rate)
        if "bound" not in memory or not rate:
            return 0.0 if "bound" not in memory else strength
        excess = size / memory["bound"] - 1
        memory["removed"] = min(max(memory.get("removed", 0.0) + _INTEGRAL * excess, 0.0), 0.5)
        return min(max(memory["removed"] + _PROPORTIONAL * excess, 0.0), 0.5) / rate

    def _is_due(self, size: float, memory: dict[str, Any], step: int) -> bool:
        if self.bound is not None or self.at != "inflection":
            return self.bound is not None or step > self.at  # type: ignore[operator]
        if step % self.interval:
            return False
        growth = size - memory.get("size", math.inf)
        slowed = growth < memory.get("growth", -math.inf)
        memory["size"], memory["growth"] = size, growth
        return slowed


def _whole(reading: Reading, amount: float) -> float:
    """The sum of an amount over all processes that hold a part of the reading's weights."""
    param = reading.params[0]
    if not hasattr(param, "placements"):
        return amount
    sums = torch.tensor(amount, dtype=torch.float64, device=reading.weights.device)
    return summed(sums, param).item()


def _zeros(penalty: Penalty, w: Tensor) -> int:
    """Entries that the prox has made zero: those of zero rows, if it goes by rows."""
    if isinstance(penalty, GroupLasso | GroupMCP | LInf):
        return w.numel() - int(w.any(1).count_nonzero()) * w.shape[1]
    return w.numel() - int(w.count_nonzero())


def _sample(reading: Reading, among: int) -> tuple[Proximable, Tensor, float | Tensor]:
    """The penalty, weights and gain of a reading, thinned where many rows or entries are alike."""
    penalty, w, gain = reading.penalty, reading.weights, reading.gain
    assert isinstance(penalty, Proximable)
    units = w.numel() if penalty.elementwise else len(w)  # a row is zero as a whole
    stride = math.ceil(units * among / _SAMPLE)
    if stride <= 1 or any(isinstance(value, Tensor) for value in vars(penalty).values()):
        return penalty, w, gain
    if penalty.elementwise:
        w = w.reshape(-1)
    if not is_metric(gain):
        return penalty, w[::stride], gain
    gains = torch.as_tensor(gain)
    return penalty, w[::stride], (gains.reshape(-1) if penalty.elementwise else gains)[::stride]


def _check(owner: object, name: str, received: object, fine: bool, allowed: str) -> None:
    if not fine:
        raise ValueError(
            f"{type(owner).__name__}: {name} must be {allowed}, received {received!r}"
        )
