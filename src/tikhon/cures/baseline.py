"""Absolute quality of a result, relative to a constant and a reference on the same data."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import mean

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tikhon.data.nested import Batch
from tikhon.diagnosis.reference import behind, best_constant, has_real_targets, shallow_skill
from tikhon.diagnosis.replica import Replica, scalar_loss, undisturbed

GAIN = 0.02  # share of the way from a constant to perfection: less is no skill (convention)
TARGET_OFFSET = 0.3  # standard deviations from the targets, at which a loss exceeds its minimum
CONFIDENT_LOGIT = 20.0  # logit of a confident prediction
REFERENCE_SHARE = (
    0.5  # of the reference's gain over a constant that a cure must reach (convention)
)


@dataclass(frozen=True)
class Baseline:
    """Loss and skill of the best constant, and held-out skill of a ridge regression.

    Skill is accuracy for classes and R2 for numbers; NaN where data or loss do not allow it.
    """

    loss: float = math.nan
    chance: float = math.nan
    reference: float = math.nan
    skilled: bool = True  # whether accuracy or R2 applies to the program

    def is_beaten_by(self, score: float, skill: float | None) -> bool:
        """Return whether a result beats a constant, with enough of the reference's skill."""
        if math.isfinite(self.loss) and score > self.loss - GAIN * abs(self.loss):
            return False
        if skill is None or not math.isfinite(self.chance):
            return True
        gain = skill - self.chance
        if not gain > GAIN * (1 - self.chance):
            return False
        wanted = REFERENCE_SHARE * (self.reference - self.chance)
        return not math.isfinite(wanted) or gain >= wanted


def measure_baseline(
    replica: Replica, probe: Batch, valid_batch: Batch | None, *, held_out: bool
) -> Baseline:
    """Measure constant and reference on the scored batches: both, or the held-out one alone."""
    parts = [part for part in (None if held_out and valid_batch else probe, valid_batch) if part]
    losses = []
    for batch in parts:
        with torch.no_grad(), undisturbed(replica.model, training=False):
            output, _ = replica.outcome(batch)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return Baseline()
        if _ignores_target(replica, output, batch[1]):
            return Baseline(skilled=False)
        # constants must be probabilities, too: free ones could cost less than any output
        tail = partial(torch.softmax, dim=1) if _are_probabilities(output) else None
        if tail is None and bool((output >= 0).all()):
            tail = torch.abs  # distances and rates are >= 0
        losses.append(best_constant(output, batch[1], behind(tail, replica.loss))[0])
    skill = shallow_skill(valid_batch if valid_batch is not None else probe)
    constant, reference = skill.get("constant", math.nan), skill.get("shallow", math.nan)
    return Baseline(mean(losses), constant, reference)


def _ignores_target(replica: Replica, output: Tensor, target: object) -> bool:
    """Return whether the loss compares outputs with each other only, as one of triples does.

    The parts of such an output, as anchor and negative, may be constant and still differ.
    """
    if not isinstance(target, Tensor) or output.ndim < 3:
        return False
    with suppress(Exception), torch.no_grad():  # the user's loss, on artificial targets
        other = target.flip(0) + 1 if target.is_floating_point() else (target.flip(0) == 0).long()
        return bool(replica.loss(output, target) == replica.loss(output, other.to(target)))
    return False


def _are_probabilities(output: Tensor) -> bool:
    """Return whether outputs are class probabilities."""
    if output.ndim < 2 or bool((output < 0).any()):
        return False
    return bool((output.sum(1) - 1).abs().max() < 1e-4)


def predicts_targets(replica: Replica, probe: Batch) -> bool:
    """Return whether outputs predict the targets, so that accuracy or R2 applies.

    Not if the loss is not minimal at the targets, or no larger for a confident wrong class.
    """
    target = probe[1]
    with torch.no_grad(), undisturbed(replica.model, training=False):
        output, _ = replica.outcome(probe)
    if not isinstance(target, Tensor) or not isinstance(output, Tensor) or output.ndim > 2:
        return True

    def cost(answer: Tensor) -> float:
        with torch.no_grad():
            return float(scalar_loss(replica.loss(answer.to(output), target)))

    with suppress(Exception):  # the user's loss, on artificial outputs
        if has_real_targets(target) and target.shape == output.shape:
            off = TARGET_OFFSET * float(target.std())
            return cost(target) < min(cost(target + off), cost(target - off))
        if target.ndim == 1 and not target.is_floating_point() and output.ndim == 2:
            count = output.shape[1]
            if 1 < count <= int(target.max()):
                return False
            right, wrong = (
                CONFIDENT_LOGIT * one_hot(k % count, count) for k in (target, target + 1)
            )
            return count < 2 or not cost(wrong) <= cost(right)
    return True
