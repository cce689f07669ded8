"""Parts of a loss: does each depend on the assignment of targets to rows?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tikhon.data.rows import Batch
from tikhon.diagnosis.functions import JUDGES, Function
from tikhon.diagnosis.modes import Args, Functions, Options, function_name, user_line
from tikhon.diagnosis.replica import Replica, undisturbed
from tikhon.diagnosis.thresholds import RELATED, TOLD, TOLD_MORE, UNTOLD
from tikhon.diagnosis.wiring.dataset import relation

SHIFTS = 4  # permutations of the targets


@dataclass
class ComparedPart:
    """A comparison of outputs with targets in the loss."""

    place: str
    goal: Tensor
    gain: float  # decrease relative to its value with permuted targets


class ComparedParts(Functions):
    """Context that repeats each comparison of a loss with permuted targets."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.orders = [torch.arange(rows).roll(max(1, k * rows // SHIFTS)) for k in range(SHIFTS)]
        self.found: list[ComparedPart] = []

    def call(self, func: Function, args: Args, kwargs: Options) -> object:
        """Return the function's own result."""
        value = func(*args, **kwargs)
        given = args[:2] if function_name(func) in JUDGES and len(args) > 1 else ()
        answer, goal = given if given else (None, None)
        if not isinstance(answer, Tensor) or not isinstance(goal, Tensor):
            return value
        if not answer.requires_grad or goal.requires_grad or not goal.ndim:
            return value
        if len(goal) != len(self.orders[0]) or not isinstance(value, Tensor):
            return value
        place = user_line()
        with torch._C.DisableTorchFunction(), torch.no_grad():
            moved = [func(answer, goal[order], *args[2:], **kwargs) for order in self.orders]
            own = float(value.double().mean())
            other = sum(float(m.double().mean()) for m in moved) / SHIFTS
            gain = (other - own) / max(abs(other), 1e-12)
            self.found.append(ComparedPart(place, goal.detach().clone(), gain))
        return value


def part_facts(replica: Replica, batch: Batch) -> dict[str, object]:
    """Return `untold`: a part of the loss that does not depend on the order of its targets.

    One of several parts, in a trained network; shallow models do not predict its targets either.
    """
    inputs = batch[0]
    if not isinstance(inputs, Tensor) or inputs.dtype == torch.bool:
        return {}
    seen: list[list[ComparedPart]] = []
    for seed in (0, 1):
        with torch.enable_grad(), undisturbed(replica.model, training=False, seed=seed):
            with ComparedParts(len(inputs)) as tape:
                replica.value(batch)
        seen.append(tape.found)
    if len(seen[0]) < 2 or len(seen[0]) != len(seen[1]):
        return {}
    told = max(part.gain for part in seen[0])
    if told < TOLD:
        return {}
    for part, again in zip(*seen):
        goal = part.goal
        drawn = goal.shape != again.goal.shape or not torch.equal(goal, again.goal)
        single = goal.ndim == 1 and len(goal.unique()) == len(goal)  # indices of a pairwise matrix
        told_here = part.gain > UNTOLD or told < TOLD_MORE * part.gain
        if told_here or drawn or single or not bool((goal != goal[:1]).any()):
            continue
        z = relation(inputs, goal).get("relation")
        if isinstance(z, float) and z < RELATED:
            return {"untold": {"place": part.place, "gain": part.gain, "told": told}}
    return {}
