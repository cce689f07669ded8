"""Notes about tensors on the way to the loss: origin and properties."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(eq=False)
class Broadcast:
    """Rows broadcast against rows on another axis: (n,) and (n, 1) become (n, n)."""

    function: str
    shapes: tuple[Shape, Shape]
    place: str
    explicit: bool  # the axis of size one is explicit: None, unsqueeze, view
    unrelated: bool  # the operands come from different tensors
    intended: bool = False  # used with other pairwise matrices, or reduced along one axis


@dataclass(eq=False)
class Summand:
    """A faulty summand of the loss.

    `kind` is "sampled", a part without gradient computed from a random sample, or "weighed", a
    mean over rows times one number per row.
    """

    kind: str
    function: str
    place: str
    intended: bool = False  # used otherwise than in sums


@dataclass(frozen=True)
class Origin:
    """Properties of one tensor.

    `roots` are the model outputs and parts of the batch that it is computed from; `explicit_axes`:
    its axes of size one are explicit; `sampled`: function and line of a random sample without
    gradient that it comes from; `mixed`: combined with other tensors since.
    """

    roots: frozenset[int] = frozenset()
    explicit_axes: bool = False
    broadcasts: tuple[Broadcast, ...] = ()
    summands: tuple[Summand, ...] = ()
    sampled: tuple[str, str] | None = None
    mixed: bool = False
    random: bool = False  # contains noise
    masked_share: float = 0.0  # share of entries zeroed by a mask
    averaged: bool = False  # a scalar over all rows
    derivative: bool = False  # a derivative taken by the program
    discounted: bool = False  # multiplied by a constant between 0 and 1
    bootstrap_line: str = ""  # line that adds a discounted output to data: a bootstrapped target
    is_index: bool = False  # an argmax or another index
    row_norm: bool = False  # a norm over the rows
    normed_line: str = ""  # line that divided rows by such a norm
    bound: float | None = None  # upper bound on all entries
    detached_line: str = ""  # line of a loss without gradient
    log_targets: bool = False  # a log-softmax of data
    log_chance: bool = False  # logarithms of the chances of what was chosen
    lost_slope: str = ""  # line that took a derivative without a graph, that it comes from


UNKNOWN = Origin()


def union(origins: list[Origin]) -> Origin:
    """Merge the origins of the inputs of an operation."""
    broadcasts = dict.fromkeys(g for n in origins for g in n.broadcasts)
    summands = dict.fromkeys(s for n in origins for s in n.summands)
    return Origin(
        frozenset().union(*(n.roots for n in origins)),
        broadcasts=tuple(broadcasts),
        summands=tuple(summands),
        random=any(n.random for n in origins),
        derivative=any(n.derivative for n in origins),
        discounted=any(n.discounted for n in origins),
        bootstrap_line=next((n.bootstrap_line for n in origins if n.bootstrap_line), ""),
    )


@dataclass(frozen=True)
class TracedCall:
    """One recorded call of a torch function, with the origins of its tensors."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    shapes: list[Shape]  # before an in-place reshape
    origins: list[Origin]
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


def broadcast_shape(shapes: list[Shape]) -> Shape | None:
    """Return the broadcast shape; None if shapes do not broadcast."""
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        return None


def row_pairs(shape: Shape, rows: int) -> bool:
    """Whether a shape has the rows on two axes, alone or merged with a neighbouring axis."""
    return any(s > 2 and s % rows == 0 and shape.count(s) > 1 for s in shape)
