"""Pairs of tensors in, batches by index out: no per-sample Python."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tikhon.errors import DataError


def pair(data: Any, *, name: str = "data") -> tuple[Tensor, Tensor]:
    """The pair (x, y) behind whatever the user calls data.

    Accepted: a pair of tensors or arrays, anything with `x` and `y` (a `Dataset`), a `DataLoader`
    or other iterable of (x, y) batches (it is read once, whole), and a path or a source name.
    Arrays of floats become torch's default float type and tensors of floats keep theirs; integers
    become int64, bytes (images) floats.

    Raises `DataError` for rows that do not match, empty data and non-finite inputs.

    >>> x, y = pair(([[0.0, 1.0], [1.0, 0.0]], [0, 1]))
    >>> tuple(x.shape), y.dtype
    ((2, 2), torch.int64)
    """
    if isinstance(data, str | PathLike):
        from tikhon.data.sources import load

        data = load(data)
    if hasattr(data, "x") and hasattr(data, "y"):
        data = (data.x, data.y)
    if not isinstance(data, tuple | list):
        data = _drain(data, name)
    if len(data) != 2:
        raise DataError(f"{name}: a pair (x, y) is needed, received {len(data)} items")
    x, y = _as_tensor(data[0], f"{name} x"), _as_tensor(data[1], f"{name} y")
    if x.ndim == 0 or len(x) == 0:
        raise DataError(f"{name} has no rows: x is of shape {tuple(x.shape)}")
    if y.ndim == 0 or len(x) != len(y):
        rows = len(y) if y.ndim else "no"
        raise DataError(f"{name}: x has {len(x)} rows but y has {rows}; give one target per row")
    return x, y


def order(rows: int, *, seed: int, epoch: int) -> Tensor:
    """The order of the rows in an epoch: a function of seed and epoch alone.

    Nothing has to be stored to continue in the middle of an epoch, and dropout, which draws from
    torch's own generator, cannot change the order of the data.

    >>> torch.equal(order(5, seed=1, epoch=2), order(5, seed=1, epoch=2))
    True
    """
    mixed = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed >> 1))
    return torch.randperm(rows, generator=generator)


def slices(order: Tensor, size: int) -> list[Tensor]:
    """The order cut into batches; a last batch of one row joins the one before it.

    (Batch normalisation cannot train on one row.)

    >>> [len(s) for s in slices(torch.arange(9), 4)]
    [4, 5]
    """
    parts = list(order.split(size))
    if len(parts) > 1 and size > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _drain(loader: Iterable[Any], name: str) -> tuple[Tensor, Tensor]:
    """All batches of a loader, joined."""
    try:
        batches = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in loader]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{name}: a pair of tensors or arrays, a DataLoader of (x, y) batches, a path or a "
            f"source name is needed, received {type(loader).__name__} ({error})"
        ) from error
    if not batches:
        raise DataError(f"{name}: the loader gave no batch")
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _as_tensor(values: Any, name: str) -> Tensor:
    """A finite float tensor, or an int64 one."""
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "biuf":
            raise DataError(f"{name} must be numeric, received an array of {array.dtype}")
        values = torch.from_numpy(np.ascontiguousarray(array))
        if values.is_floating_point():
            values = values.to(torch.get_default_dtype())
    if values.dtype == torch.uint8 and values.ndim > 1:
        values = values.to(torch.get_default_dtype())
    if not values.is_floating_point():
        return values.long()
    finite = torch.isfinite(values)
    if not finite.all():
        where = (~finite).nonzero()[0].tolist()
        column = f", column {where[1]}" if len(where) == 2 else ""
        count = int((~finite).sum())
        raise DataError(
            f"{name} has {count} value(s) that are not finite, first in row {where[0]}{column} "
            f"({values[tuple(where)].item()}); remove or fill them before training"
        )
    return values
