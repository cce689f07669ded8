"""Notes about tensors on the way to the loss: origin and properties."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(eq=False)
class Grown:
    """Rows broadcast against rows on another axis: (n,) and (n, 1) become (n, n)."""

    function: str
    shapes: tuple[Shape, Shape]
    place: str
    asked: bool  # the axis of size one is explicit: None, unsqueeze, view
    apart: bool  # the operands come from different tensors
    meant: bool = False  # used with other pairwise matrices, or reduced along one axis

    @property
    def slipped(self) -> bool:
        """Whether the pairs are unintended."""
        return not self.meant and (self.apart or not self.asked)


@dataclass(eq=False)
class Summand:
    """A faulty summand of the loss.

    `kind` is "sampled", a part without gradient computed from a random sample, or "weighed", a
    mean over rows times one number per row.
    """

    kind: str
    function: str
    place: str
    meant: bool = False  # used otherwise than in sums


@dataclass(frozen=True)
class Note:
    """Properties of one tensor.

    `roots` are the model outputs and parts of the batch that it is computed from; `shaped`: its
    axes of size one are explicit; `sampled`: function and line of a random sample without gradient
    that it comes from; `mixed`: combined with other tensors since.
    """

    roots: frozenset[int] = frozenset()
    shaped: bool = False
    grown: tuple[Grown, ...] = ()
    summands: tuple[Summand, ...] = ()
    sampled: tuple[str, str] | None = None
    mixed: bool = False
    drawn: bool = False  # contains noise
    masked: float = 0.0  # share of entries zeroed by a mask
    averaged: bool = False  # a scalar over all rows
    slope: bool = False  # a derivative taken by the program
    discounted: bool = False  # multiplied by a constant between 0 and 1
    goal: str = ""  # line that adds a discounted output to data: a bootstrapped target
    index: bool = False  # an argmax or another index
    norm: bool = False  # a norm over the rows
    over_rows: str = ""  # line that divided rows by such a norm
    bound: float | None = None  # upper bound on all entries
    unlearned: str = ""  # line of a loss without gradient
    logs: bool = False  # a log-softmax of data


NOTHING = Note()


def union(notes: list[Note]) -> Note:
    """Merge the notes of the inputs of an operation."""
    grown = dict.fromkeys(g for n in notes for g in n.grown)
    summands = dict.fromkeys(s for n in notes for s in n.summands)
    return Note(
        frozenset().union(*(n.roots for n in notes)),
        grown=tuple(grown),
        summands=tuple(summands),
        drawn=any(n.drawn for n in notes),
        slope=any(n.slope for n in notes),
        discounted=any(n.discounted for n in notes),
        goal=next((n.goal for n in notes if n.goal), ""),
    )


@dataclass(frozen=True)
class TracedCall:
    """One recorded call of a torch function, with the notes of its tensors."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    notes: list[Note]
    results: list[Tensor]
    place: str
    written: bool  # called by the program, not inside torch
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def attached(self) -> bool:
        """Whether its result requires a gradient."""
        return any(t.requires_grad for t in self.results)

    @property
    def plain(self) -> bool:
        """Whether it takes tensors and returns one tensor."""
        return len(self.results) == 1


def together(shapes: list[Shape]) -> Shape | None:
    """Return the broadcast shape; None if shapes do not broadcast."""
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        return None


def pairs(shape: Shape, rows: int) -> bool:
    """Whether a shape has the rows on two axes, alone or merged with a neighbouring axis."""
    return any(s > 2 and s % rows == 0 and shape.count(s) > 1 for s in shape)
