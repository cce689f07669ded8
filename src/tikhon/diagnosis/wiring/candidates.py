"""Outputs that choose among candidates, for which constant targets are informative."""

from __future__ import annotations

from itertools import combinations

from torch import Tensor

from tikhon.data.nested import map_tensors, tensors
from tikhon.diagnosis.wiring.program import Facts, Program, relative_change
from tikhon.diagnosis.wiring.torch_calls import WithoutDropout

SAME = 1e-4  # relative change of outputs due to rounding
CHANGED = 1e-3  # relative change of outputs that is not rounding


def candidate_facts(program: Program) -> Facts:
    """Whether the outputs choose among candidates in the inputs, if all targets are equal.

    Permuting the candidates permutes the outputs, as when the first of several words is the true
    one. Classifiers do not permute.
    """
    target = program.batch[1]
    if not isinstance(target, Tensor) or program.rows < 3 or bool((target != target[:1]).any()):
        return {}
    with WithoutDropout():
        before = program.outputs(program.batch)
    found = _rolls_along(program, before) or _swaps_along(program, before)
    return {"candidates": True} if found else {}


def _rolls_along(program: Program, before: list[Tensor]) -> bool:
    """Whether rolling the second axis of an input rolls that of the output."""
    for part in tensors(program.batch[0]):
        if part.ndim < 2 or part.shape[1] < 2:
            continue
        after = _outputs_with(program, {id(part): part.roll(1, 1)})
        for a, b in zip(before, after):
            column = a.ndim == 1 or a.shape[1] == 1
            if part.shape[1] == 2 and column and _is_mirrored(a, b):
                return True
            if a.ndim > 1 and a.shape[1] == part.shape[1] and _changes_to(a, b, a.roll(1, 1)):
                return True
    return False


def _swaps_along(program: Program, before: list[Tensor]) -> bool:
    """Whether exchanging two inputs reverses the output or exchanges two outputs."""
    for one, other in combinations(tensors(program.batch[0]), 2):
        if one.shape != other.shape or one.dtype != other.dtype:
            continue
        after = _outputs_with(program, {id(one): other, id(other): one})
        if len(before) == 1 == len(after):
            if _is_mirrored(before[0], after[0]):
                return True
        elif any(
            a.shape == b.shape and _changes_to(a, after[i], b) and _changes_to(b, after[j], a)
            for (i, a), (j, b) in combinations(enumerate(before), 2)
        ):
            return True
    return False


def _outputs_with(program: Program, other: dict[int, Tensor]) -> list[Tensor]:
    inputs = map_tensors(program.batch[0], lambda t: other.get(id(t), t))
    return program.outputs((inputs, program.batch[1]))


def _is_mirrored(before: Tensor, after: Tensor) -> bool:
    """Whether a difference changed its sign, or a share p became 1 - p."""
    return _changes_to(before, after, -before) or _changes_to(before, after, 1 - before)


def _changes_to(before: Tensor, after: Tensor, expected: Tensor) -> bool:
    """Whether outputs changed to the expected values."""
    if before.shape != after.shape:
        return False
    change = relative_change([before], [after])
    return change > CHANGED and relative_change([expected], [after]) <= SAME
