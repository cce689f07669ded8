"""Parts of a loss: does each depend on the assignment of targets to rows?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tikhon.data.nested import Batch
from tikhon.diagnosis.functions import JUDGES, Function
from tikhon.diagnosis.modes import Args, Functions, Options, function_name, user_line
from tikhon.diagnosis.penalty import ReboundLoss
from tikhon.diagnosis.replica import Replica, undisturbed
from tikhon.diagnosis.thresholds import RELATED, TOLD, TOLD_MORE, UNTOLD
from tikhon.diagnosis.wiring.dataset import relation
from tikhon.diagnosis.wiring.program import Facts

SHIFTS = 4  # permutations of the targets


@dataclass
class TargetComparison:
    """A comparison of outputs with targets in the loss."""

    place: str
    target: Tensor
    gain: float  # decrease relative to its value with permuted targets


class TargetComparisons(Functions):
    """Context that repeats each comparison of a loss with permuted targets."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.orders = [torch.arange(rows).roll(max(1, k * rows // SHIFTS)) for k in range(SHIFTS)]
        self.found: list[TargetComparison] = []

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Return the function's own result."""
        value = func(*args, **kwargs)
        given = args[:2] if function_name(func) in JUDGES and len(args) > 1 else ()
        output, target = given if given else (None, None)
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            return value
        if not output.requires_grad or target.requires_grad or not target.ndim:
            return value
        if len(target) != len(self.orders[0]) or not isinstance(value, Tensor):
            return value
        place = user_line()
        with torch._C.DisableTorchFunction(), torch.no_grad():
            moved = [func(output, target[order], *args[2:], **kwargs) for order in self.orders]
            value_now = float(value.double().mean())
            value_permuted = sum(float(m.double().mean()) for m in moved) / SHIFTS
            gain = (value_permuted - value_now) / max(abs(value_permuted), 1e-12)
            self.found.append(TargetComparison(place, target.detach().clone(), gain))
        return value


def loss_part_facts(replica: Replica, batch: Batch) -> Facts:
    """Return `untold`: a part of the loss that does not depend on the order of its targets.

    One of several parts, in a trained network; shallow models do not predict its targets either.
    """
    inputs = batch[0]
    unclear = isinstance(replica.loss, ReboundLoss)  # compares weights too
    if unclear or not isinstance(inputs, Tensor) or inputs.dtype == torch.bool:
        return {}
    passes: list[list[TargetComparison]] = []
    for seed in (0, 1):
        with torch.enable_grad(), undisturbed(replica.model, training=False, seed=seed):
            with TargetComparisons(len(inputs)) as trace:
                replica.value(batch)
        passes.append(trace.found)
    if len(passes[0]) < 2 or len(passes[0]) != len(passes[1]):
        return {}
    best_gain = max(part.gain for part in passes[0])
    if best_gain < TOLD:
        return {}
    for part, again in zip(*passes):
        target = part.target
        drawn = target.shape != again.target.shape or not torch.equal(target, again.target)
        single = target.ndim == 1 and len(target.unique()) == len(target)  # indices of pairs
        related = part.gain > UNTOLD or best_gain < TOLD_MORE * part.gain
        if related or drawn or single or not bool((target != target[:1]).any()):
            continue
        z = relation(inputs, target).get("relation")
        if isinstance(z, float) and z < RELATED:
            return {"untold": {"place": part.place, "gain": part.gain, "told": best_gain}}
    return {}
