"""The parts of parameters that make up a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# squared importance of a change of each entry; None if uniform
Metric = Callable[[nn.Parameter], Tensor | None]


@dataclass(frozen=True, eq=False)
class Part:
    """A parameter of a layer; `index[u]` are the positions along `dim` that belong to unit u.

    Without an index every entry is a unit, and `dim` is ignored.
    """

    name: str
    parameter: nn.Parameter
    dim: int = 0
    index: Tensor | None = None  # (units, positions a unit)
    scale: bool = False  # the weight of a norm, which then sets the size of units

    def overlaps(self, other: Part) -> bool:
        """Return whether both zero one parameter along the same dimension, or by entries."""
        single = self.index is None or other.index is None
        return self.parameter is other.parameter and (single or self.dim == other.dim)

    def sizes(self, metric: Metric) -> Tensor:
        """Return the norm of each unit, (units,); for single entries in the metric."""
        w = self.parameter.detach()
        w = w.abs().float() if w.is_complex() else w.float()
        if self.index is None:
            stiffness = metric(self.parameter)
            return (w if stiffness is None else w * stiffness.sqrt()).abs().flatten()
        rows = w.movedim(self.dim, 0).reshape(w.shape[self.dim], -1)
        return torch.linalg.vector_norm(rows, dim=1)[self.index].norm(dim=1)

    def nonzero_units(self) -> Tensor:
        """Return a mask of units with a non-zero entry, (units,)."""
        there = self.parameter.detach() != 0
        if self.index is None:
            return there.flatten()
        rows = there.movedim(self.dim, 0).reshape(there.shape[self.dim], -1)
        return rows.any(1)[self.index].any(1)

    def expand_mask(self, flags: Tensor, *, outside: float = 0.0) -> Tensor:
        """Return 1 for entries of flagged units, 0 for those of others, and `outside` elsewhere.

        Broadcasts to the parameter.
        """
        w = self.parameter
        if self.index is None:
            return flags.view(torch.uint8).to(w.dtype).view(w.shape)  # bool converts slowly
        along = torch.full((w.shape[self.dim],), outside, dtype=w.dtype, device=w.device)
        along[self.index] = flags.to(w)[:, None].expand_as(self.index)
        shape = [1] * w.ndim
        shape[self.dim] = -1
        return along.view(shape)


@dataclass(frozen=True, eq=False)
class Layer:
    """Units of one kind: those of a layer, or of layers whose outputs are added."""

    name: str
    units: int
    parts: tuple[Part, ...]
    product: bool = False  # sizes are products over parts, as for two factors

    @torch.no_grad()
    def sizes(self, metric: Metric) -> Tensor:
        """Return the size of each unit in a metric, (units,).

        If a norm follows, its weight alone, as it cancels the scale before it.
        """
        sizes = [part.sizes(metric) for part in self.parts if part.scale]
        sizes = sizes or [part.sizes(metric) for part in self.parts]
        if len(sizes) == 1:
            return sizes[0]
        return torch.stack(sizes).prod(0) if self.product else torch.stack(sizes).norm(dim=0)

    @torch.no_grad()
    def nonzero_units(self) -> Tensor:
        """Return a mask of units with a non-zero entry, (units,)."""
        return torch.stack([part.nonzero_units() for part in self.parts]).any(0)

    def zeros(self) -> int:
        """Number of units that are exactly zero."""
        return self.units - int(self.nonzero_units().sum())


def first_names(names: Iterable[object]) -> str:
    """Return the first five names, for a message."""
    label = list(map(str, names))
    return ", ".join(label[:5]) + ", ..." * (len(label) > 5)
