"""Batches of whatever a model eats: tensors, tuples for several inputs, dictionaries for names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tikhon.errors import DataError, InputError

Batch = tuple[Any, Any]


class Named(dict[str, Any]):
    """Inputs by name, and the name that their target had beside them."""

    target = "labels"


_TARGETS = ("labels", "label", "target", "targets", "y")


@dataclass(frozen=True)
class Feed:
    """A source of training batches, and one fixed batch to measure on."""

    probe: Batch
    source: Any  # (inputs, target) to index, or an iterable of batches
    rows: int
    indexed: bool

    def stream(self, size: int, seed: int) -> Iterator[Batch]:
        """Batches without end: whole shuffled epochs of a pair, or the loader again and again."""
        if not self.indexed:
            while True:
                for batch in self.source:
                    yield split(batch)
        generator = torch.Generator().manual_seed(seed)
        size = min(size, self.rows)
        while True:
            order = torch.randperm(self.rows, generator=generator)
            for start in range(0, self.rows - size + 1, size):
                yield take(self.source, order[start : start + size])


def feed(data: Any, *, rows: int = 256, name: str = "data") -> Feed:
    """The feed behind a pair, a loader, one batch, a path or a source name.

    Raises `DataError` where there are no rows or inputs and targets do not match.
    """
    if isinstance(data, str | PathLike):
        from tikhon.data.batches import pair

        data = pair(data, name=name)
    if hasattr(data, "x") and hasattr(data, "y"):
        data = (data.x, data.y)
    batches = isinstance(data, list) and all(isinstance(b, tuple | list | Mapping) for b in data)
    known = tuple | list | Mapping | Tensor | np.ndarray
    if isinstance(data, known) and not (batches and data):
        source = split(data, name)
        count = length(source)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:rows]
        return Feed(take(source, order.sort().values), source, count, True)
    if not isinstance(data, Iterable):
        raise DataError(
            f"{name} must be a pair (x, y), a loader of batches or one batch, received "
            f"{type(data).__name__}; a dataset is given as DataLoader(dataset, batch_size=64)"
        )
    return _from_loader(data, rows, name)


def _from_loader(loader: Iterable[Any], rows: int, name: str) -> Feed:
    parts: list[Batch] = []
    count = 0
    for batch in loader:
        parts.append(split(batch, name))
        count += length(parts[-1])
        if count >= rows:
            break
    if not parts:
        raise DataError(f"{name}: the loader gave no batch")
    if iter(loader) is loader:
        # an iterator is spent after one pass: what was read is all there is to train on
        return Feed(_join(parts), _join(parts), count, True)
    try:
        joined = _join(parts)
    except (RuntimeError, TypeError):  # batches of unequal shapes: sequences without padding
        joined = parts[0]
    return Feed(joined, loader, count, False)


def split(batch: Any, name: str = "data") -> Batch:
    """Inputs and target of one batch, arrays as tensors; no target is None."""
    try:
        if isinstance(batch, Mapping):
            values = Named(batch)
            values.target = next((k for k in _TARGETS if k in values), "")
            target = values.pop(values.target, None)
            return _tensors(values), _tensors(target)
        if not isinstance(batch, tuple | list) or isinstance(batch, PackedSequence):
            return _tensors(batch), None
        if len(batch) < 2:
            return _tensors(batch[0] if batch else None), None
        *inputs, target = batch
        return _tensors(inputs[0] if len(inputs) == 1 else tuple(inputs)), _tensors(target)
    except ValueError as error:  # numpy's, about rows of unequal length
        raise DataError(
            f"{name}: rows of unequal length cannot be one tensor ({error}); pad them, with "
            "torch.nn.utils.rnn.pad_sequence, in the collate_fn of the loader"
        ) from error


def whole(batch: Batch) -> Any:
    """The batch as the data gave it: the inverse of `split`."""
    inputs, target = batch
    if isinstance(inputs, Named):
        return {**inputs, inputs.target: target} if inputs.target else dict(inputs)
    if target is None:
        return inputs
    return (*inputs, target) if isinstance(inputs, tuple) else (inputs, target)


def check_target(batch: Batch, name: str = "data") -> None:
    """Raise `DataError` where a batch has no target for `loss(output, target)`."""
    inputs, target = batch
    if target is None:
        found = f"names {', '.join(inputs)}" if isinstance(inputs, Named) else "inputs alone"
        raise DataError(
            f"{name}: (inputs, target) is needed, or names with one of {', '.join(_TARGETS)}, "
            f"received {found}; a loss that needs no target is given as loss(model, batch)"
        )


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return _named(value, {k: _tensors(v) for k, v in value.items()})
    if isinstance(value, PackedSequence):
        return value
    if isinstance(value, tuple) or (
        isinstance(value, list) and any(isinstance(v, Tensor | tuple | Mapping) for v in value)
    ):
        return tuple(_tensors(v) for v in value)
    if isinstance(value, (np.ndarray, list, int, float, np.number)):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise DataError(f"data must be numeric, received an array of {array.dtype}")
        tensor = torch.as_tensor(array)
        floating = tensor.is_floating_point()
        return tensor.to(torch.get_default_dtype()) if floating else tensor
    return value


def _named(like: Mapping[Any, Any], values: dict[Any, Any]) -> dict[Any, Any]:
    """The values, with the name of the target that `like` knows."""
    if not isinstance(like, Named):
        return values
    named = Named(values)
    named.target = like.target
    return named


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a nested value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, tuple | list):
        return [t for part in value for t in tensors(part)]
    return []


def length(batch: Batch) -> int:
    """Rows of a batch; raises `DataError` where inputs and target disagree or are empty."""
    counts = [len(t) if t.ndim else 0 for part in batch for t in _columns(part)]
    if not counts or min(counts) == 0:
        raise DataError("data has no rows")
    if len(set(counts)) > 1:
        raise DataError(f"inputs and target have different numbers of rows: {counts}")
    return counts[0]


def _columns(value: Any) -> list[Tensor]:
    """The tensors with a row for each sample: those of a packed sequence have none."""
    if isinstance(value, PackedSequence):
        return [torch.empty(int(value.batch_sizes[0]))]
    if isinstance(value, tuple):
        return [t for part in value for t in _columns(part)]
    return tensors(value)


def take(batch: Any, index: Tensor) -> Any:
    """The rows of a nested batch."""
    if isinstance(batch, Tensor):
        return batch[index.to(batch.device)]
    if isinstance(batch, Mapping):
        return _named(batch, {k: take(v, index) for k, v in batch.items()})
    if isinstance(batch, PackedSequence):
        rows, lengths = pad_packed_sequence(batch, batch_first=True)
        return pack_padded_sequence(
            rows[index], lengths[index], batch_first=True, enforce_sorted=False
        )
    if isinstance(batch, tuple | list):
        return tuple(take(v, index) for v in batch)
    return batch


def _join(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return _named(first, {k: _join([p[k] for p in parts]) for k in first})
    if isinstance(first, PackedSequence):
        raise TypeError("packed sequences are not joined")
    if isinstance(first, tuple | list):
        return tuple(_join(list(column)) for column in zip(*parts))
    return first


def call(model: nn.Module, inputs: Any) -> Any:
    """The model on its inputs: a tuple is several arguments, a dictionary named ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence):
        return model(*inputs)
    return model(inputs)


def check_fit(model: nn.Module, batch: Batch) -> None:
    """Raise `InputError` where model and batch live on different devices."""
    homes = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    for tensor in tensors(batch):
        if homes and tensor.device not in homes:
            raise InputError(
                f"the model is on {', '.join(sorted(map(str, homes)))} but the data on "
                f"{tensor.device}; move one of them with .to(device)"
            )
