"""Spikes of the loss and of the gradient norm: robust z-scores over the last readings."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

MIN_READINGS = 16  # readings before the first spike
Z_ALONE = 20.0  # robust z-score of a loss without a gradient norm: noise stays below 8
Z_BOTH = 8.0  # robust z-score of both
MIN_RATIO = 5.0  # times the median of the gradient norm
MAX_RUN = 3
FIRST_READINGS = 3  # first values of a run
NEGLIGIBLE = 0.1  # of the first level: smaller spikes are harmless


@dataclass(frozen=True)
class Spike:
    """A loss or gradient norm far above the previous ones.

    `z` is the distance to the median in robust standard deviations (1.4826 times the median
    absolute deviation) of the loss, or of the logarithm of the norm.
    """

    step: int
    loss: float | None
    gradient: float | None
    median: float
    z: float


class RunningLevel:
    """The last values of one quantity, to score new ones against."""

    def __init__(self, keep: int = 64) -> None:
        self._values: deque[float] = deque(maxlen=keep)
        self._start_level: float | None = None
        self.first: list[float] = []

    @property
    def median(self) -> float:
        """Median of the last values."""
        return median(self._values) if self._values else math.nan

    def z(self, value: float) -> float:
        """Return the robust z-score of a value; 0 with too few previous values."""
        if len(self._values) < MIN_READINGS or not math.isfinite(value):
            return 0.0
        middle = self.median
        spread = 1.4826 * median(abs(v - middle) for v in self._values)
        return (value - middle) / max(spread, 1e-3 * abs(middle), 1e-12)

    def add(self, value: float) -> None:
        """Add a value."""
        if math.isfinite(value):
            self._values.append(value)
            self.first += [abs(value)] if len(self.first) < FIRST_READINGS else []
        if self._start_level is None and len(self._values) == MIN_READINGS:
            self._start_level = median(abs(v) for v in self._values)

    def is_negligible(self, value: float) -> bool:
        """Whether the value is small relative to the start of training."""
        return self._start_level is None or abs(value) < NEGLIGIBLE * self._start_level


class SpikeDetector:
    """Detects spikes in losses and gradient norms, step by step."""

    def __init__(self) -> None:
        self.losses, self._norms, self._log_norms = RunningLevel(), RunningLevel(), RunningLevel()
        self._run = 0  # successive spikes: a level that stays high is the new level

    def check(
        self, step: int, loss: float | None, gradient: float | None, *, sampled_only: bool = False
    ) -> Spike | None:
        """Return the spike at a step, if any; spikes do not shift the level.

        A loss that is known at sampled steps only must also exceed the first ones: one hard row
        among solved ones is no spike.
        """
        z_loss = self._z_loss(loss, sampled_only=sampled_only) if loss is not None else 0.0
        z_norm = 0.0
        if gradient:
            ratio = gradient / self._norms.median if self._norms.median else math.inf
            z_norm = self._log_norms.z(math.log(gradient))
            z_norm = 0.0 if ratio < MIN_RATIO or self._norms.is_negligible(gradient) else z_norm
        both = min(z_loss, z_norm) >= Z_BOTH if loss is not None else z_norm >= Z_ALONE
        self._run = self._run + 1 if both or z_loss >= Z_ALONE else 0
        if 0 < self._run <= MAX_RUN:
            level = self.losses.median if loss is not None else self._norms.median
            return Spike(step, loss, gradient, level, max(z_loss, z_norm))
        if loss is not None:
            self.losses.add(loss)
        if gradient:
            self._norms.add(gradient)
            self._log_norms.add(math.log(gradient))
        return None

    def _z_loss(self, loss: float, *, sampled_only: bool) -> float:
        """The z-score of a loss; 0 if it is small, or less than twice the median."""
        is_small = self.losses.is_negligible(loss) or (
            sampled_only and loss <= 2 * max(self.losses.first, default=math.inf)
        )
        has_doubled = loss - self.losses.median >= abs(self.losses.median)
        return self.losses.z(loss) if has_doubled and not is_small else 0.0


OnSpike = Literal["warn", "skip"] | Callable[[Spike], str | None]


class SpikeGuard:
    """Keeps the losses passed to the watch, finds spikes, and skips steps that spike on request.

    `checks_every_step`: steps are checked before they are made, which reads the loss and the
    gradient norm of every step.
    """

    def __init__(self, optimizer: Optimizer, action: OnSpike, keep: int) -> None:
        self._optimizer, self._action = optimizer, action
        self.checks_every_step = action != "warn"
        self.spikes: deque[Spike] = deque(maxlen=keep)
        self.loss: Tensor | None = None  # the last that was passed
        self._pending: deque[tuple[int, Tensor]] = deque(maxlen=1024)  # since the last reading
        self._detector = SpikeDetector()
        self._withheld: list[tuple[Tensor, Tensor | None]] = []

    def record(self, step: int, loss: Tensor) -> None:
        """Record the loss of a step."""
        self.loss = loss.detach()
        self._pending.append((step, self.loss.mean()))

    @property
    def pending(self) -> list[Tensor]:
        """Losses passed since the last reading."""
        return [loss for _, loss in self._pending]

    def check(
        self,
        step: int,
        losses: list[float],
        gradient: float | None,
        backward_loss: float | None = None,
    ) -> None:
        """Check the losses since the last reading; the last of them has the gradient norm.

        `backward_loss` is the one that went backward, where none was passed.
        """
        steps = [at for at, _ in self._pending]
        self._pending.clear()
        if self.checks_every_step:
            return
        for at, loss in zip(steps, losses):
            self._add(self._detector.check(at, loss, gradient if at == step else None))
        if not losses and gradient is not None:
            self._add(self._detector.check(step, backward_loss, gradient, sampled_only=True))

    def before_step(self, step: int) -> None:
        """Check the coming step; a spike that is skipped finds no gradient to follow."""
        moving = [
            p for g in self._optimizer.param_groups for p in g["params"] if p.grad is not None
        ]
        norm = nn.utils.get_total_norm([p.grad for p in moving]) if moving else None
        value = float(self.loss) if self.loss is not None else None
        spike = self._detector.check(step, value, float(norm) if norm is not None else None)
        self._add(spike)
        if spike is not None:
            decision = self._action(spike) if callable(self._action) else self._action
            if decision == "skip":
                self._withheld = [(p, p.grad) for p in moving]
                for p in moving:
                    p.grad = None

    def after_step(self) -> None:
        """Give back the gradients of a step that was left out."""
        for parameter, gradient in self._withheld:
            parameter.grad = gradient
        self._withheld = []

    def _add(self, spike: Spike | None) -> None:
        if spike is not None:
            self.spikes.append(spike)
