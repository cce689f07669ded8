"""Rows of any model input: tensors, tuples of inputs, dictionaries of named inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tikhon.errors import DataError

Batch = tuple[Any, Any]  # (inputs, target)


class NamedInputs(dict[str, Any]):
    """Named inputs, remembering the name of their target."""

    target = "labels"


class FlatInputs(tuple[Any, ...]):
    """Several inputs from a flat tuple (a, b, y), as opposed to ((a, b), y)."""


TARGET_NAMES = ("labels", "label", "target", "targets", "y")


def split_batch(batch: object, name: str = "data") -> Batch:
    """Split a batch into inputs and target (None if missing), converting arrays to tensors."""
    try:
        if isinstance(batch, Mapping):
            values = NamedInputs(batch)
            values.target = next((k for k in TARGET_NAMES if k in values), "")
            target = values.pop(values.target, None)
            return as_tensors(values, f"{name} x"), as_tensors(target, f"{name} y")
        if not isinstance(batch, tuple | list) or isinstance(batch, PackedSequence):
            return as_tensors(batch), None
        if len(batch) < 2:  # of `TensorDataset(x)`: kept a tuple so that `batch[0]` still works
            return as_tensors(tuple(batch)) if batch else None, None
        *inputs, target = batch
        _refuse_reordered(inputs, target, name)
        x = inputs[0] if len(inputs) == 1 else FlatInputs(inputs)
        return as_tensors(x, f"{name} x"), as_tensors(target, f"{name} y")
    except DataError:
        raise
    except ValueError as error:  # raised by numpy for rows of unequal length
        raise DataError(
            f"{name}: rows of unequal length cannot be one tensor ({error}); pad them, with "
            "torch.nn.utils.rnn.pad_sequence, in the collate_fn of the loader"
        ) from error


def _refuse_reordered(inputs: Sequence[object], target: object, name: str) -> None:
    """Refuse a target of pandas whose index has the labels of the inputs in another order."""
    index: Any = getattr(target, "index", None)
    for part in inputs:
        other: Any = getattr(part, "index", None)
        if not hasattr(index, "equals") or not hasattr(other, "equals"):  # of pandas
            continue
        if not index.equals(other) and sorted(map(str, index)) == sorted(map(str, other)):
            raise DataError(
                f"{name}: x and y have the same index in another order; give y.loc[x.index] to "
                "pair rows of one label, or y.to_numpy() to pair them by position"
            )


def join_batch(batch: Batch) -> Any:
    """Join inputs and target to the original batch; the inverse of `split_batch`."""
    inputs, target = batch
    if isinstance(inputs, NamedInputs):
        return {**inputs, inputs.target: target} if inputs.target else dict(inputs)
    if target is None:
        return inputs
    return (*inputs, target) if isinstance(inputs, FlatInputs) else (inputs, target)


def as_tensors(value: object, name: str = "data") -> object:
    """Convert arrays, frames and lists of numbers to tensors, floats in torch's default dtype."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return _named_like(value, {k: as_tensors(v, f"{name} {k}") for k, v in value.items()})
    if isinstance(value, PackedSequence):
        return value
    if isinstance(value, tuple) or (
        isinstance(value, list) and any(isinstance(v, Tensor | tuple | Mapping) for v in value)
    ):
        return _tuple_like(value, (as_tensors(v, name) for v in value))
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        raise DataError(f"{name} is a sparse matrix of scipy, and rows are dense: give .toarray()")
    if isinstance(value, list | int | float) or hasattr(value, "__array__"):
        array = np.require(_as_array(value), requirements=["C", "W"])
        if array.dtype.kind not in "biuf":
            ask = "; number the classes: numpy.unique(y, return_inverse=True)[1]"
            raise DataError(
                f"{name} must be numeric, received an array of {array.dtype}"
                + _describe_text_columns(value)
                + (ask if name.endswith(" y") else "")
            )
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        tensor = torch.as_tensor(array)
        return _to_default_dtype(tensor, name) if tensor.is_floating_point() else tensor
    return value


def _as_array(value: Any) -> np.ndarray:
    """Return the value as an array; frames of numbers and booleans become floats.

    pandas returns objects for its nullable dtypes, and for numbers beside booleans.
    """
    array = np.asarray(value)
    if array.dtype != object:
        return array
    if not hasattr(value, "to_numpy"):
        return _numbers_of_objects(array)
    kinds = value.dtypes if hasattr(value, "columns") else [value.dtype]
    if not all(getattr(kind, "kind", "O") in "biuf" for kind in kinds):
        return _numbers_of_objects(array)
    return value.to_numpy(np.float64, na_value=np.nan)


def _numbers_of_objects(array: np.ndarray) -> np.ndarray:
    """Convert an object array to numbers if all its elements are numbers."""
    numbers = all(isinstance(v, Number) and not isinstance(v, complex) for v in array.flat)
    return np.array(array.tolist()) if array.size and numbers else array


def _describe_text_columns(value: Any) -> str:
    """Name the non-numeric columns of a frame, for a message."""
    if not hasattr(value, "columns"):
        return ""
    kinds = zip(value.columns, value.dtypes, strict=True)
    found = [repr(name) for name, kind in kinds if getattr(kind, "kind", "O") not in "biuf"]
    return f"; columns that are no numbers: {', '.join(found[:8])}" if found else ""


