"""Answers that choose among candidates: targets that are the same in all rows say something."""

from __future__ import annotations

from itertools import combinations

from torch import Tensor

from tikhon.data.rows import each, tensors
from tikhon.diagnosis.wiring.calls import Calm
from tikhon.diagnosis.wiring.subject import Subject, difference

SAME = 1e-4  # change of answers / answers, that is rounding
MOVED = 1e-3  # and that is none


def candidate_facts(subject: Subject) -> dict[str, object]:
    """Whether what a row chooses from stands in its inputs, where the targets are all the same.

    The answers follow the candidates that change places: the first of several words is the true
    one, the first of two rows the better one. A network that has classes answers by place.
    """
    target = subject.batch[1]
    if not isinstance(target, Tensor) or subject.rows < 3 or bool((target != target[:1]).any()):
        return {}
    with Calm():
        before = subject.outputs(subject.batch)
    found = _followed(subject, before) or _exchanged(subject, before)
    return {"candidates": True} if found else {}


def _followed(subject: Subject, before: list[Tensor]) -> bool:
    """Whether the answers on the second axis move with what an input holds on its own."""
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
    """Whether the answer turns round, or two answers change places, when two inputs do."""
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
    """A difference that changes its sign, or the share of one of two."""
    return _moves(before, after, -before) or _moves(before, after, 1 - before)


def _moves(before: Tensor, after: Tensor, expected: Tensor) -> bool:
    """Whether answers changed, and to what was expected."""
    if before.shape != after.shape:
        return False
    apart = difference([before], [after], slice(None))
    return apart > MOVED and difference([expected], [after], slice(None)) <= SAME
