"""Sensitivity of weights to the log of a strength during training, and updates of the strength.

A training step maps the weights `W` to new ones; `Z = dW / d log s` follows the derivative of
that map. These functions update `Z` and `log s`, for one strength (numbers) or many at once
(tensors that broadcast).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from tikhon.penalties import ElasticNet, GroupLasso, Penalty

Number = float | Tensor

DAMPING = 3.0  # curvature of the training loss in the metric of the optimizer
CAUTION = 0.5  # factor on moves to a strength smaller than the first
FREEZE_AT = 0.9  # share of the run after which a strength is frozen, so that the weights settle
MAX_DECAY = 0.5  # largest share of a weight that one step of decay removes
MIN_MOVES = 10  # fewest moves of a strength: with fewer its start dominates
_MOMENTUM, _SCALE = 0.9, 0.999
_MAX_MOVE = 0.2  # largest move of log s, limiting jumps in short runs
_FIRST_DECAY = 0.003  # share of a weight that the first strength of a decay removes in a step,
_HORIZON = 8.0  # in long runs at most a shrinkage by exp(-8) over the whole run,
_WARM = 1000  # and in shorter runs scaled by the fourth power of their length
_MAX_RISE = math.log(10.0)  # of the strength below which moves are even, towards the end
_SHORT = 320  # steps below which even moves are scaled by the square of the length of the run
_CLEAR = 2.0  # standard errors from which the mean of recent slopes moves a strength
_NEVER_EVEN = 20.0  # log of a factor that no strength falls by
_LOWEST_POSITION = 1e-6 - 1  # of a strength below the even one, on its scale from -1
_MIN_GRADIENT_RATIO = 0.25  # of validation to training gradient, below which losses differ in unit
_FULL_TRUST_GAIN = (
    0.01  # relative gain over a constant prediction from which a strength acts fully
)
_NEGLIGIBLE_SLOPE = 1e-3  # slope of log s, relative to the loss, that is not worth a full move


def first_decay(steps: int) -> float:
    """Return gain times the first strength of a decay, for a run of `steps`."""
    return min(_FIRST_DECAY, _HORIZON / steps) * short_run_factor(steps)


def short_run_factor(steps: int) -> float:
    """Return the reduction of the first strength of a decay in short runs."""
    return min(1.0, steps / _WARM) ** 4


def even_log(first: Number, steps: int) -> Number:
    """Return the log of the decay below which moves are even, given the log of the first one."""
    return first - math.log(short_run_factor(steps)) + 2 * math.log(min(1.0, steps / _SHORT))


def rise_of_even(reach: Number) -> Number:
    """Return by how much the log of that decay has risen when `reach` of the run is left.

    That is the learning rate times the steps left, relative to their product at the start. A
    decay removes weights in proportion to it, so what is too small to matter is larger then.
    """
    if isinstance(reach, Tensor):
        return -reach.log().clamp(-_MAX_RISE, 0)
    return -min(max(math.log(max(reach, 1e-30)), -_MAX_RISE), 0.0)


def propagate_decay(z: Tensor, pull: Tensor, gain: Number, drain: Number, steps: int = 1) -> None:
    """Apply `z <- (1 - drain) z - gain * pull` in place, `steps` times with the same values."""
    drain = drain.clamp(max=1) if isinstance(drain, Tensor) else min(drain, 1.0)
    reach: Number = 1.0
    for _ in range(steps - 1):
        reach = reach * (1 - drain) + 1
    z.mul_(1 - drain * reach).sub_(gain * reach * pull)


def propagate_prox(
    z: Tensor,
    w: Tensor,
    penalty: Penalty,
    pull: Tensor,
    gain: Number,
    loss: float,
    steps: int = 1,
) -> None:
    """The same through the derivative of a prox, at its result `w`.

    By the implicit function theorem `(I + gain * s * R''(w)) dw = dz - gain * s * R'(w)` on the
    support, and 0 outside.
    """
    z.mul_((1 - loss) ** steps)
    gain = gain * steps
    if isinstance(penalty, GroupLasso):
        size = torch.linalg.vector_norm(w, dim=1, keepdim=True).clamp_min(1e-30)
        direction = w / size
        bend = gain * torch.linalg.vector_norm(penalty.grad(w), dim=1, keepdim=True) / size
        z.sub_(gain * pull).div_(1 + bend)
        tilt = direction * bend / (1 + bend)
        along = (direction * z).sum(1, keepdim=True)
        z.add_(tilt * (along / (1 - (direction * tilt).sum(1, keepdim=True)).clamp_min(1e-12)))
    else:
        is_mixed = isinstance(penalty, ElasticNet)
        curvature = penalty.strength * (1 - penalty.l1_ratio) if is_mixed else 0.0
        z.sub_(gain * pull).div_(1 + gain * curvature)
    z.mul_(w != 0)


def log_rate(range: tuple[float, float], moves: float) -> float:
    """Rate at which `log s` crosses its range in half of the run, at most `_MAX_MOVE`."""
    return min(2 * math.log(range[1] / range[0]) / max(moves, 1), _MAX_MOVE)


def steps_between_moves(steps: int) -> int:
    """Steps between moves of a strength: 5, or fewer if the run would have too few moves."""
    return max(1, min(5, int(FREEZE_AT * steps) // (2 * MIN_MOVES)))


def initial_memory(
    log: Number, *, even: Number | None = None, size: Number = 0.0
) -> dict[str, Any]:
    """Return the initial memory of a strength.

    Moves are in log s above exp(`even`), and in s below it; without it all are in log s. `size`
    is the sum of the squares of the weights.
    """
    nothing = torch.zeros_like(log) if isinstance(log, Tensor) else 0.0
    figures = dict.fromkeys(("mean", "noise", "square", "gain", "growth", "removed"), nothing)
    places = {"log": log, "first": log, "even": log - _NEVER_EVEN if even is None else even}
    return {**places, "count": 0, "size": size, "ratio": nothing, **figures}


def change_per_move(memory: Mapping[str, Any], strength: Number) -> Number:
    """Return by how much a strength changes per unit of a move: s, or the even one if larger."""
    even = memory["even"]
    if isinstance(even, Tensor):
        return torch.maximum(torch.as_tensor(strength), even.exp() * memory["trust"])
    return max(strength, math.exp(even) * memory.get("trust", 1.0))


def transient_slope(
    memory: dict[str, Any], training: Number, *, size: Number, removed: Number, ratio: Number
) -> Number:
    """Return the part of a slope that the rest of the training takes away by itself.

    `training` is <Z, g_t> with the gradient g_t of the training loss. A short horizon favours
    larger weights as long as training still enlarges them; where it ends, the decay removes what
    the gradient adds. So the share of g_t that is not yet balanced, the growth of the weights
    relative to growth plus what decay removed, will be followed, and the slope of the
    validation loss is taken where that leads.

    Args:
        memory: of the strength; updated.
        training: slope of the training loss.
        size: sum of the squares of the weights.
        removed: what the penalty removed from it since the last move.
        ratio: norm of the validation gradient over that of the training gradient. If the first
            one is small, the training loss has another unit (a sum over rows, a scaled loss).
    """
    for name, value in (("growth", size - memory["size"]), ("removed", removed)):
        memory[name] = _MOMENTUM * memory[name] + (1 - _MOMENTUM) * value
    memory["size"] = size
    if not memory["count"]:
        memory["ratio"] = _where(ratio < _MIN_GRADIENT_RATIO, ratio, 1.0)
    growth = _where(memory["growth"] > 0, memory["growth"], 0.0)
    return growth / (growth + abs(memory["removed"]) + 1e-30) * memory["ratio"] * training


def _where(condition: bool | Tensor, yes: Number, no: Number) -> Number:
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def trusted_share(memory: dict[str, Any], loss: Number, constant_loss: Number) -> Number:
    """Return the share of a strength that acts: 0 on the plateau of a constant prediction.

    `constant_loss` is the loss of a constant prediction. Early in training, or if a strength has
    shrunk the model to a constant, the validation loss is about that, and decay would only keep it
    there. A worse loss means overfitting, not a plateau. If either is not finite, or
    `constant_loss` is 0, the share is 1.
    """
    defined = isinstance(constant_loss, Tensor) or constant_loss
    gain = (constant_loss - loss) / abs(constant_loss) if defined else math.nan
    gain = _MOMENTUM * memory["gain"] + (1 - _MOMENTUM) * gain
    is_known = abs(gain) < math.inf
    memory["gain"] = _where(is_known, gain, memory["gain"])
    return _where(is_known & (gain >= 0), _clamp(gain / _FULL_TRUST_GAIN, 0.0, 1.0), 1.0)


def descend_log_strength(
    memory: dict[str, Any],
    slope: Number,
    loss: Number,
    *,
    rate: float,
    caution: float,
    bounds: tuple[float, float],
) -> None:
    """Take one bias-corrected step of Adam against the slope of a move, within bounds.

    A move of 1 multiplies the strength by e above the even strength, and changes it by that one
    below: in log s zero would be infinitely far, and a strength once lowered could not come back.

    Adam's epsilon has the unit of the loss, so that a negligible slope (before a layer whose scale
    the next one cancels, or early in training) hardly moves the strength. The mean of recent
    slopes counts only beyond two standard errors, so that noise does not move it. Moves below the
    first strength are shortened by `caution`, as early slopes favour them; increases are reverted
    at full rate.
    """
    known = 1 - _MOMENTUM ** memory["count"] or 1.0
    surprise = (slope - memory["mean"] / known) ** 2
    memory["count"] += 1
    memory["mean"] = _MOMENTUM * memory["mean"] + (1 - _MOMENTUM) * slope
    memory["noise"] = _MOMENTUM * memory["noise"] + (1 - _MOMENTUM) * surprise
    memory["square"] = _SCALE * memory["square"] + (1 - _SCALE) * slope**2
    known = 1 - _MOMENTUM ** memory["count"]
    error = _CLEAR * (memory["noise"] / known * (1 - _MOMENTUM) / (1 + _MOMENTUM)) ** 0.5
    mean = memory["mean"] / known
    mean = mean - _clamp(mean, -error, error)
    square = memory["square"] / (1 - _SCALE ** memory["count"])
    move = -rate * mean / (square**0.5 + _NEGLIGIBLE_SLOPE * abs(loss) + 1e-30)
    below = (move < 0) & (memory["log"] <= memory["first"])
    move = _where(below, caution, 1.0) * _clamp(move, -rate, rate)
    memory["log"] = _clamp(_moved(memory["log"], memory["even"], move), *bounds)


def _clamp(value: Number, low: Number, high: Number) -> Number:
    if isinstance(value, Tensor):
        return value.clamp(low, high)  # type: ignore[call-overload]
    return min(max(value, low), high)


def _moved(log: Number, even: Number, move: Number) -> Number:
    """Return log s after a move: in log s above the even strength, in s relative to it below."""
    if isinstance(log, Tensor):
        above = log - even
        position = torch.where(above > 0, above, above.expm1()) + move
        return even + torch.where(
            position > 0, position, position.clamp_min(_LOWEST_POSITION).log1p()
        )
    above = log - cast(float, even)
    position = (above if above > 0 else math.expm1(above)) + cast(float, move)
    return even + (position if position > 0 else math.log1p(max(position, _LOWEST_POSITION)))
