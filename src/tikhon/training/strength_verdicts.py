"""Judge the strengths a run found by the slope of the validation loss."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn, optim

from tikhon.data.nested import slice_rows
from tikhon.penalties import Penalty
from tikhon.regularizer.metric import group_of, is_uniform, stationary_gain
from tikhon.regularizer.regularizer import Regularizer
from tikhon.runs.documents import SavedPenalty
from tikhon.strengths.hypergradient import Hypergradient
from tikhon.strengths.implicit import implicit_slopes
from tikhon.training.losses import Loss

_FLAT = 0.01  # relative change of validation loss on doubling a strength: less is "flat"
_ROWS = 256


def has_adapted_strengths(regularizer: Regularizer | None) -> bool:
    """Return whether any strength was adapted to the validation loss."""
    return regularizer is not None and any(
        isinstance(live.source, Hypergradient) for live in regularizer.live_strengths()
    )


def judge_strengths(
    model: nn.Module,
    regularizer: Regularizer,
    loss: Loss,
    train: tuple[Tensor, Tensor],
    valid: tuple[Tensor, Tensor],
) -> dict[str, SavedPenalty]:
    """Return the slope of the validation loss in each strength, with its verdict.

    Verdicts are "too much", "too little" or "flat". The slope is that of `implicit_slopes` on a
    batch, relative to the validation loss on it.
    """
    current = regularizer.strengths()
    by_parameter: dict[str, Penalty] = {}
    names: dict[str, str] = {}
    for parameter, terms in regularizer.replay(1).items():
        if not isinstance(parameter, str):
            continue
        for term in terms:
            name = f"{parameter}/{type(term.penalty).__name__}"
            if name not in current or parameter in by_parameter:
                continue
            penalty = term.penalty.with_strength(current[name])
            param = model.get_parameter(parameter)
            if term.how in ("independent", "cautious"):  # stationary points of no objective
                continue
            if term.how == "decoupled":
                penalty = _as_coupled(penalty, param, regularizer.optimizer)
            if penalty is not None:
                by_parameter[parameter], names[parameter] = penalty, name
    slopes = implicit_slopes(
        model, loss.for_strengths, train, valid, by_parameter, batch_size=_ROWS
    )
    rows = slice_rows(valid, slice(_ROWS))
    with torch.no_grad():
        scale = max(float(loss.on(model, rows)), 1e-12)
    verdicts = {}
    for parameter, slope in slopes.items():
        relative = slope / scale
        verdict = "too much" if relative > 0 else "too little"
        verdict = "flat" if abs(relative) < _FLAT else verdict
        verdicts[names[parameter]] = {"slope": relative, "verdict": verdict}
    return verdicts


def _as_coupled(
    penalty: Penalty, param: nn.Parameter, optimizer: optim.Optimizer
) -> Penalty | None:
    """Return the penalty whose objective has the decoupled one's stationary points (lr / gain)."""
    group = group_of(optimizer, param)
    free = penalty.elementwise and getattr(penalty, "weights", 0) is None
    ready = is_uniform(optimizer) or param in optimizer.state
    if not (free and ready and group["lr"]):
        return None
    gain = stationary_gain(optimizer, group, optimizer.state[param]).dense()
    weights = torch.as_tensor(group["lr"] / gain).to(param).expand_as(param)
    return dataclasses.replace(penalty, weights=weights)
