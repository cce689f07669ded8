"""Bound the size of the weights instead of setting a strength."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from tikhon.arguments import (
    MAX_FLOAT32,
    check_field,
    is_count,
    is_one_of,
    is_positive,
    require,
)
from tikhon.penalties.elementwise import L2
from tikhon.regularizer.controller import Controller, Observation, Per, summed_over_shards

_PROPORTIONAL, _INTEGRAL = 0.2, 0.01  # critically damped: the first squared is 4 times the second


@dataclass(frozen=True, eq=False)
class NormBound(Controller):
    """An upper bound on the size of the weights in place of a strength, for L2.

    The size is the root mean square `|w| / sqrt(entries)`, so that one bound means the same for
    every layer. The strength is the multiplier of the constraint `size <= bound`: 0 while the
    constraint holds by itself, and otherwise as large as needed to keep it. Its unit is the share
    of the weights that a step removes, so it is the same for every lr and optimizer; an integral
    term is critically damped by a proportional one, and a step never removes more than half.

    Args:
        bound: the largest size, > 0; None uses `factor` times the size at `at`.
        at: the step (0 is the start) whose size is used, or "inflection": the first step at
            which the growth of the size slows down.
        factor: > 0.
        interval: steps between two checks for the inflection, at least 1.
        per: one bound for each parameter ("layer"), for each parameter group of the optimizer
            ("group") or for all of the term ("term").

    Raises ValueError for an argument out of its range, TypeError for penalties other than L2 (to
    bound an L1 norm use the constraint `L1Ball`).

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
        if self.bound is not None:
            check_field(self, "bound", "> 0 or None", is_positive)
        if not is_one_of(self.at, ("inflection",)):
            allowed = "a step >= 0 or 'inflection'"
            check_field(self, "at", allowed, lambda n: is_count(n, 0), whole=True)
        check_field(self, "factor", "> 0", is_positive)
        check_field(self, "interval", "at least 1", is_count, whole=True)
        fine = is_one_of(self.per, get_args(Per))
        require(self, "per", self.per, fine, "'term', 'layer' or 'group'")

    def next(self, strength: float, observation: Observation, step: int) -> float:
        """Return the strength of the next step."""
        readings, memory = observation.readings, observation.memory
        if not all(type(reading.penalty) is L2 for reading in readings):
            raise TypeError(
                f"NormBound bounds the size by L2, received {type(readings[0].penalty).__name__}; "
                f"for other norms use a constraint such as L1Ball or MaxNorm"
            )
        square = sum(
            summed_over_shards(r, float(r.weights.double().square().sum())) for r in readings
        )
        size = math.sqrt(square / sum(summed_over_shards(r, r.weights.numel()) for r in readings))
        if "bound" not in memory and self._is_due(size, memory, step):
            memory["bound"] = self.bound or self.factor * size
            memory["set_at"] = step
        rate = float(readings[0].rate)
        if "bound" not in memory or not rate:
            return 0.0 if "bound" not in memory else strength
        excess = size / memory["bound"] - 1
        memory["removed"] = min(max(memory.get("removed", 0.0) + _INTEGRAL * excess, 0.0), 0.5)
        removed = min(max(memory["removed"] + _PROPORTIONAL * excess, 0.0), 0.5)
        return min(removed / rate, MAX_FLOAT32)  # scheduled rates end near zero

    def _is_due(self, size: float, memory: dict[str, float], step: int) -> bool:
        if self.bound is not None or self.at != "inflection":
            return self.bound is not None or step > self.at  # type: ignore[operator]
        if step % self.interval:
            return False
        growth = size - memory.get("size", math.inf)
        slowed = growth < memory.get("growth", -math.inf)
        memory["size"], memory["growth"] = size, growth
        return slowed