def _to_default_dtype(tensor: Tensor, name: str) -> Tensor:
    """Convert to torch's default dtype; raise `DataError` where that overflows."""
    found = tensor.to(torch.get_default_dtype())
    if found.element_size() < tensor.element_size():
        lost = found.isinf() & tensor.isfinite()
        if lost.any():
            kind = str(found.dtype).removeprefix("torch.")
            raise DataError(
                f"{name} holds {tensor[lost][0].item():.3g}, which {kind} cannot hold: rescale "
                "it, or give tensors of float64 to a model in float64"
            )
    return found


def keep_float64(data: object) -> object:
    """Return a pair with float64 arrays as tensors, so that `pair` keeps their dtype.

    In float32, y = 1e9 + noise would be constant.
    """
    return tuple(map(_keep_float64, data)) if isinstance(data, tuple) else data


def _keep_float64(part: object) -> object:
    if isinstance(part, Tensor) or not hasattr(part, "__array__"):
        return part
    array = np.require(np.asarray(part), requirements=["C", "W"])
    return torch.as_tensor(array) if array.dtype == np.float64 else part


def _named_like(like: Mapping[object, object], values: dict[Any, Any]) -> dict[Any, Any]:
    """Copy the target name of `like` to the values."""
    if not isinstance(like, NamedInputs):
        return values
    named = NamedInputs(values)
    named.target = like.target
    return named


def _tuple_like(like: object, values: Iterable[Any]) -> tuple[Any, ...]:
    """Return the values as a tuple of the same type as `like`."""
    return FlatInputs(values) if isinstance(like, FlatInputs) else tuple(values)


def tensors(value: object) -> list[Tensor]:
    """Return all tensors of a nested value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, tuple | list):
        return [t for part in value for t in tensors(part)]
    return []


def stored_values(tensor: Tensor) -> Tensor:
    """Return the stored values of a tensor, for a sparse one the non-zeros."""
    if tensor.layout == torch.strided:
        return tensor
    return tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()


def batch_length(batch: Batch) -> int:
    """Count the rows of a batch; raise `DataError` if the counts differ or are zero."""
    parts = [t for part in batch for t in _row_tensors(part)]
    if any(t.ndim == 0 for t in parts):
        raise DataError(
            "batches are needed, and a single row was received, or a number for all rows: give a "
            "list of rows, a data set or a DataLoader"
        )
    counts = [len(t) for t in parts]
    if not counts or min(counts) == 0:
        raise DataError("data has no rows")
    if len(set(counts)) > 1:
        raise DataError(f"inputs and target have different numbers of rows: {counts}")
    return counts[0]


def _row_tensors(value: object) -> list[Tensor]:
    """Return the tensors with one row for each sample; a stand-in for packed sequences."""
    if isinstance(value, PackedSequence):
        return [torch.empty(int(value.batch_sizes[0]))]
    if isinstance(value, tuple):
        return [t for part in value for t in _row_tensors(part)]
    return tensors(value)


def take_rows(batch: object, index: Tensor) -> Any:
    """Select rows of a nested batch."""

    def take(part: Tensor) -> Tensor:
        plain = part.layout in (torch.strided, torch.sparse_coo)
        return (part if plain else part.to_sparse()).index_select(0, index.to(part.device))

    def take_sequences(packed: PackedSequence) -> PackedSequence:
        rows, lengths = pad_packed_sequence(packed, batch_first=True)
        return pack_padded_sequence(
            rows[index], lengths[index], batch_first=True, enforce_sorted=False
        )

    return map_tensors(batch, take, take_sequences)


def concatenate(parts: list[Any]) -> Any:
    """Concatenate nested batches."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return _named_like(first, {k: concatenate([p[k] for p in parts]) for k in first})
    if isinstance(first, PackedSequence):
        raise TypeError("packed sequences are not joined")
    if isinstance(first, tuple | list):
        return _tuple_like(first, (concatenate(list(column)) for column in zip(*parts)))
    return first


def slice_rows(value: object, rows: slice) -> Any:
    """Slice the rows of a nested value, as views."""
    return map_tensors(value, lambda part: part[rows])


def iterate_slices(value: object, rows: int = 4096) -> Iterator[Any]:
    """Yield slices of at most `rows` rows of a nested value, as views."""
    for at in range(0, len(tensors(value)[0]), rows):
        yield slice_rows(value, slice(at, at + rows))


def to_device(value: object, device: torch.device) -> Any:
    """Move a nested value to a device."""
    return map_tensors(value, lambda part: part.to(device))


def map_tensors(
    value: object,
    change: Callable[[Tensor], Tensor],
    change_packed: Callable[[PackedSequence], PackedSequence] | None = None,
) -> Any:
    """Apply a function to every tensor of a nested value, and another to packed sequences."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        mapped = {k: map_tensors(v, change, change_packed) for k, v in value.items()}
        return _named_like(value, mapped)
    if isinstance(value, PackedSequence):
        if change_packed:
            return change_packed(value)
        moved: Any = value
        return moved.to(change(torch.empty(0)).device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, change, change_packed) for v in value))
    if isinstance(value, tuple | list):
        return _tuple_like(value, (map_tensors(v, change, change_packed) for v in value))
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return type(value)(**{k: map_tensors(v, change, change_packed) for k, v in parts.items()})
    return value
