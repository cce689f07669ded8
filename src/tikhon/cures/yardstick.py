"""What a result is worth in itself: beside a constant and a plain reference on the same data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from statistics import mean

import torch
from torch import Tensor

from tikhon.data.rows import Batch
from tikhon.diagnosis.reference import constant_loss, shallow_skill
from tikhon.diagnosis.replica import Replica, undisturbed

GAIN = 0.02  # of what lies between a constant and perfection: less is no skill (convention)
SHARE = 0.5  # of the reference's gain over a constant that a cure must reach (convention)


@dataclass(frozen=True)
class Yardstick:
    """The loss and skill of the best constant, and the held-out skill of a ridge regression.

    Skill is accuracy for classes and R2 for numbers; NaN where data or loss allow no answer.
    """

    loss: float = math.nan
    chance: float = math.nan
    reference: float = math.nan

    def beaten(self, score: float, skill: float | None) -> bool:
        """Whether a result is better than a constant, and no mere shadow of the reference."""
        if math.isfinite(self.loss) and score > self.loss - GAIN * abs(self.loss):
            return False
        if skill is None or not math.isfinite(self.chance):
            return True
        gain = skill - self.chance
        if not gain > GAIN * (1 - self.chance):
            return False
        wanted = SHARE * (self.reference - self.chance)
        return not math.isfinite(wanted) or gain >= wanted


def yardstick(replica: Replica, probe: Batch, judge: Batch | None, *, held_out: bool) -> Yardstick:
    """Measured on what the scores are measured on: both batches, or the held-out one alone."""
    parts = [judge] if held_out and judge is not None else [probe, *([judge] if judge else [])]
    losses = []
    for batch in parts:
        with torch.no_grad(), undisturbed(replica.model, training=False):
            output, _ = replica.outcome(batch)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return Yardstick()
        # a constant of probabilities adds up to 1: free numbers get below what any answer can
        tail = partial(torch.softmax, dim=1) if _shares(output) else None
        losses.append(constant_loss(output, batch[1], replica.loss, tail))
    skill = shallow_skill(judge if judge is not None else probe)
    constant, reference = skill.get("constant", math.nan), skill.get("shallow", math.nan)
    return Yardstick(mean(losses), constant, reference)


def _shares(output: Tensor) -> bool:
    """Whether answers are probabilities of classes."""
    if output.ndim < 2 or bool((output < 0).any()):
        return False
    return bool((output.sum(1) - 1).abs().max() < 1e-4)
