"""Weight decay that adapts while it trains: one strength a layer and member, by hypergradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class AdaptiveDecay:
    """Decoupled decay whose strengths follow the accumulated validation hypergradient.

    Z approximates dW/dlog(s): every step Z <- (1 - lr s - c lr) Z - lr s W, every few steps
    h = <Z, g_valid> and one bias-corrected Adam step on log s, which may cross its whole range in
    half of all such steps; the last tenth of the training leaves the strengths alone.

    Reference: Luketina et al. (2016), https://arxiv.org/abs/1511.06727; the accumulation follows
    forward-mode differentiation, Franceschi et al. (2017), https://arxiv.org/abs/1703.01785.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        steps: int,
        every: int = 5,
        start: float = 1.0,
        low: float = 1e-4,
        high: float = 30.0,
        damping: float = 1.0,
    ) -> None:
        self.weights = list(weights)
        members = len(self.weights[0])
        self.every, self.damping = every, damping
        self.last = round(0.9 * steps)
        self.bounds = (math.log(low), math.log(high))
        self.rate = (self.bounds[1] - self.bounds[0]) / max(steps // every / 2, 1)
        self.sensitivity = [torch.zeros_like(w) for w in self.weights]
        shape = (members, len(self.weights))
        first = self.weights[0]
        self.log_strength = first.new_full(shape, math.log(start))
        self.mean, self.square = first.new_zeros(shape), first.new_zeros(shape)
        self.updates = 0
        self.trace: list[Tensor] = []  # (members, layers) after every update

    @property
    def strength(self) -> Tensor:
        """(members, layers)."""
        return self.log_strength.exp()

    @torch.no_grad()
    def decay_(self, lr: Tensor) -> None:
        """Shrink the weights by lr * strength and carry their sensitivity along; lr: (members,).

        lr * strength is capped at 0.5.
        """
        rate = (lr[:, None] * self.strength).clamp_max(0.5)
        keep = 1 - rate
        carry = (keep - self.damping * lr[:, None]).clamp_min(0)
        for i, (w, z) in enumerate(zip(self.weights, self.sensitivity)):
            shape = (-1, *[1] * (w.ndim - 1))
            z.mul_(carry[:, i].view(shape)).addcmul_(w, rate[:, i].view(shape), value=-1)
            w.mul_(keep[:, i].view(shape))

    def due(self, step: int) -> bool:
        """Whether this step wants a validation gradient."""
        return (step + 1) % self.every == 0 and step < self.last

    @torch.no_grad()
    def adapt_(self, gradients: Sequence[Tensor]) -> None:
        """One step on the logarithms of the strengths, from validation gradients."""
        pairs = zip(self.sensitivity, gradients)
        slope = torch.stack([(z * g).flatten(1).sum(1) for z, g in pairs], dim=1)
        slope = torch.where(slope.isfinite(), slope, 0.0)
        self.updates += 1
        self.mean.lerp_(slope, 0.1)
        self.square.lerp_(slope.square(), 0.001)
        mean = self.mean / (1 - 0.9**self.updates)
        scale = (self.square / (1 - 0.999**self.updates)).sqrt() + 1e-12
        self.log_strength.sub_(self.rate * mean / scale).clamp_(*self.bounds)
        self.trace.append(self.log_strength.clone())

    def state(self) -> dict[str, Tensor]:
        """Per-member rows: everything that the next step depends on."""
        rows = [torch.cat([z.flatten(1) for z in self.sensitivity], dim=1)]
        counted = self.mean.new_full((len(self.mean), 1), self.updates)
        return {
            "decay.sensitivity": rows[0],
            "decay.log_strength": self.log_strength.clone(),
            "decay.mean": self.mean.clone(),
            "decay.square": self.square.clone(),
            "decay.updates": counted,
            "decay.trace": torch.stack(self.trace or [self.log_strength], dim=1),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        sizes = [z[0].numel() for z in self.sensitivity]
        for z, part in zip(self.sensitivity, state["decay.sensitivity"].split(sizes, dim=1)):
            z.copy_(part.view_as(z))
        self.log_strength.copy_(state["decay.log_strength"])
        self.mean.copy_(state["decay.mean"])
        self.square.copy_(state["decay.square"])
        self.updates = int(state["decay.updates"][0, 0])
        self.trace = list(state["decay.trace"].unbind(1))[: self.updates]


class ReplayedDecay(AdaptiveDecay):
    """The strengths that an earlier run found, followed by another run of any length."""

    def __init__(self, weights: Sequence[Tensor], trace: Tensor, *, steps: int) -> None:
        super().__init__(weights, steps=steps)
        self.found = trace  # (members, updates, layers)
        self.now = 0

    def decay_(self, lr: Tensor) -> None:
        """Shrink the weights by the strength found at the same share of the training."""
        place = min(self.now * self.found.shape[1] // self.last, self.found.shape[1] - 1)
        self.log_strength.copy_(self.found[:, place])
        self.now += 1
        super().decay_(lr)

    def due(self, step: int) -> bool:
        """Nothing is left to be found."""
        return False
