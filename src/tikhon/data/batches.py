"""Convert any supported form of data to inputs and targets in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from tikhon.data.nested import (
    TARGET_NAMES,
    Batch,
    batch_length,
    concatenate,
    map_tensors,
    split_batch,
    tensors,
)
from tikhon.data.sources import load
from tikhon.errors import DataError
from tikhon.languages import sentence

_READ_SIZE = 256  # batch size for reading a whole data set


def pair(data: object, *, name: str = "data") -> tuple[Any, Tensor]:
    """Return the rows (inputs, targets) of any supported form of data, in memory.

    Accepted by every command: a pair (x, y) of tensors, arrays or data frames, where x may be a
    tuple of inputs or a dictionary of named ones; (a, b, y); a dictionary with one of `labels`,
    `label`, `target`, `targets`, `y`; anything with `x` and `y`; a `TensorDataset` or any data
    set with a length; a `DataLoader` or another iterable of batches (read once, completely, in the
    order of its data set); a path or a source name.
    Float arrays become torch's default float type, float tensors keep theirs; integers become
    int64, uint8 images and booleans among the inputs become floats.

    Raises `DataError` for unequal row counts, empty data, targets that are not a tensor,
    non-finite numbers, and a loader whose sampler does not visit every row once.

    >>> x, y = pair(([[0.0, 1.0], [1.0, 0.0]], [0, 1]))
    >>> tuple(x.shape), y.dtype
    ((2, 2), torch.int64)
    """
    batch, source = open_data(data, name)
    if batch is None:
        assert source is not None
        batch = _read_all(_in_order(source, name), name)
    inputs, target = batch
    if not isinstance(target, Tensor):
        raise DataError(
            f"{name}: (inputs, target) is needed, or names with one of {', '.join(TARGET_NAMES)}, "
            f"received {_describe_inputs(inputs, target)}"
        )
    x = map_tensors(inputs, lambda part: _checked(part, f"{name} x", inputs=True))
    y = _checked(target, f"{name} y", inputs=False)
    count_rows((x, y), name)
    return x, y


def open_data(data: Any, name: str = "data") -> tuple[Batch | None, Iterable[Any] | None]:
    """Return (rows in memory, None) or (None, iterable of batches); nothing is read or checked."""
    if isinstance(data, str | PathLike):
        data = load(data)
    if hasattr(data, "x") and hasattr(data, "y"):
        return split_batch((data.x, data.y), name), None
    if isinstance(data, TensorDataset):
        return split_batch(tuple(data.tensors), name), None
    if isinstance(data, list) and data and all(map(_is_row, data)):
        return None, DataLoader(cast("Dataset[object]", data), batch_size=_READ_SIZE)
    if isinstance(data, list) and data and all(map(_is_batch, data)):
        return None, data
    if isinstance(data, tuple | list | Mapping | Tensor | np.ndarray | PackedSequence):
        return split_batch(data, name), None
    bare = isinstance(data, DataLoader) and data.batch_sampler is None
    if bare and _is_row(next(iter(data), None)):
        raise DataError(
            f"{name}: the loader gives single rows (batch_size=None), and batches are needed: "
            "give it a batch_size, or hand over its data set"
        )
    sized = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and sized:
        return None, DataLoader(data, batch_size=_READ_SIZE)
    if isinstance(data, IterableDataset) and _is_row(next(iter(data), None)):
        return None, DataLoader(data, batch_size=_READ_SIZE)
    if not isinstance(data, Iterable) or hasattr(data, "columns"):
        raise DataError(
            f"{name}: a pair (x, y) of tensors, arrays or data frames, a data set, a DataLoader, "
            f"a path or a source name is needed, received {type(data).__name__}"
        )
    return None, data


def one_tensor(inputs: object, *, name: str, verb: str) -> Tensor:
    """Return the inputs as one tensor, for commands whose models take only one."""
    found = tensors(inputs)
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"{name}: {verb} takes models of one input tensor, received "
        f"{_describe_inputs(inputs, None)}; give one tensor, or use fit, diagnose or "
        "cure, which take several"
    )


def order(rows: int, *, seed: int, epoch: int) -> Tensor:
    """Return the row order of an epoch, a function of seed and epoch alone.

    Resuming within an epoch needs no stored state, and dropout, which draws from torch's global
    generator, does not change the order.

    >>> torch.equal(order(5, seed=1, epoch=2), order(5, seed=1, epoch=2))
    True
    """
    generator = torch.Generator().manual_seed(mix_seeds(seed, epoch))
    return torch.randperm(rows, generator=generator)


def mix_seeds(seed: int, epoch: int) -> int:
    """Mix two numbers into one seed."""
    found = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0]
    return int(found >> 1)


def slices(order: Tensor, size: int) -> list[Tensor]:
    """Split the order into batches; a last batch of one row is merged into the one before.

    Batch normalisation cannot train on a single row.

    >>> [len(s) for s in slices(torch.arange(9), 4)]
    [4, 5]
    """
    parts = list(order.split(size))
    if len(parts) > 1 and size > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _is_row(value: object) -> bool:
    """Return whether a value is one row: an input array and a scalar target."""
    if isinstance(value, Mapping):
        value = (*value.values(), next((value[k] for k in TARGET_NAMES if k in value), None))
    if not isinstance(value, tuple | list) or len(value) < 2:
        return False
    first, target = value[0], value[-1]
    return getattr(first, "ndim", 0) > 0 and (
        isinstance(target, int | float) or getattr(target, "ndim", None) == 0
    )


def _is_batch(value: object) -> bool:
    """Return whether an item of a list is a batch: a mapping, or a pair with an array."""
    if isinstance(value, tuple | list):
        return any(isinstance(v, Tensor | np.ndarray | Mapping) for v in value)
    return isinstance(value, Mapping)


def _in_order(source: Iterable[object], name: str) -> Iterable[object]:
    """Return the batches of a loader in the order of its data set, each row once."""
    if not isinstance(source, DataLoader) or source.batch_size is None:
        if not isinstance(source, DataLoader) or source.batch_sampler is None:
            return source
    if isinstance(source.dataset, IterableDataset):
        return source
    sampler, rows = source.sampler, source.dataset
    if type(sampler) is SubsetRandomSampler:
        rows = Subset(rows, sorted(sampler.indices))
    elif not visits_rows_once(source):
        kind = type(sampler if source.batch_size is not None else source.batch_sampler).__name__
        raise DataError(
            f"{name}: the loader draws its rows by {kind}, and here every row is needed once; "
            "give its data set, or a loader without a sampler of its own"
        )
    return DataLoader(
        rows, source.batch_size, collate_fn=source.collate_fn, num_workers=source.num_workers
    )


def visits_rows_once(loader: DataLoader[Any]) -> bool:
    """Return whether a loader visits every row once an epoch, in order or shuffled."""
    sampler = loader.sampler
    if loader.batch_size is None:
        return False
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    return type(sampler) is SequentialSampler


def _read_all(source: Iterable[object], name: str) -> Batch:
    """Read and join all batches."""
    try:
        batches = [split_batch(batch, name) for batch in source]
        for batch in batches:
            batch_length(batch)
        if batches:
            return concatenate(batches)
    except (TypeError, RuntimeError) as error:
        raise DataError(
            f"{name}: the batches of {type(source).__name__} cannot be joined to one set of rows "
            f"({error})"
        ) from error
    raise DataError(f"{name}: the loader gave no batch")


def _checked(values: Tensor, name: str, *, inputs: bool) -> Tensor:
    """Convert to a finite float tensor or an int64 tensor."""
    if inputs and (
        values.dtype == torch.bool or (values.dtype == torch.uint8 and values.ndim > 1)
    ):
        values = values.to(torch.get_default_dtype())
    if not values.is_floating_point():
        return values.long()
    finite = torch.isfinite(values)
    if not finite.all():
        where = (~finite).nonzero()[0].tolist()
        column = f", column {where[1]}" if len(where) == 2 else ""
        found = sentence("told_values", count=int((~finite).sum()))
        row = where[0] if where else 0
        raise DataError(
            f"{name} has {found} not finite, first in row {row}{column} "
            f"({values[tuple(where)].item()}); remove or fill them before training"
        )
    return values


def count_rows(batch: Batch, name: str = "data") -> int:
    """Count the rows; raise `DataError` for none, or for a different number of targets."""
    x, y = batch
    if isinstance(x, Tensor) and (x.ndim == 0 or len(x) == 0):
        raise DataError(f"{name} has no rows: x is of shape {tuple(x.shape)}")
    if isinstance(x, Tensor) and isinstance(y, Tensor) and (y.ndim == 0 or len(x) != len(y)):
        rows = len(y) if y.ndim else "no"
        raise DataError(f"{name}: x has {len(x)} rows but y has {rows}; give one target per row")
    try:
        return batch_length(batch)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def _describe_inputs(inputs: object, target: object) -> str:
    if isinstance(inputs, Mapping):
        return f"the names {', '.join(map(str, inputs))}"
    if isinstance(inputs, tuple) and len(inputs) > 1:
        return f"{len(inputs)} inputs"
    if target is None:
        return "inputs alone"
    return f"targets of type {type(target).__name__}"
