"""Misused axes: a view instead of a permutation, a softmax over the rows."""

from __future__ import annotations

import math

import torch

from tikhon.data.nested import tensors
from tikhon.diagnosis.modes import LOSS
from tikhon.diagnosis.replica import undisturbed
from tikhon.diagnosis.wiring.program import FIXED_LENGTH_ERRORS, Facts, Program, truncated
from tikhon.diagnosis.wiring.torch_calls import Call, CallTrace

SHORTER_LENGTHS = (11, 7, 5)  # lengths of shortened sequences: primes, rarely heads or channels
POOLING = ("mean", "sum", "amax", "adaptive_avg_pool1d", "logsumexp")
RESHAPES = ("view", "reshape", "view_as", "reshape_as", "unflatten")


def shape_facts(program: Program) -> Facts:
    """Find reshapes that reorder axes, and softmaxes over the rows or over one entry."""
    with torch.no_grad(), undisturbed(program.model, training=False):
        with CallTrace(program.model) as trace:
            program.replica.value(program.batch)
    calls = [c for c in trace.named(*RESHAPES) if reorders(c)] or _reorders_shorter(program)
    facts: Facts = {}
    if calls:
        call = calls[0]
        before, after = list(call.shapes[0]), list(call.output or ())
        facts["reshape"] = {"from": before, "to": after, "place": call.place}
    facts |= _unit_scores(program, trace) | _pooled_features(program, trace)
    wide = [c for c in trace.calls if c.dim == 0 and len(c.shapes[0]) > 1]
    over_rows = [c for c in wide if c.shapes[0][0] == program.rows]
    if over_rows:
        facts["softmax_over_rows"] = over_rows[0].place
    softmaxes = trace.named("softmax", "log_softmax")
    own = [c for c in softmaxes if c.module == LOSS and c.dim is not None and c.shapes[0]]
    singles = [c for c in own if c.shapes[0][c.dim or 0] == 1]
    entropies = [c for c in trace.named("cross_entropy") if c.shapes and c.shapes[0][1:2] == (1,)]
    if singles or entropies:
        facts["softmax_over_one"] = (singles or entropies)[0].place
    return facts


def _reorders_shorter(program: Program) -> list[Call]:
    """Find them with shorter sequences, since axes of equal size are ambiguous."""
    lengths = {t.shape[1] for t in tensors(program.batch[0]) if t.ndim in (2, 3)}
    plain = all(t.ndim == 3 or not t.is_floating_point() for t in tensors(program.batch[0]))
    if len(lengths) != 1 or not plain:
        return []
    size = lengths.pop()
    short = next((n for n in SHORTER_LENGTHS if n < size and n != program.rows), None)
    if short is None:
        return []
    try:
        with CallTrace(program.model) as trace:
            program.outputs(truncated(program.batch, size, short))
    except FIXED_LENGTH_ERRORS:
        return []
    # networks of fixed length flatten whole rows by a view
    return [c for c in trace.named(*RESHAPES) if reorders(c) and short in (c.output or ())]


def _pooled_features(program: Program, trace: CallTrace) -> Facts:
    """Return the call that pools the features of each position in place of the positions.

    A layer then takes one number per position: the axis of positions of the inputs, the first
    after the rows or for convolutions the last, is left where one that the network made is gone.
    """
    inputs = [t for t in tensors(program.batch[0]) if t.ndim < 4]
    known = {size for t in inputs for size in t.shape[1:]}
    kept = 2 if trace.named("conv1d") else 1  # axis of positions
    lengths = {t.shape[kept] for t in inputs if t.ndim > kept}
    pooled: Call | None = None
    for call in trace.calls:
        shape: tuple[int, ...] = call.shapes[0] if call.shapes else ()
        if call.name in POOLING and len(shape) == 3:
            left = call.output == (shape[0], shape[kept]) and shape[kept] in lengths
            pooled = call if left and shape[3 - kept] not in {shape[kept], *known} else None
        elif call.name == "linear" and pooled is not None and shape == pooled.output:
            size = next(s for s in pooled.shapes[0][1:] if s not in shape)
            found = {"name": pooled.name, "size": size, "positions": call.shapes[0][1]}
            return {"pooled_features": {**found, "place": pooled.place}}
    return {}


def _unit_scores(program: Program, trace: CallTrace) -> Facts:
    """Return the lowest cross-entropy of logits of norm 1, relative to a constant's."""
    answers = program.outputs(program.batch)
    target = program.batch[1]
    if not trace.named("cross_entropy") or len(answers) != 1 or answers[0].ndim != 2:
        return {}
    length, classes = answers[0].norm(dim=1), answers[0].shape[1]
    plain = isinstance(target, torch.Tensor) and target.ndim == 1
    if not plain or classes < 3 or not float((length - 1).abs().max()) <= 1e-3:
        return {}
    # the best unit vector points at its class and equally away from all others
    high = math.sqrt((classes - 1) / classes)
    gap = high + high / (classes - 1)
    return {"unit_scores": math.log1p((classes - 1) * math.exp(-gap)) / math.log(classes)}


def reorders(call: Call) -> bool:
    """Whether a reshape moves an axis, identified by its size, to another stride.

    A reshape keeps the memory order, so it mixes the axes where a permutation was meant. Sizes
    that occur twice are ambiguous; axes that keep their stride were only split or merged.
    """
    if not call.shapes or call.output is None:
        return False
    before, after = strides(call.shapes[0]), strides(call.output)
    moved = {s for s in before.keys() & after.keys() if before[s] != after[s]}
    same = sorted(before) == sorted(after)
    if not moved or (len(moved) == 1 and not same and max(moved) < 4):
        return False
    # relative positions are computed by a view of (n, n + 1) as (n + 1, n), on purpose
    return not same or max(moved) - min(moved) > 1 or len(moved) == 1


def strides(shape: tuple[int, ...]) -> dict[int, int]:
    """Return the contiguous stride of each axis by its size, for sizes that occur once.

    >>> strides((2, 5, 3))
    {2: 15, 5: 3, 3: 1}
    """
    found: dict[int, int] = {}
    step = 1
    for size in reversed(shape):
        found[size] = step
        step *= size
    counts = {size: shape.count(size) for size in shape}
    return {s: found[s] for s in reversed(list(found)) if s > 1 and counts[s] == 1}
