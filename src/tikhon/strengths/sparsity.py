"""Set a share of exact zeros instead of a strength."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tikhon.arguments import check_field, is_count, is_one_of, require
from tikhon.penalties.base import Penalty, Proximable, is_metric
from tikhon.penalties.group import GroupLasso, GroupMCP, LInf
from tikhon.regularizer.controller import Controller, Observation, Per, Reading, summed_over_shards

_SAMPLE = 65536  # weights or rows sampled by TargetSparsity
_TOLERANCE = 1e-3  # allowed excess over the share


@dataclass(frozen=True, eq=False)
class TargetSparsity(Controller):
    """The smallest strength whose prox leaves the requested share of exact zeros, at every step.

    At step t of the ramp the share is `target * (1 - (1 - t/steps)^3)`, from then on `target`;
    the strength is found by bisection on the prox itself, so it holds for every penalty that
    gives zeros, in every metric. Once the weights have settled it is a penalty of one strength.
    For penalties that zero whole rows, rows are counted, not zeros inside the remaining ones.

    Args:
        target: share of zeros, in [0, 1).
        steps: optimizer steps until it is reached, at least 1; leave the rest of the run for the
            other weights to settle.
        per: one strength for all parameters of the term ("term": their zeros are counted
            together), one per parameter ("layer") or one per parameter group ("group").

    Raises ValueError for a share or a count out of its range; TypeError for a penalty without
    zeros. If more than 65,536 weights (or rows) share a strength, a regular sample is counted.

    Reference: the cubic ramp is that of Zhu and Gupta (2017), https://arxiv.org/abs/1710.01878.

    >>> TargetSparsity(0.8, steps=100)
    TargetSparsity(target=0.8, steps=100, per='term')
    """

    target: float
    steps: int = field(default=200, kw_only=True)
    per: Per = field(default="term", kw_only=True)
    start: float = field(default=0.0, init=False, repr=False)
    phase: ClassVar[Literal["before_prox", "after_prox"]] = "before_prox"
    reads_shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_field(self, "target", "in [0, 1)", lambda share: 0 <= share < 1)
        check_field(self, "steps", "at least 1", is_count, whole=True)
        fine = is_one_of(self.per, get_args(Per))
        require(self, "per", self.per, fine, "'term', 'layer' or 'group'")

    def next(self, strength: float, observation: Observation, step: int) -> float:
        """Return the strength for the prox of this step."""
        goal = self.target * (1 - (1 - min(step / self.steps, 1.0)) ** 3)
        readings = observation.readings
        parts = [(reading, *_sample(reading, len(readings))) for reading in readings]
        total = sum(summed_over_shards(reading, w.numel()) for reading, _, w, _ in parts)

        def excess(tried: float) -> float:
            zeros = 0.0
            for reading, penalty, w, gain in parts:
                left = penalty.with_strength(tried).prox(w, gain)
                zeros += summed_over_shards(reading, _zeros(penalty, left))
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


def _zeros(penalty: Penalty, w: Tensor) -> int:
    """Count the zeros made by the prox; for row penalties those in zero rows."""
    if isinstance(penalty, GroupLasso | GroupMCP | LInf):
        return w.numel() - int(w.any(1).count_nonzero()) * w.shape[1]
    return w.numel() - int(w.count_nonzero())


def _sample(reading: Reading, among: int) -> tuple[Proximable, Tensor, float | Tensor]:
    """Return penalty, weights and gain of a reading, subsampled if there are many units."""
    penalty, w, gain = reading.penalty, reading.weights, reading.gain
    assert isinstance(penalty, Proximable)
    units = w.numel() if penalty.elementwise else len(w)  # rows are zero as a whole
    stride = math.ceil(units * among / _SAMPLE)
    if stride <= 1 or any(isinstance(value, Tensor) for value in vars(penalty).values()):
        return penalty, w, gain
    if penalty.elementwise:
        w = w.reshape(-1)
    if not is_metric(gain):
        return penalty, w[::stride], gain
    gains = torch.as_tensor(gain)
    return penalty, w[::stride], (gains.reshape(-1) if penalty.elementwise else gains)[::stride]
