"""What goes together: the parts of the parameters that make up one unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# what a change of each entry of a parameter weighs, squared; None where all weigh alike
Metric = Callable[[nn.Parameter], Tensor | None]


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter of a layer; `index[u]` are its positions along `dim` that belong to unit u.

    Without an index every entry is a unit of its own, and `dim` is not used.
    """

    name: str
    parameter: nn.Parameter
    dim: int = 0
    index: Tensor | None = None  # (units, positions a unit)
    scale: bool = False  # the weight of a norm: the size of a unit is read from it

    def crosses(self, other: Part) -> bool:
        """Whether both zero the same parameter, and not one its rows and the other its columns."""
        single = self.index is None or other.index is None
        return self.parameter is other.parameter and (single or self.dim == other.dim)

    def sizes(self, metric: Metric) -> Tensor:
        """The norm of each unit, (units,); of single entries in the metric."""
        w = self.parameter.detach()
        w = w.abs().float() if w.is_complex() else w.float()
        if self.index is None:
            stiffness = metric(self.parameter)
            return (w if stiffness is None else w * stiffness.sqrt()).abs().flatten()
        rows = w.movedim(self.dim, 0).reshape(w.shape[self.dim], -1)
        return torch.linalg.vector_norm(rows, dim=1)[self.index].norm(dim=1)

    def used(self) -> Tensor:
        """Which units have an entry that is not zero, (units,)."""
        there = self.parameter.detach() != 0
        if self.index is None:
            return there.flatten()
        rows = there.movedim(self.dim, 0).reshape(there.shape[self.dim], -1)
        return rows.any(1)[self.index].any(1)

    def spread(self, flags: Tensor, *, outside: float = 0.0) -> Tensor:
        """1 in the entries of the flagged units, 0 in those of the others; `outside` elsewhere.

        Broadcastable to the parameter.
        """
        w = self.parameter
        if self.index is None:
            return flags.view(torch.uint8).to(w.dtype).view(w.shape)  # bool is converted slowly
        along = torch.full((w.shape[self.dim],), outside, dtype=w.dtype, device=w.device)
        along[self.index] = flags.to(w)[:, None].expand_as(self.index)
        shape = [1] * w.ndim
        shape[self.dim] = -1
        return along.view(shape)


@dataclass(frozen=True, eq=False)
class Layer:
    """Units that are alike: those of one layer, or of layers whose outputs are added."""

    name: str
    units: int
    parts: tuple[Part, ...]
    product: bool = False  # the size of a unit is the product of its parts', as of two factors

    @torch.no_grad()
    def sizes(self, metric: Metric) -> Tensor:
        """The size of each unit in a metric, (units,).

        Where a norm follows, of its weight alone: the scale of what stands before it is free.
        """
        sizes = [part.sizes(metric) for part in self.parts if part.scale]
        sizes = sizes or [part.sizes(metric) for part in self.parts]
        if len(sizes) == 1:
            return sizes[0]
        return torch.stack(sizes).prod(0) if self.product else torch.stack(sizes).norm(dim=0)

    @torch.no_grad()
    def used(self) -> Tensor:
        """Which units have an entry that is not zero, (units,)."""
        return torch.stack([part.used() for part in self.parts]).any(0)

    def zeros(self) -> int:
        """How many units are exactly zero."""
        return self.units - int(self.used().sum())


def some(names: Iterable[object]) -> str:
    """The first five, for a message."""
    told = list(map(str, names))
    return ", ".join(told[:5]) + ", ..." * (len(told) > 5)
