"""A faulty program and its twin from one function: what is wrong is one expression."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from programs.form import Parts, Program, Score, answer, r2

Make = Callable[[bool], Parts]


def twins(
    programs: list[Program],
    cause: str,
    source: str,
    *also: str,
    low: float = 0.5,
    high: float = 0.8,
) -> Callable[[Make], Make]:
    """Add a function of `right` to the programs of a module, as a faulty program and its twin."""

    def note(make: Make) -> Make:
        name = make.__name__.replace("_", " ")
        wrong, right = partial(make, False), partial(make, True)
        programs.append(Program(name, source, cause, wrong, right, low, high, also))
        return make

    return note


def parts(
    model: nn.Module,
    data: Any,
    loss: Any,
    step: Any,
    *,
    score: Score | None = None,
    **options: Any,
) -> Parts:
    """The parts of a program; `step` makes an optimizer of parameters, or is one."""
    optimizer = step if isinstance(step, torch.optim.Optimizer) else step(model.parameters())
    options = {"batch_size": 64, **options}
    return Parts(model, data, loss, optimizer, score or scored(*data), **options)


def scored(x: Any, y: Tensor) -> Score:
    """The share of right classes, or of explained variance, by the kind of the targets."""
    whole = not y.is_floating_point() or bool((y == y.round()).all())
    return hits(x, y) if whole else r2(x, y)


def hits(x: Any, y: Tensor) -> Score:
    """Share of right answers: the largest score, the sign, or the nearest whole number."""

    def score(model: nn.Module) -> float:
        output = answer(model, x)
        if output.numel() != y.numel():
            last = output.shape[:-1] == y.shape
            return float((output.argmax(-1 if last else 1) == y).float().mean())
        flat, goal = output.flatten(), y.flatten()
        if float(goal.max()) > 1:
            found = flat.round()
        else:
            inside = bool(((flat >= 0) & (flat <= 1)).all())
            found = (flat > (0.5 if inside else 0.0)).float()
        return float((found == goal).float().mean())

    return score


def unseen_future(x: Tensor, y: Tensor) -> Score:
    """Accuracy of the last position where the sequence ends there, as in use."""

    def score(model: nn.Module) -> float:
        found = []
        for size in (3, x.shape[1] // 2 + 1):
            last = model(x[:, :size])[:, :, -1].argmax(1)
            found.append(float((last == y[:, size - 1]).float().mean()))
        return sum(found) / len(found)

    return score


def steady(x: Any) -> Score:
    """Share of rows that get the same answer twice."""

    def score(model: nn.Module) -> float:
        first, second = answer(model, x), answer(model, x)
        return float(((first - second).abs().amax(1) < 1e-6).float().mean())

    return score


def balanced(x: Any, y: Tensor) -> Score:
    """The mean share of right answers over the classes."""

    def score(model: nn.Module) -> float:
        right = answer(model, x).argmax(1) == y
        return float(torch.stack([right[y == c].float().mean() for c in y.unique()]).mean())

    return score
