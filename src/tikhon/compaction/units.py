"""Units of a traced model: which rows, channels and heads stand or fall together.

Every value of the graph carries, entry by entry, the number of the unit it belongs to and whether
it is a constant. Layout operations (reshape, transpose, chunk, cat) act on the numbers as they
act on the data, so the unit structure needs no rule of its own for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

NO_UNIT = -1  # an entry that broadcasts over units: a scalar


@dataclass(frozen=True)
class Units:
    """What is known of one tensor; the three tensors have its shape."""

    ids: Tensor  # int64, the unit of each entry
    const: Tensor  # bool, the entry does not depend on the input
    value: Tensor  # float64, its value where it is constant

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", _folded(self.ids))
        if not self.value.is_complex():  # a model may cast what it computes
            object.__setattr__(self, "value", self.value.double())

    def map(self, layout: Callable[[Tensor], Tensor]) -> Units:
        """The same operation on all three: for operations that only move entries."""
        return Units(layout(self.ids), layout(self.const), layout(self.value))

    def with_value(self, const: Tensor, value: Tensor) -> Units:
        """The same units with other constants."""
        return Units.of(self.ids, const, value)

    @classmethod
    def of(cls, ids: Tensor, const: Tensor, value: Tensor) -> Units:
        """Units with the values of constant entries alone, 0 elsewhere."""
        return cls(ids, const, torch.where(const, value, torch.zeros_like(value)))

    def columns(self, axis: int) -> Tensor:
        """The ids, one row per (different) position of the other axes: (positions, size)."""
        return _columns(self.ids, axis)

    def uniform(self, axis: int) -> tuple[Tensor, Tensor]:
        """Slices along axis that are one constant everywhere, and that constant: (size,) each."""
        const, value = _columns(self.const, axis), _columns(self.value, axis)
        return const.all(0) & (value == value[0]).all(0), value[0]


@dataclass
class Registry:
    """All units of a model: merged ones, pinned ones, and the ones that somebody needs."""

    parent: list[int] = field(default_factory=list)
    pinned: dict[int, str] = field(default_factory=dict)  # unit -> why it cannot go
    needed: set[int] = field(default_factory=set)  # pinned, and not for want of a rule

    def fresh(self, count: int) -> Tensor:
        """Numbers of `count` new units."""
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def root(self, unit: int) -> int:
        """The representative of a unit."""
        while self.parent[unit] != unit:
            self.parent[unit] = self.parent[self.parent[unit]]
            unit = self.parent[unit]
        return unit

    def merge(self, a: Tensor, b: Tensor) -> None:
        """Entry by entry, the units of a and of b become one."""
        left_ids, right_ids = without_repeats(*torch.broadcast_tensors(a, b))
        both = (left_ids != NO_UNIT) & (right_ids != NO_UNIT)
        pairs = left_ids[both] * len(self.parent) + right_ids[both]
        for pair in pairs.unique().tolist():
            left, right = map(self.root, divmod(pair, len(self.parent)))
            if left != right:
                self.parent[max(left, right)] = min(left, right)

    def pin(self, ids: Tensor, why: str) -> None:
        """The units of ids stay, whatever their weights."""
        for unit in without_repeats(ids)[0].unique().tolist():
            if unit != NO_UNIT:
                self.pinned.setdefault(unit, why)

    def roots(self) -> Tensor:
        """The representative of every unit."""
        return torch.tensor([self.root(unit) for unit in range(len(self.parent))])


def opaque(shape: torch.Size, registry: Registry, why: str) -> Units:
    """A tensor about which nothing is known: one unit that stays."""
    unit = registry.fresh(1)
    registry.pin(unit, why)
    one = unit.reshape([1] * len(shape))  # also for a number without dimensions
    return Units(
        one.expand(shape), torch.zeros(shape, dtype=torch.bool), torch.zeros(shape).double()
    )


def fresh_ids(axis: int, shape: torch.Size, registry: Registry) -> Tensor:
    """Ids of a tensor of this shape with a fresh unit for each position of `axis`."""
    view = [1] * len(shape)
    view[axis] = shape[axis]
    return registry.fresh(shape[axis]).view(view).expand(shape)


def without_repeats(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape without the axes along which all of them repeat (a stride of 0)."""
    for axis, size in enumerate(tensors[0].shape):
        if size > 1 and not any(t.stride(axis) for t in tensors):
            tensors = tuple(t.narrow(axis, 0, 1) for t in tensors)
    return tensors


def _folded(ids: Tensor) -> Tensor:
    """The same ids, repeated (by a stride of 0) along every axis on which they do not vary."""
    (part,) = without_repeats(ids)
    for axis, size in enumerate(part.shape):
        if size > 1 and not varies(part, axis):
            part = part.narrow(axis, 0, 1)
    return part.expand(ids.shape)


def _columns(tensor: Tensor, axis: int) -> Tensor:
    """One row per position of the other axes, of those that repeat one: (positions, size)."""
    (part,) = without_repeats(tensor)
    size = tensor.shape[axis]
    sizes = list(part.shape)
    sizes[axis] = size
    return part.expand(sizes).movedim(axis, -1).reshape(-1, size)


def entry_mask(keep: Tensor, ids: Tensor) -> Tensor:
    """Mask of the entries that stay; keep has one flag a unit."""
    if not len(keep):
        return torch.ones_like(ids, dtype=torch.bool)
    (part,) = without_repeats(ids)
    return (keep[part.clamp(min=0)] | (part == NO_UNIT)).expand(ids.shape)


def axis_masks(mask: Tensor) -> list[Tensor]:
    """For every axis, the positions where anything stays."""
    (part,) = without_repeats(mask)
    flat = [part.movedim(axis, 0).reshape(size, -1) for axis, size in enumerate(part.shape)]
    return [rows.any(1).expand(size) for rows, size in zip(flat, mask.shape)]


def varies(ids: Tensor, axis: int) -> bool:
    """Whether positions along axis are of different units."""
    (part,) = without_repeats(ids)
    return part.shape[axis] > 1 and bool((part != part.narrow(axis, 0, 1)).any())


def axes_of_variation(ids: Tensor) -> int:
    """Along how many axes units differ."""
    return sum(varies(ids, axis) for axis in range(ids.ndim))


def bounding_box(mask: Tensor) -> Tensor:
    """The smallest box of whole slices that holds the mask: what a dense tensor can be cut to."""
    box = torch.ones_like(mask)
    for axis, positions in enumerate(axis_masks(mask)):
        view = [1] * mask.ndim
        view[axis] = -1
        box &= positions.view(view)
    return box
