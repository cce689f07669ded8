"""L2 in objective mode by the optimizer's own weight_decay, in the pass that it makes anyway.

What torch's optimizers call `weight_decay`, where it is not decoupled, is the gradient of L2: the
same operation on the same numbers. So for the time of a step the groups of the optimizer are cut
into the parameters of each strength, and the optimizer decays them, without a second copy of the
gradients. Not where others have hooks on the step: they would save the cut groups, or change them
in the place of the optimizer's own.
"""

from __future__ import annotations

from tikhon.regularizer.metric import Group
from tikhon.regularizer.plan import StepPlan


class OwnDecay:
    """The weight_decay of an optimizer, lent to L2 terms for the time of a step."""

    def __init__(self, plan: StepPlan) -> None:
        self._optimizer = plan.optimizer
        self._alphas: dict[int, float] = {}
        self._parts: list[tuple[int, float, Group]] = []  # of which group, the strength, the part
        self._groups: list[Group] | None = None  # the optimizer's own, in a step

    def lend(self, alphas: dict[int, float]) -> None:
        """Let the optimizer add `alpha * w` to gradients; alphas by the id of the parameter."""
        self._groups = groups = self._optimizer.param_groups
        if alphas != self._alphas:
            self._alphas, self._parts = alphas, _parts(groups, alphas)
        for number, alpha, part in self._parts:
            group, params = groups[number], part["params"]
            part.update(group, params=params)
            if alpha:
                part["weight_decay"] = group["weight_decay"] + alpha
        self._optimizer.param_groups = [part for _, _, part in self._parts]

    def give_back(self) -> None:
        """The groups are the optimizer's own again."""
        if self._groups is not None:
            self._optimizer.param_groups, self._groups = self._groups, None


def _parts(groups: list[Group], alphas: dict[int, float]) -> list[tuple[int, float, Group]]:
    """Each group by the strengths of its parameters."""
    found: list[tuple[int, float, Group]] = []
    for number, group in enumerate(groups):
        by_alpha: dict[float, list[object]] = {}
        for param in group["params"]:
            by_alpha.setdefault(alphas.get(id(param), 0.0), []).append(param)
        found += [(number, alpha, {"params": params}) for alpha, params in by_alpha.items()]
    return found
