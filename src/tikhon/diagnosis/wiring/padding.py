"""Padding of sequences: do outputs depend on it, and does the loss count it?"""

from __future__ import annotations

import torch
from torch import Tensor

from tikhon.data.nested import map_tensors, tensors
from tikhon.diagnosis.replica import undisturbed
from tikhon.diagnosis.wiring.program import (
    FIXED_LENGTH_ERRORS,
    Facts,
    Program,
    relative_change,
    truncated,
)
from tikhon.diagnosis.wiring.targets import LossProbe
from tikhon.diagnosis.wiring.torch_calls import WithoutDropout
from tikhon.errors import InputError
from tikhon.training.losses import IGNORED

END_TOKEN_SHARE = 0.5  # share of texts with the same last token, for it to be an end token
MIN_SHORT = 0.3  # share of the rows that must end in padding, of different lengths
MIN_PADDING = 4  # positions at the end of all rows that hold one value, at least
CHANGED = 1e-4  # relative change of a loss beyond rounding
MAX_INSIDE = 0.02  # share of the positions before the padding that may hold the same value


def padding_facts(program: Program) -> Facts:
    """Measure the change of outputs without padding, and the padding counted by the loss."""
    inputs, target = program.batch
    found = [(t, ends) for t in tensors(inputs) if (ends := lengths(t)) is not None]
    if not found:
        return {}
    part, ends = found[0]
    facts: Facts = {"padding": 1 - float(ends.sum()) / (len(ends) * part.shape[1])}
    varied = len(ends.unique()) > 1
    change = _change_without_padding(program, ends, part.shape[1]) if varied else None
    if change is not None:
        facts["padding_apart"] = change
    if not isinstance(target, Tensor) or target.ndim < 2:
        return facts
    for part, ends in found:
        if target.shape[1] == part.shape[1]:
            facts |= _padding_share_in_loss(program, ends, part.shape[1])
            facts["ends_unasked"] = _lacks_end_tokens(part, target, ends)
            break
    return facts


def _lacks_end_tokens(tokens: Tensor, target: Tensor, ends: Tensor) -> bool:
    """Whether labels equal to the tokens ignore the padding, and no end token precedes it.

    An end token would be the last one of most texts.
    """
    if tokens.shape != target.shape or tokens.is_floating_point() or len(ends.unique()) < 3:
        return False
    tokens, target = tokens.cpu(), target.cpu()
    filled = torch.arange(tokens.shape[1]) >= ends[:, None]
    same = torch.equal(tokens[~filled], target[~filled])
    if not same or not bool(filled.any(1).all()) or bool((target[filled] != IGNORED).any()):
        return False
    counts = tokens.gather(1, (ends - 1).clamp_min(0)[:, None]).unique(return_counts=True)[1]
    return float(counts.max()) < END_TOKEN_SHARE * len(ends)


def lengths(values: Tensor) -> Tensor | None:
    """Return the lengths of sequences padded at their end with one value; None for others."""
    if values.ndim < 2 or values.shape[1] < 4 or len(values) < 5 or values.dtype == torch.bool:
        return None
    if values.is_floating_point() and values.ndim < 3:
        return None  # a table
    steps = values.flatten(2) if values.ndim > 2 else values[:, :, None]
    filler = torch.zeros_like(steps[0, 0])
    if not values.is_floating_point():
        filler = steps[:, -1, 0].mode().values.expand_as(filler)
    same = (steps == filler).all(2)
    ends = values.shape[1] - same.flip(1).cumprod(1).sum(1)
    inside = float(same.sum() - (values.shape[1] - ends).sum()) / max(1.0, float(ends.sum()))
    if len(ends.unique()) == 1:
        return ends.cpu() if _share_padded_end(values, same, int(ends[0])) else None
    short = ends < values.shape[1]
    varied = len(ends.unique()) > 2 and int(ends.min()) > 0
    usual = float(short.double().mean()) >= MIN_SHORT and inside <= MAX_INSIDE
    return ends.cpu() if usual and varied else None


