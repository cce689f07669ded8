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

ENOUGH = 16  # readings before the first spike
ALONE = 20.0  # robust z-score of a loss without a gradient norm: noise stays below 8
TOGETHER = 8.0  # robust z-score of both
JUMP = 5.0  # times the median of the gradient norm
LASTING = 3
FIRST = 3  # first values of a run
FLOOR = 0.1  # of the first level: smaller spikes are harmless


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


class Level:
    """The last values of one quantity, to score new ones against."""

    def __init__(self, keep: int = 64) -> None:
        self._values: deque[float] = deque(maxlen=keep)
        self._start: float | None = None
        self._first: list[float] = []

    @property
    def median(self) -> float:
        """Median of the last values."""
        return median(self._values) if self._values else math.nan

    def z(self, value: float) -> float:
        """Return the robust z-score of a value; 0 with too few previous values."""
        if len(self._values) < ENOUGH or not math.isfinite(value):
            return 0.0
        middle = self.median
        spread = 1.4826 * median(abs(v - middle) for v in self._values)
        return (value - middle) / max(spread, 1e-3 * abs(middle), 1e-12)

    def add(self, value: float) -> None:
        """Add a value."""
        if math.isfinite(value):
            self._values.append(value)
            self._first += [abs(value)] if len(self._first) < FIRST else []
        if self._start is None and len(self._values) == ENOUGH:
            self._start = median(abs(v) for v in self._values)

    def begun(self, value: float) -> bool:
        """Whether the value is more than twice the largest of the first values."""
        return value > 2 * max(self._first, default=math.inf)

    def small(self, value: float) -> bool:
        """Whether the value is small relative to the start of training."""
        return self._start is None or abs(value) < FLOOR * self._start


class Spikes:
    """Detects spikes in losses and gradient norms, step by step."""

    def __init__(self) -> None:
        self.losses, self._sizes, self._logs = Level(), Level(), Level()
        self._run = 0  # successive spikes: a level that stays high is the new level

    def judge(
        self, step: int, loss: float | None, gradient: float | None, *, heard: bool = False
    ) -> Spike | None:
        """Return the spike at a step, if any; spikes do not shift the level.

        A `heard` loss, known at sampled steps only, must also exceed the first ones: one hard row
        among solved ones is no spike.
        """
        z_loss = self.losses.z(loss) if loss is not None else 0.0
        if heard and loss is not None and not self.losses.begun(loss):
            z_loss = 0.0
        if loss is not None and (
            self.losses.small(loss) or loss - self.losses.median < abs(self.losses.median)
        ):
            z_loss = 0.0
        z_size = 0.0
        if gradient:
            jump = gradient / self._sizes.median if self._sizes.median else math.inf
            z_size = self._logs.z(math.log(gradient))
            z_size = 0.0 if jump < JUMP or self._sizes.small(gradient) else z_size
        both = min(z_loss, z_size) >= TOGETHER if loss is not None else z_size >= ALONE
        self._run = self._run + 1 if both or z_loss >= ALONE else 0
        if 0 < self._run <= LASTING:
            level = self.losses.median if loss is not None else self._sizes.median
            return Spike(step, loss, gradient, level, max(z_loss, z_size))
        if loss is not None:
            self.losses.add(loss)
        if gradient:
            self._sizes.add(gradient)
            self._logs.add(math.log(gradient))
        return None


OnSpike = Literal["warn", "skip"] | Callable[[Spike], str | None]


class SpikeGuard:
    """Keeps the losses that are told, judges them, and leaves out steps that spike if asked to.

    `acts` says that steps are judged before they are made: that reads the loss and the gradient
    norm of every step.
    """

    def __init__(self, optimizer: Optimizer, action: OnSpike, keep: int) -> None:
        self._optimizer, self._action = optimizer, action
        self.acts = action != "warn"
        self.found: deque[Spike] = deque(maxlen=keep)
        self.loss: Tensor | None = None  # the last that was told
        self._told: deque[tuple[int, Tensor]] = deque(maxlen=1024)  # since the last reading
        self._spikes = Spikes()
        self._withheld: list[tuple[Tensor, Tensor | None]] = []

    def tell(self, step: int, loss: Tensor) -> None:
        """Record the loss of a step."""
        self.loss = loss.detach()
        self._told.append((step, self.loss.mean()))

    @property
    def told(self) -> list[Tensor]:
        """What was told since the last reading."""
        return [loss for _, loss in self._told]

    def judge(
        self, step: int, losses: list[float], gradient: float | None, heard: float | None = None
    ) -> None:
        """The losses since the last reading; the last of them has the gradient norm beside it.

        `heard` is the one that went backward, where none was told.
        """
        told = [t for t, _ in self._told]
        self._told.clear()
        if self.acts:
            return
        for at, loss in zip(told, losses):
            self._add(self._spikes.judge(at, loss, gradient if at == step else None))
        if not losses and gradient is not None:
            self._add(self._spikes.judge(step, heard, gradient, heard=True))

    def before(self, step: int) -> None:
        """Judge the coming step; a spike that is skipped finds no gradient to follow."""
        held = [p for g in self._optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in held]) if held else None
        value = float(self.loss) if self.loss is not None else None
        spike = self._spikes.judge(step, value, float(norm) if norm is not None else None)
        self._add(spike)
        if spike is not None:
            answer = self._action(spike) if callable(self._action) else self._action
            if answer == "skip":
                self._withheld = [(p, p.grad) for p in held]
                for p in held:
                    p.grad = None

    def after(self) -> None:
        """Give back the gradients of a step that was left out."""
        for parameter, gradient in self._withheld:
            parameter.grad = gradient
        self._withheld = []

    def _add(self, spike: Spike | None) -> None:
        if spike is not None:
            self.found.append(spike)
