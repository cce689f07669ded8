"""Adaptive weight decay: one strength for each layer and member, by hypergradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tikhon.errors import DataError
from tikhon.population.stack import column
from tikhon.strengths.sensitivity import (
    CAUTION,
    DAMPING,
    FREEZE_AT,
    MAX_DECAY,
    change_per_move,
    descend_log_strength,
    even_log,
    first_decay,
    initial_memory,
    log_rate,
    propagate_decay,
    rise_of_even,
    transient_slope,
    trusted_share,
)

_RANGE = (1e-4, 30.0)
_NOTHING = -30.0  # log of a strength that has no effect


class AdaptiveDecay:
    """`L2(Hypergradient(...))`, decoupled, for all members and layers of a population.

    Args:
        weights: one tensor for each layer, (members, ...).
        lr: (members, layers) or (members, 1), the largest of the training.
        steps: of the whole training.
    """

    every = 5  # steps between validation gradients

    def __init__(self, weights: Sequence[Tensor], *, lr: Tensor, steps: int) -> None:
        self.weights = list(weights)
        self.steps, self.last = steps, round(FREEZE_AT * steps)
        low, high = self.bounds = (math.log(_RANGE[0]), math.log(_RANGE[1]))
        start = (first_decay(steps) / lr.double().clamp_min(1e-12)).log().clamp(low, high)
        self.removed = torch.zeros(())  # from the squares of the weights, since the last update
        self.rate = log_rate(_RANGE, steps / self.every)
        self.sensitivity = [torch.zeros_like(w) for w in self.weights]
        shape = (len(start), len(self.weights))
        log = start.expand(shape).to(self.weights[0])
        self.first_even = even_log(log, steps)
        self.memory: dict[str, Any] = initial_memory(
            log, even=self.first_even, size=self._sums(self.weights)
        )
        self.memory |= {"trust": torch.ones_like(log), "first_rate": torch.zeros_like(log)}
        self.trace: list[Tensor] = []  # (members, layers) after each update

    @property
    def strength(self) -> Tensor:
        """Current strengths, (members, layers)."""
        return self.memory["log"].exp() * self.memory["trust"]

    @torch.no_grad()
    def decay_(self, lr: Tensor, step: int) -> None:
        """Shrink the weights by lr * strength, at most by half; lr: (members, layers or 1).

        Sensitivities are updated once for all steps until the next update of the strengths.
        """
        rate = self.shrinkage(lr)
        if step % self.every == 0 and step < self.last:
            drain = rate + DAMPING * lr
            pull = (lr * change_per_move(self.memory, self.strength)).clamp_max(MAX_DECAY)
            for i, (w, z) in enumerate(zip(self.weights, self.sensitivity)):
                propagate_decay(z, w, column(pull[:, i], w), column(drain[:, i], w), self.every)
        if self.due(step):
            if not self.memory["count"]:
                self.memory["first_rate"] = lr.to(rate).clamp_min(1e-30).expand_as(rate)
            left = lr / self.memory["first_rate"] * (1 - (step + 1) / self.steps)
            self.memory["even"] = self.first_even + rise_of_even(left.to(rate))
            self.removed = 2 * self.every * rate * self._sums(self.weights)
        self.shrink_(rate)

    def shrinkage(self, lr: Tensor) -> Tensor:
        """Fraction of each weight removed by a step, (members, layers), at most a half."""
        return (lr * self.strength).clamp_max(MAX_DECAY)

    def shrink_(self, rate: Tensor) -> None:
        """Remove a fraction of each weight; rate: (members, layers)."""
        keep = 1 - rate
        for i, w in enumerate(self.weights):
            w.mul_(column(keep[:, i], w))

    def due(self, step: int) -> bool:
        """Return whether this step needs a validation gradient."""
        return (step + 1) % self.every == 0 and step < self.last

    @torch.no_grad()
    def adapt_(
        self,
        losses: Tensor,
        constant_losses: Tensor,
        gradients: Sequence[Tensor],
        training: Sequence[Tensor],
    ) -> None:
        """Update the log strengths from (members,) losses and gradients.

        `constant_losses` (members,) are the losses of a constant prediction; `training` are the
        gradients of the training step just made.
        """
        ahead = transient_slope(
            self.memory,
            self._sums(self.sensitivity, training),
            size=self._sums(self.weights),
            removed=self.removed,
            ratio=(self._sums(gradients) / self._sums(training)).sqrt().nan_to_num(1.0),
        )
        slope = self._sums(self.sensitivity, gradients) - ahead
        slope = torch.where(slope.isfinite(), slope, 0.0)
        level = torch.where(losses.isfinite(), losses, 0.0)[:, None].to(slope)
        descend_log_strength(
            self.memory, slope, level, rate=self.rate, caution=CAUTION, bounds=self.bounds
        )
        shrinkage = trusted_share(self.memory, losses[:, None], constant_losses[:, None])
        self.memory["trust"] = torch.as_tensor(shrinkage).to(slope)
        self.trace.append(self.strength.log().clamp_min(_NOTHING))

    @staticmethod
    def _sums(first: Sequence[Tensor], second: Sequence[Tensor] | None = None) -> Tensor:
        """Return the inner products of pairs, or the squared norms, (members, layers)."""
        pairs = zip(first, second or first)
        return torch.stack([(a * b).flatten(1).sum(1) for a, b in pairs], dim=1)

    @property
    def _saved(self) -> list[str]:
        """Names of the parts of the memory with one row for each member."""
        return [name for name in self.memory if name != "count"]

    def state(self) -> dict[str, Tensor]:
        """Return everything the next step depends on, one row for each member."""
        rows = torch.cat([z.flatten(1) for z in self.sensitivity], dim=1)
        found = {f"decay.{name}": self.memory[name].clone() for name in self._saved}
        counted = rows.new_full((len(rows), 1), self.memory["count"])
        trace = torch.stack(self.trace or [self.memory["log"]], dim=1)
        return found | {"decay.sensitivity": rows, "decay.count": counted, "decay.trace": trace}

    def load(self, state: dict[str, Tensor]) -> None:
        """Invert `state`. Raises `DataError` for the state of another version."""
        needed = (f"decay.{name}" for name in (*self._saved, "sensitivity", "count", "trace"))
        missing = [name for name in needed if name not in state]
        if missing:
            raise DataError(
                f"the states of the search lack {', '.join(missing)}: another version of tikhon "
                "wrote them; continue with that version, or start over with --overwrite"
            )
        sizes = [z[0].numel() for z in self.sensitivity]
        for z, part in zip(self.sensitivity, state["decay.sensitivity"].split(sizes, dim=1)):
            z.copy_(part.view_as(z))
        self.memory |= {name: state[f"decay.{name}"].clone() for name in self._saved}
        self.memory["count"] = int(state["decay.count"][0, 0])
        self.trace = list(state["decay.trace"].unbind(1))[: self.memory["count"]]


class ReplayedDecay(AdaptiveDecay):
    """Replay the strengths found by an earlier run, over a run of any length."""

    def __init__(
        self, weights: Sequence[Tensor], trace: Tensor, *, lr: Tensor, steps: int
    ) -> None:
        super().__init__(weights, lr=lr, steps=steps)
        self.strength_trace = trace  # (members, moves, layers)

    def decay_(self, lr: Tensor, step: int) -> None:
        """Shrink the weights by the strength found at the same fraction of training."""
        moves = self.strength_trace.shape[1]
        self.memory["log"] = self.strength_trace[:, min(step * moves // self.last, moves - 1)]
        self.shrink_(self.shrinkage(lr))

    def due(self, step: int) -> bool:
        """Return False: strengths are fixed."""
        return False