def _share_padded_end(values: Tensor, same: Tensor, end: int) -> bool:
    """Whether tokens of all rows end at the same position, long before the last one."""
    if values.is_floating_point() or values.shape[1] - end < MIN_PADDING or end < 1:
        return False
    varied = (values[:, :end] != values[:1, :end]).any(0)
    return bool(varied.any()) and float(same[:, :end][:, varied].double().mean()) <= MAX_INSIDE


def _change_without_padding(program: Program, ends: Tensor, size: int) -> float | None:
    """Return the change of outputs of the shorter half of rows without their common padding."""
    cut = int(ends.median())
    if not 1 <= cut < size:
        return None
    rows = torch.nonzero(ends <= cut).flatten()

    def shorter_half(t: Tensor) -> Tensor:
        return t[rows.to(t.device)] if t.ndim and len(t) == program.rows else t

    batch = (
        map_tensors(program.batch[0], shorter_half),
        map_tensors(program.batch[1], shorter_half),
    )
    try:
        before = program.outputs(batch)
        after = program.outputs(truncated(batch, size, cut))
    except FIXED_LENGTH_ERRORS:
        return None
    worst = 0.0
    kept = torch.arange(cut) < ends[rows][:, None]
    for a, b in zip(before, after):
        if a.shape == b.shape:
            worst = max(worst, relative_change([a], [b]))
        elif a.ndim >= 2 and a.shape[:2] == (len(rows), size) and b.shape[1:2] == (cut,):
            worst = max(worst, relative_change([a[:, :cut]], [b], kept.to(a.device)))
    return worst


def _padding_share_in_loss(program: Program, ends: Tensor, size: int) -> Facts:
    """Return the share of padding among target positions with a gradient."""
    target = program.batch[1]
    if program.replica.whole:
        return _padding_share_in_closure(program, ends, size)
    with torch.no_grad():
        output = map_tensors(program.forward(program.batch), lambda t: t.detach().clone())
    probe = LossProbe(program, output)
    found = probe.gradient(target)
    if found is None or len(found) != 1 or found[0].ndim < 2:
        return {}
    pull = found[0].abs()
    axis = next((k for k in range(1, pull.ndim) if pull.shape[k] == size), None)
    if axis is None:
        return {}
    pull = pull.movedim(axis, 1).cpu()
    counted = pull.reshape(*pull.shape[:2], -1).sum(2) > 0
    padded = torch.arange(size) >= ends[:, None]
    filler = target.cpu()[padded]
    if not bool(counted.any()) or not filler.numel() or bool((filler != filler[:1]).any()):
        return {}  # padded inputs have targets of their own
    return {"padding_counted": float((counted & padded).sum()) / float(counted.sum())}


def _padding_share_in_closure(program: Program, ends: Tensor, size: int) -> Facts:
    """Return that share for a loss that calls the model and changes when padding is ignored.

    The first padded position of a row may be its end token, which is to be learned.
    """
    inputs, target = program.batch
    padded = torch.arange(size) > ends[:, None]
    if target.is_floating_point() or target.ndim != 2 or not bool(padded.any()):
        return {}
    filler = target.cpu()[padded]
    if bool((filler != filler[:1]).any()) or int(filler[0]) == IGNORED:
        return {}
    marked = target.masked_fill(padded.to(target.device), IGNORED)
    try:
        with torch.no_grad(), undisturbed(program.model, training=False), WithoutDropout():
            before, after = (float(program.replica.value((inputs, y))) for y in (target, marked))
    except (InputError, *FIXED_LENGTH_ERRORS):  # a loss with another ignore_index
        return {}
    counted = abs(before - after) > CHANGED * abs(before)
    share = float(padded.sum()) / float((target != IGNORED).sum())
    return {"padding_counted": share} if counted else {}
