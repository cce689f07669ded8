"""The weight of a part of the training loss, tuned on the validation loss during the run."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn, optim

from tikhon.regularizer.metric import has_gain, stationary_gain
from tikhon.strengths.hypergradient import Hypergradient
from tikhon.strengths.sensitivity import FREEZE_AT, initial_memory, propagate_decay
from tikhon.strengths.validation import average_over_processes
from tikhon.wrappers import unwrap


class LossWeight:
    r"""The weight of a part of the training loss, adapted by the gradient of the validation loss.

    In ``L_train = L + weight * part`` the parameters change with ``log weight`` by

        Z <- (1 - c*lr) * Z - gain * weight * grad(part),      d L_valid / d log weight = <Z, g_v>,

    with the stationary gain of the optimizer: `Hypergradient`'s recursion with the explicit
    cross-derivative of the loss. It works for anything linear in the loss: auxiliary losses,
    distillation, the share of label smoothing (``part = loss to the uniform target - loss``).

    Args:
        model: the module; wrappers are looked through. Not sharded (FSDP2).
        optimizer: an optimizer whose gain tikhon knows; the weight moves with its steps.
        strength: a Hypergradient with a `start` > 0, the first weight; `range` bounds the weight,
            and every `every` steps the part's gradient is computed (one more backward pass
            through the part). `per` has no effect here.

    Call it with the part, once per step, or once for each accumulated batch (their gradients are
    averaged). Raises ValueError for a start of 0 or outside `range`, TypeError for another
    strength, for an optimizer without a known gain and for sharded parameters.

    Reference: Luketina et al. (2016), https://arxiv.org/abs/1511.06727.

    >>> import torch, tikhon
    >>> x = torch.randn(20, 5); y = torch.randint(2, (20,))
    >>> model = torch.nn.Linear(5, 2)
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    >>> loss = torch.nn.functional.cross_entropy
    >>> start = tikhon.Hypergradient((x[10:], y[10:]), loss, steps=100, start=0.1, range=(1e-3, 1))
    >>> smoothing = tikhon.LossWeight(model, optimizer, start)
    >>> for _ in range(100):
    ...     out = model(x[:10])
    ...     right, flat = loss(out, y[:10]), -out.log_softmax(1).mean()
    ...     optimizer.zero_grad(); (right + smoothing(flat - right)).backward(); optimizer.step()
    >>> 1e-3 <= smoothing.value <= 1 and smoothing.value != 0.1
    True
    """

    model: nn.Module
    optimizer: optim.Optimizer
    strength: Hypergradient
    steps: int

    def __init__(
        self, model: nn.Module, optimizer: optim.Optimizer, strength: Hypergradient
    ) -> None:
        if not isinstance(strength, Hypergradient):
            raise TypeError(f"LossWeight: strength must be a Hypergradient, received {strength!r}")
        if not strength.start:
            raise ValueError(
                f"LossWeight: start must be the first weight, within range {strength.range}, "
                f"received {strength.start!r}"
            )
        self.model, self.optimizer, self.strength = unwrap(model), optimizer, strength
        if not has_gain(optimizer):
            stationary_gain(optimizer, {}, {})  # raises
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        if any(hasattr(p, "placements") for p in self._params):
            raise TypeError("LossWeight: sharded parameters (DTensor) are not served; use DDP")
        strength.check(self.model)
        self.steps = 0
        self.memory: dict[str, Any] = initial_memory(math.log(strength.start))
        self._sensitivity = [torch.zeros_like(p, dtype=torch.float32) for p in self._params]
        self._pulls: list[tuple[Tensor | None, ...]] = []
        self._handle = optimizer.register_step_post_hook(self._after_step)

    @property
    def value(self) -> float:
        """The current weight."""
        return math.exp(self.memory["log"])

    def __call__(self, part: Tensor) -> Tensor:
        """Return `weight * part`, 0-d and differentiable."""
        if self._due and part.requires_grad:
            params = [p for p in self._params if p.requires_grad]
            found = iter(torch.autograd.grad(part, params, retain_graph=True, allow_unused=True))
            self._pulls.append(
                tuple(next(found) if p.requires_grad else None for p in self._params)
            )
        return self.value * part

    def remove(self) -> None:
        """Stop adapting, keeping the weight."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return steps, the log weight with its averages, and the sensitivities."""
        sensitivity = [z.clone() for z in self._sensitivity]
        return {"steps": self.steps, "memory": dict(self.memory), "sensitivity": sensitivity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self.steps, self.memory = state["steps"], dict(state["memory"])
        for z, saved in zip(self._sensitivity, state["sensitivity"], strict=True):
            z.copy_(saved)

    @property
    def _due(self) -> bool:
        return (self.steps + 1) % self.strength.every == 0

    @torch.no_grad()
    def _after_step(self, optimizer: optim.Optimizer, args: object, kwargs: object) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        pulls, self._pulls = self._pulls, []
        if skipped is not None and bool(skipped):
            return
        if self._due and pulls:
            self._propagate(pulls)
            if self.steps + 1 < FREEZE_AT * self.strength.steps:
                self._descend()
        self.steps += 1

    def _propagate(self, pulls: list[tuple[Tensor | None, ...]]) -> None:
        """Update sensitivities over the last `every` steps, using this step's values."""
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        for i, (param, z) in enumerate(zip(self._params, self._sensitivity)):
            given = [cast(Tensor, pull[i]) for pull in pulls if pull[i] is not None]
            if not given or (param not in self.optimizer.state and param.grad is None):
                continue
            gain = stationary_gain(self.optimizer, groups[param], self.optimizer.state[param])
            loss = min(1.0, self.strength.damping * float(gain.numerator))
            pull = average_over_processes(
                torch.stack(given).mean(0).float()
            )  # the optimizer uses means
            propagate_decay(z, self.value * pull, gain.dense(), loss, self.strength.every)

    def _descend(self) -> None:
        seen = self.strength.validate(self.model, self.memory["count"])
        slope = torch.zeros(())
        for param, z in zip(self._params, self._sensitivity):
            if param in seen.gradients:
                slope = slope + (z * seen.gradients[param]).sum()
        low, high = self.strength.range
        self.strength.move(self.memory, float(slope), seen, (math.log(low), math.log(high)))
