"""Apply L2 in objective mode through the optimizer's own weight_decay.

Coupled `weight_decay` of torch's optimizers is the gradient of L2: the same operation on the
same numbers. During a step the parameter groups are therefore split by strength, and the
optimizer decays them in its own pass, without a second copy of the gradients. Not used with
other hooks on the step, which would see or change the split groups.
"""

from __future__ import annotations

from tikhon.regularizer.metric import Group
from tikhon.regularizer.plan import StepPlan


class BorrowedDecay:
    """Lend an optimizer's weight_decay to L2 terms during a step."""

    def __init__(self, plan: StepPlan) -> None:
        self._optimizer = plan.optimizer
        self._strengths: dict[int, float] = {}
        self._parts: list[tuple[int, float, Group]] = []  # group index, strength, part
        self._groups: list[Group] | None = None  # the original groups, during a step

    def apply(self, strengths: dict[int, float]) -> None:
        """Let the optimizer add `strength * w` to gradients; strengths by parameter id."""
        self._groups = groups = self._optimizer.param_groups
        if strengths != self._strengths:
            self._strengths, self._parts = strengths, _split_groups(groups, strengths)
        for number, strength, part in self._parts:
            group, params = groups[number], part["params"]
            part.update(group, params=params)
            if strength:
                part["weight_decay"] = group["weight_decay"] + strength
        self._optimizer.param_groups = [part for _, _, part in self._parts]

    def restore(self) -> None:
        """Restore the optimizer's groups."""
        if self._groups is not None:
            self._optimizer.param_groups, self._groups = self._groups, None


def _split_groups(
    groups: list[Group], strengths: dict[int, float]
) -> list[tuple[int, float, Group]]:
    """Split each group by the strengths of its parameters."""
    parts: list[tuple[int, float, Group]] = []
    for number, group in enumerate(groups):
        by_strength: dict[float, list[object]] = {}
        for param in group["params"]:
            by_strength.setdefault(strengths.get(id(param), 0.0), []).append(param)
        parts += [(number, s, {"params": params}) for s, params in by_strength.items()]
    return parts
