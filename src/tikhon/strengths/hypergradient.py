"""Strengths tuned on the validation loss during a single run, by accumulated hypergradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor, nn

from tikhon.arguments import MAX_FLOAT32, as_number, check_field, is_count, is_one_of, require
from tikhon.data.forward import LossFunction
from tikhon.data.stream import Stream
from tikhon.errors import describe
from tikhon.penalties import L1, L2, ElasticNet, GroupLasso, Proximable
from tikhon.penalties.optimality import max_strength
from tikhon.regularizer.audit import warn
from tikhon.regularizer.controller import Controller, Observation, Per, Reading, summed_over_shards
from tikhon.regularizer.targets import all_reduce_sum, is_distributed, is_lazy
from tikhon.strengths.schedules import Recorded
from tikhon.strengths.sensitivity import (
    CAUTION,
    DAMPING,
    FREEZE_AT,
    MAX_DECAY,
    MIN_MOVES,
    change_per_move,
    descend_log_strength,
    even_log,
    first_decay,
    initial_memory,
    log_rate,
    propagate_decay,
    propagate_prox,
    rise_of_even,
    short_run_factor,
    transient_slope,
    trusted_share,
)
from tikhon.strengths.validation import (
    ValidationResult,
    average_over_processes,
    explain_loss_errors,
    validate,
)

_FRACTION = 0.05  # first strength of a sparse penalty, relative to its largest gradient


@dataclass(frozen=True, eq=False)
class Hypergradient(Controller):
    r"""A strength that follows the gradient of the validation loss while the model trains.

    With ``W`` the weights, ``s`` the strength and ``g_v`` the gradient of the validation loss,

        d L_valid / d log s = <Z, g_v>,        Z = dW / d log s.

    ``Z`` is carried forward through the optimizer's map of the weights. The curvature of the
    training loss in that map is replaced by the damping ``c``. For decoupled decay

        Z <- (1 - lr*s - c*lr) * Z - lr*s*W        at every step,

    and for L1, ElasticNet and GroupLasso through the derivative of their prox, which is zero
    outside the support. While training still enlarges the weights, the share of its gradient that
    the penalty does not balance yet is subtracted from ``g_v``: every short horizon favours larger
    weights, and the end of the run does not depend on it. Every `every` steps ``log s`` (a decay
    too small to matter: ``s``) makes a step of Adam against the slope, at a rate that could cross
    `range` in half of the run (at most a factor of 1.22 per step, so that a short run makes no
    leaps), and rests in the last tenth. A slope that promises less than a thousandth of the loss
    moves it proportionally less.

    The validation loss is that of the function being trained: no dropout, and layers such as
    BatchNorm use the statistics of the validation batch, since their running averages lag behind
    the weights early in training. A layer that is kept in eval mode stays in it.

    Looking one step ahead (``Z = -lr*s*W``, the "T1-T2" rule) is short-sighted: early in training
    the validation loss always favours larger weights. For the same reason a learning rate must
    not be chosen this way: every short horizon favours a smaller one.

    Args:
        valid: validation data that the weights never train on: a pair of tensors, a loader, ...
        loss: callable of (output, target), or of (model, batch), a 0-d mean.
        steps: number of optimizer steps of the whole run. A strength that can make fewer than 10
            moves (``0.9 * steps / every``) stays near its start, with a warning.
        every: steps between two validation gradients (one batch each), at least 1.
        start: the first strength; 0 derives it from the first steps: for L2 the decay that shrinks
            a weight by 0.3 % per step (by exp(-8) over a long run, and by much less per step in a
            run of under 1000), for the others a twentieth of the largest gradient.
        range: smallest and largest strength of a decoupled L2; of the other terms it is relative
            to the first strength of a long run where `start` is 0.
        per: one strength for each parameter ("layer"), for each parameter group of the optimizer
            ("group") or for all of the term ("term").
        damping: ``c`` >= 0, the curvature in the metric of the optimizer; math.inf forgets ``Z``
            at every step, which is the one-step rule.
        caution: factor in (0, 1] on moves to a strength smaller than the first.
        batch_size: rows of a validation batch.

    Raises ValueError for arguments out of their range and for data that cannot be read, InputError
    from `regularize` if the model or the loss does not accept them, TypeError for a penalty
    without a rule. Warns once when a strength comes to rest at the upper end of its range, and
    when the run continues past `steps`.
    Works under DDP and FSDP2 (slopes are averaged over the processes) and inside AMP.

    References: Luketina et al., "Scalable gradient-based tuning of continuous regularization
    hyperparameters", 2016, https://arxiv.org/abs/1511.06727; Franceschi et al., "Forward and
    reverse gradient-based hyperparameter optimization", 2017, https://arxiv.org/abs/1703.01785.

    >>> import torch, tikhon
    >>> model = torch.nn.Linear(5, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    >>> x = torch.randn(20, 5); y = x[:, :1]
    >>> strength = tikhon.Hypergradient((x[:10], y[:10]), torch.nn.functional.mse_loss, steps=120)
    >>> penalty = tikhon.L2(strength)
    >>> reg = tikhon.regularize(model, optimizer, penalty, how="decoupled")
    >>> for _ in range(120):
    ...     loss = torch.nn.functional.mse_loss(model(x[10:]), y[10:])
    ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
    >>> all(found > 0 for found in reg.state_dict()["strengths"].values())
    True
    """

    valid: Any = field(repr=False)
    loss: LossFunction
    steps: int = field(kw_only=True)
    every: int = field(default=5, kw_only=True)
    start: float = field(default=0.0, kw_only=True)
    range: tuple[float, float] = field(default=(1e-4, 30.0), kw_only=True)
    per: Per = field(default="layer", kw_only=True)
    damping: float = field(default=DAMPING, kw_only=True)
    caution: float = field(default=CAUTION, kw_only=True)
    batch_size: int = field(default=64, kw_only=True)
    reads_shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        steps_allowed = "the number of optimizer steps, at least 1"
        for name, allowed in (
            ("steps", steps_allowed),
            ("every", "at least 1"),
            ("batch_size", "at least 1"),
        ):
            check_field(self, name, allowed, is_count, whole=True)
        pair = isinstance(self.range, Sequence) and len(self.range) == 2
        found = [as_number(end) for end in self.range] if pair else []
        ends = [end for end in found if end is not None]
        ordered = len(ends) == 2 and 0 < ends[0] < ends[1] <= MAX_FLOAT32
        require(self, "range", self.range, ordered, "0 < smallest < largest")
        object.__setattr__(self, "range", tuple(ends))
        inside = f"0 or within range, {self.range}"
        check_field(self, "start", inside, lambda x: x == 0 or ends[0] <= x <= ends[1])
        check_field(self, "damping", ">= 0", lambda c: c >= 0)
        check_field(self, "caution", "in (0, 1]", lambda factor: 0 < factor <= 1)
        fine = is_one_of(self.per, get_args(Per))
        require(self, "per", self.per, fine, "'layer', 'group' or 'term'")
        if not callable(self.loss):
            raise TypeError(
                f"Hypergradient: loss must be a callable of (output, target), "
                f"received {describe(self.loss)}"
            )
        _ = self.stream  # fail here on unreadable data, not within a step
        if (moves := int(FREEZE_AT * self.steps / self.every)) < MIN_MOVES:
            finer = max(1, int(FREEZE_AT * self.steps / MIN_MOVES))
            advice = f"take every={finer}, more steps" if finer < self.every else "take more steps"
            warnings.warn(
                f"Hypergradient: {self.steps} steps with every={self.every} leave {moves} moves, "
                f"too few to get far from the first strength; {advice}, or a fixed strength",
                stacklevel=3,
            )

    @torch.no_grad()
    def next(self, strength: float, observation: Observation, step: int) -> float:
        """Update the sensitivities by one step, and the strength when it is due."""
        memory, readings = observation.memory, observation.readings
        rate = float(readings[0].rate)
        if "first_rate" not in memory:
            self._begin(readings, memory, rate)
        if isinstance(readings[0].penalty, L2):
            left = rate / memory["first_rate"] * (1 - step / self.steps)
            memory["even"] = memory["first_even"] + cast(float, rise_of_even(left))
        self._propagate(readings, memory, ahead=False)
        if step < FREEZE_AT * self.steps:
            self._descend(observation)
        asked = math.exp(memory["log"]) * memory.get("trust", 1.0)
        memory["strength"] = min([asked, *map(_cap, readings)])
        self._warn_of_ends(readings, memory, step)
        self.record(memory, memory["strength"], step)
        self._propagate(readings, memory, ahead=True)
        return memory["strength"]

    def _warn_of_ends(
        self, readings: Sequence[Reading], memory: dict[str, Any], step: int
    ) -> None:
        """Warn once when a strength reaches the end of its range, or the run exceeds `steps`."""
        name = readings[0].name + (f" and {len(readings) - 1} more" if len(readings) > 1 else "")
        rests = step >= FREEZE_AT * self.steps
        if rests and memory["log"] >= memory["high"] and not memory.get("met"):
            memory["met"] = True
            warn(
                f"Hypergradient: the strength on {name} rests at the upper end of its range, "
                f"{math.exp(memory['high']):.3g}; if the validation loss is worse than without "
                "it, give a smaller range, otherwise a larger one"
            )
        if rests and memory.get("trust", 1.0) < 0.5 and not memory.get("blind"):
            memory["blind"] = True
            warn(
                f"Hypergradient: the strength on {name} acts by a share of {memory['trust']:.2g}, "
                "because the validation loss is hardly below that of one answer for all rows: "
                "decay would keep the model there; see whether it learns without a strength"
            )
        if step > self.steps and not memory.get("over"):
            memory["over"] = True
            warn(
                f"Hypergradient: the run goes on past steps={self.steps}; the strength on {name} "
                f"has rested since step {int(FREEZE_AT * self.steps)}; give the number of "
                "optimizer steps of the whole run"
            )

    def record(self, memory: dict[str, Any], strength: float, step: int) -> None:
        """Record the strength found after `step`, for replay."""
        if "trace" not in memory:
            memory["trace"] = torch.full((max(1, self.steps // self.every),), strength)
        memory["trace"][step // self.every - 1 :] = strength

    def recorded(self, memory: Mapping[str, Any], steps: int) -> Recorded:
        """Return the recorded strengths as a schedule of another run of `steps`."""
        found = memory["trace"].tolist() if "trace" in memory else [self.start]
        return Recorded(tuple(found), steps)

    def _propagate(
        self, readings: Sequence[Reading], memory: dict[str, Any], *, ahead: bool
    ) -> None:
        """Update sensitivities: through a prox at its result, through decay for the next step."""
        for reading in readings:
            if isinstance(reading.penalty, L2) == ahead:
                strength = float(memory["strength"] if ahead else reading.penalty.strength)
                unit = cast(float, change_per_move(memory, strength))
                z = _sensitivity(memory, reading)
                _propagate(z, reading, strength, unit, self.damping, self.every)

    @cached_property
    def stream(self) -> Stream:
        """Validation batches."""
        return Stream(self.valid, size=self.batch_size)

    def check(self, model: nn.Module) -> None:
        """Evaluate the first validation batch, so that an unsuitable loss fails early.

        A model without initialised weights (lazy, sharded, on the meta device) is not checked.
        """
        if any(is_lazy(p) or hasattr(p, "placements") or p.is_meta for p in model.parameters()):
            return
        with explain_loss_errors("Hypergradient", self.loss, "validation"):
            validate(model, self.loss, self.stream.first())

    def _begin(self, readings: Sequence[Reading], memory: dict[str, Any], rate: float) -> None:
        for reading in readings:
            if not isinstance(reading.penalty, (L1, L2, ElasticNet, GroupLasso)):
                raise TypeError(
                    f"Hypergradient has no rule for {type(reading.penalty).__name__} on "
                    f"{reading.name!r}; it serves L1, L2, ElasticNet and GroupLasso. Use a fixed "
                    f"strength, a schedule, or tikhon.path"
                )
        is_decay, first = isinstance(readings[0].penalty, L2), self.start
        if is_decay or not first:
            device = readings[0].weights.device
            first = _max_over_processes(min(map(self._first, readings)), device)
        start = self.start or first
        absolute = self.start or all(
            r.how == "decoupled" and isinstance(r.penalty, L2) for r in readings
        )
        scale = 1.0 if absolute else start / (short_run_factor(self.steps) if is_decay else 1.0)
        low, high = (math.log(scale * bound) for bound in self.range)
        log = min(max(math.log(start), low), high)
        even = even_log(math.log(first), self.steps) if is_decay else None
        size = sum(summed_over_shards(r, float(r.weights.square().sum())) for r in readings)
        begun = initial_memory(log, even=even, size=size) | {"low": low, "high": high}
        begun |= {"first_even": begun["even"], "first_rate": max(rate, 1e-30)}
        memory.update(begun | memory)  # states of old runs lack some

    def _first(self, reading: Reading) -> float:
        """Return a first strength large enough to matter and small enough to do no harm."""
        if isinstance(reading.penalty, L2):
            return first_decay(self.steps) / max(
                float(torch.as_tensor(reading.gain).median()), 1e-12
            )
        unit = reading.penalty.with_strength(1.0)
        assert isinstance(unit, Proximable)
        return max(_FRACTION * max_strength(unit, _training_gradient(reading)), 1e-12)

    def _descend(self, observation: Observation) -> None:
        """Take a step of Adam on log s along `-<Z, g_v>`."""
        memory = observation.memory
        if "gradients" not in observation.shared:
            observation.shared["gradients"] = self.validate(observation.model, memory["count"])
        seen, is_first = observation.shared["gradients"], not memory["count"]
        parts = []
        for reading in observation.readings:
            w, z = reading.weights, _sensitivity(memory, reading)
            valid = reading.arrange([seen.gradients[p] for p in reading.params])
            train = _training_gradient(reading)
            removed = 2 * self.every * reading.gain * w * reading.penalty.grad(w)
            pairs = [(z, valid), (z, train), (w, w)]
            pairs += [(valid, valid), (train, train)] if is_first else []
            sums = torch.stack([removed.sum(), *((a * b).sum() for a, b in pairs)]).float()
            parts.append(all_reduce_sum(sums, reading.params[0]).to(parts[0] if parts else sums))
        figures = average_over_processes(sum(parts[1:], parts[0])).tolist()
        removed, slope, training, size = figures[:4]
        valid_square, train_square = figures[4:] or (1.0, 1.0)  # only the first ratio counts
        ratio = math.sqrt(valid_square / train_square) if train_square else math.inf
        ahead = transient_slope(memory, training, size=size, removed=removed, ratio=ratio)
        self.move(memory, slope - ahead, seen, (memory["low"], memory["high"]))

    def validate(self, model: nn.Module, number: int) -> ValidationResult:
        """Return the loss on validation batch `number`, and its gradient."""
        return validate(model, self.loss, self.stream.batch(number), pooled=True)

    def move(
        self,
        memory: dict[str, Any],
        slope: float,
        seen: ValidationResult,
        bounds: tuple[float, float],
    ) -> None:
        """Move `log s` against its slope; slope and losses are averaged over processes."""
        figures = torch.stack([seen.loss.new_tensor(slope), seen.loss, seen.constant_loss])
        amount, level, constant_loss = average_over_processes(figures).tolist()
        memory["trust"] = float(trusted_share(memory, level, constant_loss))
        if math.isfinite(amount + level):  # otherwise the run itself diverges, and reports it
            rate = log_rate(self.range, self.steps / self.every)
            descend_log_strength(
                memory, amount, level, rate=rate, caution=self.caution, bounds=bounds
            )


def _sensitivity(memory: dict[str, Any], reading: Reading) -> Tensor:
    """Return dW / d log s of a reading, zero if its weights are new.

    Keyed by name, as parameters may lack a gradient in some steps, or be added later.
    """
    key = f"z {reading.name}"
    if key not in memory or memory[key].shape != reading.weights.shape:
        memory[key] = torch.zeros_like(reading.weights, dtype=torch.float32)
    return memory[key]


def _training_gradient(reading: Reading) -> Tensor:
    """Return the gradient of the training loss of this step, zero where there is none."""
    given = [torch.zeros_like(p) if p.grad is None else p.grad for p in reading.params]
    return reading.arrange(given).float()


def _propagate(
    z: Tensor, reading: Reading, strength: float, unit: float, damping: float, steps: int
) -> None:
    """Update `z` in place over `steps` optimizer steps with constant weights.

    `unit` is the change of the strength per unit of a move.
    """
    w, penalty = reading.weights, reading.penalty
    pull = penalty.with_strength(unit).grad(w)
    gain, loss = reading.gain, min(1.0, damping * float(reading.rate))
    if isinstance(penalty, L2):
        factors = cast("float | Tensor", 1.0 if penalty.weights is None else penalty.weights)
        propagate_decay(z, pull, gain, gain * strength * factors + loss, steps)
    else:
        propagate_prox(z, w, penalty.with_strength(strength), pull, gain, loss, steps)


def _cap(reading: Reading) -> float:
    """Return the largest strength that does not overshoot, for decay by a fixed factor."""
    if isinstance(reading.gain, Tensor) or not isinstance(reading.penalty, L2):
        return math.inf
    return MAX_DECAY / max(reading.gain, 1e-30)


def _max_over_processes(amount: float, device: torch.device) -> float:
    """Return the maximum over processes, each of which may hold part of the weights (FSDP2)."""
    if is_distributed():
        shared = torch.tensor(amount, device=device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return float(shared)
    return amount
