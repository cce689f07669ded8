"""Strengths that follow the validation loss within one run: accumulated hypergradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tikhon.data.stream import Stream
from tikhon.penalties import L1, L2, ElasticNet, GroupLasso, Proximable
from tikhon.penalties.optimality import max_strength
from tikhon.strengths.controllers import Controller, Observation, Reading

_FROZEN = 0.9  # the strength rests in the last tenth of the run, so that the weights settle
_MOMENTUM, _SCALE = 0.9, 0.999
_HORIZON = 2.0  # the first strength of an L2 term shrinks weights by exp(-2) over the whole run
_FRACTION = 0.05  # the first strength of another term, as a part of its largest gradient
_CAP = 0.5  # a strength never removes more than half of a weight in one step


@dataclass(frozen=True, eq=False)
class Hypergradient(Controller):
    r"""A strength that descends the validation loss while the model trains.

    With ``W`` the weights, ``s`` the strength and ``g_v`` the gradient of the validation loss,

        d L_valid / d log s = <Z, g_v>,        Z = dW / d log s.

    ``Z`` is carried forward through the map that moves the weights. Where that map holds the
    curvature of the training loss, the damping ``c`` stands in its place. For decoupled decay

        Z <- (1 - lr*s - c*lr) * Z - lr*s*W        at every step,

    and for L1, ElasticNet and GroupLasso through the derivative of their prox, which is zero
    outside the support. Every `every` steps ``log s`` makes a step of Adam against ``<Z, g_v>``,
    at a rate that could cross `range` in half of the run, and rests in the last tenth.

    Looking one step ahead (``Z = -lr*s*W``, the "T1-T2" rule) is short-sighted: early in training
    the validation loss always asks for larger weights. For the same reason a learning rate must
    not be chosen this way: every short horizon asks for a smaller one.

    Args:
        valid: validation data that the weights never train on: a pair of tensors, a loader, ...
        loss: callable of (output, target), a 0-d mean.
        steps: number of optimizer steps of the whole run.
        every: steps between two validation gradients (one batch each), at least 1.
        start: the first strength; 0 takes one from the first steps: for L2 the decay that shrinks
            a weight by exp(-2) over the run, at most 1; for the others a twentieth of the largest
            gradient.
        range: smallest and largest strength, relative to `start` where that is 0; clamped.
        per: one strength for each parameter ("layer") or for all of the term ("term").
        damping: ``c`` >= 0, the curvature in the metric of the optimizer; math.inf forgets ``Z``
            at every step, which is the one-step rule.
        caution: factor in (0, 1] on moves towards a smaller strength.
        batch_size: rows of a validation batch.

    Raises ValueError for arguments out of their range, TypeError for a penalty without a rule.

    References: Luketina et al., "Scalable gradient-based tuning of continuous regularization
    hyperparameters", 2016, https://arxiv.org/abs/1511.06727; Franceschi et al., "Forward and
    reverse gradient-based hyperparameter optimization", 2017, https://arxiv.org/abs/1703.01785.

    >>> import torch, tikhon
    >>> model = torch.nn.Linear(5, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    >>> x = torch.randn(20, 5); y = x[:, :1]
    >>> strength = tikhon.Hypergradient((x[:10], y[:10]), torch.nn.functional.mse_loss, steps=30)
    >>> penalty = tikhon.L2(strength)
    >>> reg = tikhon.regularize(model, optimizer, penalty, how="decoupled")
    >>> for _ in range(30):
    ...     loss = torch.nn.functional.mse_loss(model(x[10:]), y[10:])
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    >>> all(found > 0 for found in reg.state_dict()["strengths"].values())
    True
    """

    valid: Any = field(repr=False)
    loss: Callable[[Any, Any], Tensor]
    steps: int = field(kw_only=True)
    every: int = field(default=5, kw_only=True)
    start: float = field(default=0.0, kw_only=True)
    range: tuple[float, float] = field(default=(1e-4, 30.0), kw_only=True)
    per: Literal["layer", "term"] = field(default="layer", kw_only=True)
    damping: float = field(default=2.0, kw_only=True)
    caution: float = field(default=0.5, kw_only=True)
    batch_size: int = field(default=64, kw_only=True)

    def __post_init__(self) -> None:
        low, high = self.range
        checks = {
            "steps": (self.steps, self.steps >= 1, "the number of optimizer steps, at least 1"),
            "every": (self.every, self.every >= 1, "at least 1"),
            "start": (self.start, 0 <= self.start < math.inf, "finite and >= 0"),
            "range": (self.range, 0 < low < high < math.inf, "0 < smallest < largest"),
            "damping": (self.damping, self.damping >= 0, ">= 0"),
            "caution": (self.caution, 0 < self.caution <= 1, "in (0, 1]"),
            "batch_size": (self.batch_size, self.batch_size >= 1, "at least 1"),
            "per": (self.per, self.per in ("layer", "term"), "'layer' or 'term'"),
        }
        for name, (received, fine, rule) in checks.items():
            if not fine:
                raise ValueError(f"Hypergradient: {name} must be {rule}, received {received!r}")
        if not callable(self.loss):
            raise TypeError(
                f"Hypergradient: loss must be a callable of (output, target), "
                f"received {self.loss!r}"
            )

    @torch.no_grad()
    def next(self, strength: float, observation: Observation, step: int) -> float:
        """Carry the sensitivities one step on, and move the strength when it is due."""
        memory, readings = observation.memory, observation.readings
        if "log" not in memory:
            self._begin(readings, memory)
        self._carry(readings, memory, ahead=False)
        if step < _FROZEN * self.steps:
            self._descend(observation)
        memory["strength"] = min([math.exp(memory["log"]), *map(_cap, readings)])
        self._carry(readings, memory, ahead=True)
        return memory["strength"]

    def _carry(self, readings: Sequence[Reading], memory: dict[str, Any], *, ahead: bool) -> None:
        """A prox is differentiated at its result; decay acts on these weights in the next step."""
        for i, reading in enumerate(readings):
            if isinstance(reading.penalty, L2) == ahead:
                strength = memory["strength"] if ahead else reading.penalty.strength
                carry(memory[f"z{i}"], reading, float(strength), self.damping, self.every)

    @cached_property
    def stream(self) -> Stream:
        """The validation batches."""
        return Stream(self.valid, size=self.batch_size)

    def _begin(self, readings: Sequence[Reading], memory: dict[str, Any]) -> None:
        for i, reading in enumerate(readings):
            if not isinstance(reading.penalty, (L1, L2, ElasticNet, GroupLasso)):
                raise TypeError(
                    f"Hypergradient has no rule for {type(reading.penalty).__name__} on "
                    f"{reading.name!r}; it serves L1, L2, ElasticNet and GroupLasso. Use a fixed "
                    f"strength, a schedule, or tikhon.path"
                )
            memory[f"z{i}"] = torch.zeros_like(reading.weights, dtype=torch.float32)
        start = self.start or min(self._first(reading) for reading in readings)
        scale = 1.0 if self.start else start
        memory["low"], memory["high"] = (math.log(scale * bound) for bound in self.range)
        memory["log"] = min(max(math.log(start), memory["low"]), memory["high"])
        memory["count"], memory["mean"], memory["square"] = 0, 0.0, 0.0

    def _first(self, reading: Reading) -> float:
        """A first strength that neither destroys the weights nor leaves them as they are."""
        if isinstance(reading.penalty, L2):
            return min(1.0, _HORIZON / (self.steps * max(_median(reading.gain), 1e-12)))
        unit = reading.penalty.with_strength(1.0)
        assert isinstance(unit, Proximable)
        gradient = reading.arrange([_gradient(p) for p in reading.params]).float()
        return max(_FRACTION * max_strength(unit, gradient), 1e-12)

    def _descend(self, observation: Observation) -> None:
        """One step of Adam on log s against `<Z, g_v>`."""
        memory = observation.memory
        gradients = observation.shared.get("gradients")
        if gradients is None:
            number = memory["count"]
            gradients = validation_gradient(
                observation.model, self.loss, self.stream.batch(number)
            )
            observation.shared["gradients"] = gradients
        slope = 0.0
        for i, reading in enumerate(observation.readings):
            gradient = reading.arrange([gradients[p] for p in reading.params])
            slope = slope + (memory[f"z{i}"] * gradient).sum()
        slope = float(_averaged(torch.as_tensor(slope)))
        if not math.isfinite(slope):
            return  # the run itself diverges: that is not ours to hide
        memory["count"] += 1
        memory["mean"] = _MOMENTUM * memory["mean"] + (1 - _MOMENTUM) * slope
        memory["square"] = _SCALE * memory["square"] + (1 - _SCALE) * slope**2
        mean = memory["mean"] / (1 - _MOMENTUM ** memory["count"])
        square = memory["square"] / (1 - _SCALE ** memory["count"])
        rate = 2 * math.log(self.range[1] / self.range[0]) * self.every / self.steps
        move = -rate * mean / (math.sqrt(square) + 1e-30)
        move *= self.caution if move < 0 else 1.0
        memory["log"] = min(max(memory["log"] + move, memory["low"]), memory["high"])


def carry(z: Tensor, reading: Reading, strength: float, damping: float, steps: int = 1) -> None:
    """Move `z = dW / d log s`, in place, through optimizer steps between which `W` rests.

    The derivative of a prox is taken at its result `W`, by the implicit function theorem:
    `(I + gain * s * R''(W)) dW = dz - gain * s * R'(W)` on the support, 0 outside.
    """
    w, penalty = reading.weights, reading.penalty.with_strength(strength)
    gain, loss = reading.gain, min(1.0, damping * float(reading.rate))
    if isinstance(penalty, L2):
        pull = penalty.grad(w)
        unit: Any = penalty.weights
        drain = gain * strength * (1.0 if unit is None else unit) + loss
        kept = (1 - drain) ** steps
        z.mul_(kept).sub_(gain * (1 - kept) / drain * pull)
        return
    z.mul_((1 - loss) ** steps)
    gain = gain * steps
    pull = penalty.grad(w)
    if isinstance(penalty, GroupLasso):
        size = torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(1e-30)
        direction = w / size
        bend = gain * torch.linalg.vector_norm(pull, dim=1, keepdim=True) / size
        z.sub_(gain * pull).div_(1 + bend)
        tilt = direction * bend / (1 + bend)
        along = (direction * z).sum(1, keepdim=True)
        z.add_(tilt * (along / (1 - (direction * tilt).sum(1, keepdim=True)).clamp_min(1e-12)))
    else:
        curvature = strength * (1 - penalty.l1_ratio) if isinstance(penalty, ElasticNet) else 0.0
        z.sub_(gain * pull).div_(1 + gain * curvature)
    z.mul_(w != 0)


def validation_gradient(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], batch: tuple[Any, Any]
) -> dict[nn.Parameter, Tensor]:
    """Gradient of the loss in eval mode; `.grad`, buffers, random state and modes stay."""
    params = [p for p in model.parameters() if p.requires_grad]
    device = params[0].device
    inputs, target = (_on(part, device) for part in batch)
    training = [module for module in model.modules() if module.training]
    devices = [device] if device.type == "cuda" else []
    try:
        for module in training:
            module.training = False
        with torch.random.fork_rng(devices), torch.enable_grad():
            value = loss(model(inputs), target)
            found = torch.autograd.grad(value, params, allow_unused=True)
    finally:
        for module in training:
            module.training = True
    return {p: torch.zeros_like(p) if g is None else g for p, g in zip(params, found)}


def _on(part: Any, device: torch.device) -> Any:
    return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part


def _gradient(param: nn.Parameter) -> Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad


def _median(gain: float | Tensor) -> float:
    return float(torch.as_tensor(gain).median())


def _cap(reading: Reading) -> float:
    """The largest strength that does not overshoot: decay by a fixed factor has no brake."""
    if isinstance(reading.gain, Tensor) or not isinstance(reading.penalty, L2):
        return math.inf
    return _CAP / max(reading.gain, 1e-30)


def _averaged(slope: Tensor) -> Tensor:
    """The mean over the processes of a distributed run, in which each may validate on its part."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(slope)
        slope = slope / torch.distributed.get_world_size()
    return slope
