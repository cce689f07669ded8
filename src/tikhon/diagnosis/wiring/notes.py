"""What is known of a tensor on its way to the loss: of what it is made, what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(eq=False)
class Grown:
    """Rows that met rows on another axis: (n,) and (n, 1) became (n, n)."""

    function: str
    shapes: tuple[Shape, Shape]
    place: str
    asked: bool  # the axis of size one was written: None, unsqueeze, view
    apart: bool  # and what meets comes from different tensors
    meant: bool = False  # it met other tables of pairs, or is read along one axis

    @property
    def slipped(self) -> bool:
        """Whether nobody asked for pairs."""
        return not self.meant and (self.apart or not self.asked)


@dataclass(eq=False)
class Summand:
    """A part that is added to the loss as it is: what should not be one.

    `kind` is "sampled", a part without gradient that was computed from a draw, or "weighed", a
    mean over rows times numbers of each row.
    """

    kind: str
    function: str
    place: str
    meant: bool = False  # something else is done with it than to add it up


@dataclass(frozen=True)
class Note:
    """What is known of one tensor.

    `roots` are the answers of the model and parts of the batch that it is made of; `shaped` says
    that its axes of size one were asked for; `sampled` is the function and line of a draw without
    gradient that it comes from, `mixed` that something else went into it since.
    """

    roots: frozenset[int] = frozenset()
    shaped: bool = False
    grown: tuple[Grown, ...] = ()
    summands: tuple[Summand, ...] = ()
    sampled: tuple[str, str] | None = None
    mixed: bool = False
    drawn: bool = False  # noise is part of it
    masked: float = 0.0  # share of its entries that a mask made zero
    averaged: bool = False  # it is one number of all rows
    slope: bool = False  # it is a derivative that the program took itself
    discounted: bool = False  # a number between 0 and 1 is a factor of it
    goal: str = ""  # the line in which a discounted answer was added to data: a value to reach
    index: bool = False  # it says where the largest entry stands, and not how large it is
    norm: bool = False  # it is a length of all rows together, or of each column
    over_rows: str = ""  # the line in which rows were divided by such a length
    bound: float | None = None  # no entry can get larger than it, whatever the answers
    unlearned: str = ""  # the line of a loss that nothing learned has a part in
    logs: bool = False  # it is logarithms of shares that nothing learned has a part in


NOTHING = Note()


def union(notes: list[Note]) -> Note:
    """What is known of a tensor made of others."""
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
    """One function of torch as the recorder saw it, with the notes of its tensors."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    notes: list[Note]
    results: list[Tensor]
    place: str
    written: bool  # by the program itself, not inside of a function of torch
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def attached(self) -> bool:
        """Whether its result has a gradient to receive."""
        return any(t.requires_grad for t in self.results)

    @property
    def plain(self) -> bool:
        """Whether it is one function of tensors that gives one tensor."""
        return len(self.results) == 1


def together(shapes: list[Shape]) -> Shape | None:
    """The shape that tensors broadcast to; None where they do not."""
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        return None


def pairs(shape: Shape, rows: int) -> bool:
    """Whether a shape has the rows on two axes, alone or together with what stands beside them."""
    return any(s > 2 and s % rows == 0 and shape.count(s) > 1 for s in shape)
