"""Documented domains of the arguments of torch's losses, checked in each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tikhon.diagnosis.functions import BINARY
from tikhon.diagnosis.wiring.origins import TracedCall
from tikhon.diagnosis.wiring.program import Facts

Breach = Facts
TOLERANCE = {torch.float16: 0.05, torch.bfloat16: 0.1}  # of a sum of probabilities
EXACT = 1e-3
SIGNED_TARGETS = {  # position of the targets
    "margin_ranking_loss": 2,
    "cosine_embedding_loss": 2,
    "hinge_embedding_loss": 1,
    "soft_margin_loss": 1,
}


SIMILARITY_LOSSES = ("cosine_embedding_loss", "hinge_embedding_loss")


def breach(step: TracedCall) -> Breach | None:
    """Return the violation of a call of a loss as code, range and place; None if valid."""
    check = CHECKED.get(step.name)
    if check is None:
        return None
    found = check(step)
    return {"function": step.name, "place": step.place, **found} if found else None


def argument(step: TracedCall, position: int, name: str) -> Any:
    """Return an argument by position or name."""
    return step.args[position] if len(step.args) > position else step.kwargs.get(name)


def _log_probabilities(step: TracedCall) -> Breach | None:
    """Check that the inputs are log-probabilities of classes."""
    given = argument(step, 0, "log_probs" if step.name == "ctc_loss" else "input")
    axis = -1 if step.name == "ctc_loss" or given.ndim == 1 else 1
    return _check_normalised(given, [axis])


def _check_normalised(given: Tensor, axes: list[int]) -> Breach | None:
    allowed = TOLERANCE.get(given.dtype, EXACT)
    gaps = [float(torch.logsumexp(given.detach().double(), axis).abs().max()) for axis in axes]
    gap = min(gaps)
    return {"code": "missing_log", "gap": gap} if gap > allowed else None


def _kl_arguments(step: TracedCall) -> Breach | None:
    """Check that inputs are log-probabilities, and targets probabilities unless log_target."""
    given, target = argument(step, 0, "input"), argument(step, 1, "target")
    above = float(given.detach().max()) > TOLERANCE.get(given.dtype, EXACT)
    if given.ndim and above:
        return _check_normalised(given, list({-1, min(1, given.ndim - 1)}))
    if step.kwargs.get("log_target") or not isinstance(target, Tensor):
        return None
    return _out_of_range("logs", target) if value_range(target)[0] < 0 else None


def _counts(step: TracedCall) -> Breach | None:
    """Check that targets are counts, and that a rate is positive, or given by its logarithm."""
    given, target = argument(step, 0, "input"), argument(step, 1, "target")
    takes_log = argument(step, 2, "log_input") is not False
    if not takes_log and value_range(given)[0] < 0:
        return {"code": "undefined_operation", "kind": "rate"}
    if takes_log and type(given.grad_fn).__name__ in RATES:
        return {"code": "missing_log", "kind": "rate"}
    return _out_of_range("counts", target) if value_range(target)[0] < 0 else None


RATES = {"ExpBackward0", "SoftplusBackward0"}  # what makes an output positive


def _out_of_range(kind: str, target: Tensor) -> Breach:
    """Report targets out of range; `kind` names the expected ones."""
    low, high = value_range(target)
    return {"code": "target_out_of_range", "kind": kind, "low": low, "high": high}


def _plus_or_minus_one(step: TracedCall) -> Breach | None:
    """Check that targets are -1 and 1, and not all equal for similarity losses."""
    target = argument(step, SIGNED_TARGETS[step.name], "target")
    if step.name in SIMILARITY_LOSSES and isinstance(target, Tensor) and target.numel() > 2:
        if bool((target == target.flatten()[0]).all()):
            value = float(target.flatten()[0])
            return {"code": "constant_targets", "kind": "pairs", "low": value, "high": value}
    if not isinstance(target, Tensor) or bool(((target == 1) | (target == -1)).all()):
        return None
    return _out_of_range("signs", target)


def _class_indices(step: TracedCall) -> Breach | None:
    """Check that targets are class indices padded with -1, not one 0/1 column per class."""
    target = argument(step, 1, "target")
    several = target.ndim and target.shape[-1] > 2 and not bool((target < 0).any())
    return _out_of_range("numbers", target) if several and value_range(target)[1] <= 1 else None


def _probabilities(step: TracedCall) -> Breach | None:
    """Check that targets are from 0 to 1."""
    target = argument(step, 1, "target")
    low, high = value_range(target)
    return _out_of_range("shares", target) if low < 0 or high > 1 else None


def value_range(values: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest entry."""
    if not values.numel():
        return 0.0, 0.0
    return float(values.detach().min()), float(values.detach().max())


def _softmax_over_one(step: TracedCall) -> Breach | None:
    """Check that a softmax in the network has more than one entry."""
    scores = argument(step, 0, "input")
    axis = argument(step, 1, "dim")
    single = isinstance(axis, int) and scores.ndim in (2, 3) and scores.shape[axis] == 1
    if not single or not scores.requires_grad:
        return None
    return {"code": "head_mismatch", "kind": "positions" if scores.ndim == 3 else ""}


def _cross_entropy_arguments(step: TracedCall) -> Breach | None:
    """Check that logits are no probabilities, and that contrastive targets differ by row."""
    scores, target = argument(step, 0, "input"), argument(step, 1, "target")
    learned = scores.ndim == 2 and scores.shape[1] > 1 and scores.requires_grad
    if learned and _are_probabilities(scores):
        return {"code": "head_mismatch", "kind": "probabilities"}
    square = scores.ndim == 2 and scores.shape[0] == scores.shape[1] > 2
    named = square and isinstance(target, Tensor) and target.ndim == 1
    if not named or target.is_floating_point() or not bool((target == target[:1]).all()):
        return None
    return {"code": "constant_targets", "low": float(target[0]), "high": float(target[0])}


def _are_probabilities(scores: Tensor) -> bool:
    """Whether every row consists of probabilities that add up to 1."""
    given = scores.detach().double()
    off = (given.sum(1) - 1).abs().max()
    return bool((given >= 0).all()) and float(off) <= TOLERANCE.get(scores.dtype, EXACT)


def _free_parameter(step: TracedCall) -> Breach | None:
    """Check that no logarithm or root is taken of an unconstrained parameter."""
    given = argument(step, 0, "input")
    free = isinstance(given, torch.nn.Parameter) and given.requires_grad
    return {"code": "undefined_operation"} if free else None


CHECKED: dict[str, Callable[[TracedCall], Breach | None]] = {
    "nll_loss": _log_probabilities,
    "ctc_loss": _log_probabilities,
    "kl_div": _kl_arguments,
    "poisson_nll_loss": _counts,
    "multilabel_margin_loss": _class_indices,
    "multilabel_soft_margin_loss": _probabilities,
    "softmax": _softmax_over_one,
    "cross_entropy": _cross_entropy_arguments,
    **dict.fromkeys(("log", "log2", "log10", "sqrt", "rsqrt"), _free_parameter),
    **dict.fromkeys(SIGNED_TARGETS, _plus_or_minus_one),
    **dict.fromkeys(BINARY, _probabilities),
}
