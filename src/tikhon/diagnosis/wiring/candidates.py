"""Outputs that choose among candidates, for which constant targets are informative."""

from __future__ import annotations

from itertools import combinations

from torch import Tensor

from tikhon.data.rows import each, tensors
from tikhon.diagnosis.wiring.program import Subject, difference
from tikhon.diagnosis.wiring.torch_calls import Calm

SAME = 1e-4  # relative change of outputs due to rounding
MOVED = 1e-3  # relative change of outputs that is not rounding


def candidate_facts(subject: Subject) -> dict[str, object]:
    """Whether the outputs choose among candidates in the inputs, if all targets are equal.

    Permuting the candidates permutes the outputs, as when the first of several words is the true
    one. Classifiers do not permute.
    """
    target = subject.batch[1]
    if not isinstance(target, Tensor) or subject.rows < 3 or bool((target != target[:1]).any()):
        return {}
    with Calm():
        before = subject.outputs(subject.batch)
    found = _followed(subject, before) or _exchanged(subject, before)
    return {"candidates": True} if found else {}


def _followed(subject: Subject, before: list[Tensor]) -> bool:
    """Whether rolling the second axis of an input rolls that of the output."""
    for part in tensors(subject.batch[0]):
        if part.ndim < 2 or part.shape[1] < 2:
            continue
        after = _answers(subject, {id(part): part.roll(1, 1)})
        for a, b in zip(before, after):
            column = a.ndim == 1 or a.shape[1] == 1
            if part.shape[1] == 2 and column and _turned(a, b):
                return True
            if a.ndim > 1 and a.shape[1] == part.shape[1] and _moves(a, b, a.roll(1, 1)):
                return True
    return False


def _exchanged(subject: Subject, before: list[Tensor]) -> bool:
    """Whether exchanging two inputs reverses the output or exchanges two outputs."""
    for one, other in combinations(tensors(subject.batch[0]), 2):
        if one.shape != other.shape or one.dtype != other.dtype:
            continue
        after = _answers(subject, {id(one): other, id(other): one})
        if len(before) == 1 == len(after):
            if _turned(before[0], after[0]):
                return True
        elif any(
            a.shape == b.shape and _moves(a, after[i], b) and _moves(b, after[j], a)
            for (i, a), (j, b) in combinations(enumerate(before), 2)
        ):
            return True
    return False


def _answers(subject: Subject, other: dict[int, Tensor]) -> list[Tensor]:
    inputs = each(subject.batch[0], lambda t: other.get(id(t), t))
    with Calm():
        return subject.outputs((inputs, subject.batch[1]))


def _turned(before: Tensor, after: Tensor) -> bool:
    """Whether a difference changed its sign, or a share p became 1 - p."""
    return _moves(before, after, -before) or _moves(before, after, 1 - before)


def _moves(before: Tensor, after: Tensor, expected: Tensor) -> bool:
    """Whether outputs changed to the expected values."""
    if before.shape != after.shape:
        return False
    apart = difference([before], [after], slice(None))
    return apart > MOVED and difference([expected], [after], slice(None)) <= SAME
